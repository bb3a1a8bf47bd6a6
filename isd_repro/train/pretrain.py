"""Stage `pretrain`: train one run on a prepared subset; write its encoders and its record.

Resume state is in `.state/<fingerprint>/` until the outputs are written, because DVC deletes outputs before a stage starts. The
fingerprint covers every value that changes the result, so a changed temperature starts afresh. docs/reliability.md says what
holds when a run is killed, stopped or diverges. Of several ranks, rank 0 reads and writes, and the others only compute.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from isd_repro import methods, provenance
from isd_repro.config.layout import Layout, snapshot_name, snapshots_in
from isd_repro.config.params import Params, Run
from isd_repro.config.reader import find_run, fingerprint, naming
from isd_repro.data import augment, contact_sheet
from isd_repro.data.loader import Batches
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.interfaces import Backbone, Setting
from isd_repro.nn import backbones, engine, products
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.records import PretrainRecord, write_record
from isd_repro.runtime import files, ranks, signals
from isd_repro.runtime.errors import ConfigError, DataError, Preempted, UserError
from isd_repro.tensor_files import save_tensors
from isd_repro.tracking import RunTracker, open_stage, read_metrics, truncate_metrics
from isd_repro.train import checkpoint, collapse, loop, monitor
from isd_repro.train.checkpoint import Attempts, RunProgress
from isd_repro.train.display import Display

SNAPSHOTS = "snapshots"  # in the state folder
SHOWN = 8  # images of which the first views are kept as a picture
RESUME_ME = "resume-me"  # in the state folder of a run that was asked to stop
_DONE = ".done-"  # a state folder that is being removed


def pretrain(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Train one run to its end, resuming where an earlier process stopped, and write its outputs.

    Raises:
        ConfigError: the run, its method or a size is wrong, or the ranks do not divide its batch or its BatchNorm groups.
        DataError: the prepared subset or the resume state is missing or damaged.
        UserError: a number is not finite, another process trains the run, it was trained by other code or other arithmetic so
            far, or a rank is gone.
        Preempted: a signal asked to stop; the state is saved.
    """
    provenance.remember_code()
    run = find_run(params, name)
    with _threads(run.numerics.threads):
        with ranks.first_alone():  # it may hash the images, and the others then need not
            prepared = open_prepared(layout.prepared(run.data.subset), layout.verified, params.efficiency.workers)
        plan = make_plan(name, run, prepared, layout)
        with naming(layout.file, name):
            changes = engine.changes_of(augment.CHANGES, plan.device, run.numerics)
            size, seed = run.optim.batch_size, run.numerics.seed
            batches = Batches(prepared.store, prepared.split("train"), run.data, size, seed, plan.device, changes=changes)
        work = _Work(plan, batches, params, layout, console)
        if ranks.rank() > 0:
            with signals.stop_on_signal() as stop:
                work.assist(stop)
            return
        state = work.state
        busy = f"{state}: this run is already being trained"
        with files.exclusive(state / "lock", busy), signals.stop_on_signal() as stop:
            files.sweep(state.parent, _DONE)
            (state / RESUME_ME).unlink(missing_ok=True)
            files.write_atomic(state / "run.json", work.owner())
            progress = work.resume()
            for path in (layout.encoder(name), layout.record(name, "pretrain")):
                files.check_writable(path.parent)
            with checkpoint.attempt(state / "attempts.json", progress, work.equipment(progress), work.say) as log:
                work.train(progress, log, stop)
                work.export(progress, log)
            with files.temporary(state.with_name(f"{_DONE}{state.name}-{secrets.token_hex(4)}")) as trash:
                state.rename(trash)  # at once: half a state would be resumed from
    if console.is_terminal:
        console.print(work.display.finished(progress.seconds), soft_wrap=True)
    else:
        work.say(f"{progress.step} steps in {progress.seconds:.0f} s -> {layout.encoder(name)}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads within the block; None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- what is trained ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A fully resolved run: everything that the fingerprint covers, and the module to train."""

    name: str
    run: Run
    prepared: Prepared
    config: dict[str, Any]  # the result-affecting groups, defaults included
    fingerprint: str
    method: nn.Module
    device: torch.device


def make_plan(name: str, run: Run, prepared: Prepared, layout: Layout) -> Plan:
    """Check a run against its method and data, and build its module from its seed."""
    method_config = methods.config_of(name, run.method, layout.file)
    config = {
        "backbone": run.backbone.model_dump(mode="json"),
        "method": {**methods.identity(run.method.name), **method_config.model_dump(mode="json")},
        "optim": run.optim.model_dump(mode="json"),
        "data": run.data.model_dump(mode="json", exclude={"subset"}),
        "numerics": run.numerics.model_dump(mode="json"),
        "manifest": prepared.identity.sha256,
        "store": prepared.store.info.settings.model_dump(mode="json"),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with naming(layout.file, name), torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        _check_machine(run)
        torch.manual_seed(run.numerics.seed)
        size, images = run.optim.batch_size, len(prepared.split("train").index)
        setting = Setting(
            classes=len(prepared.identity.classes),
            images=images,
            batch_size=size,
            steps=run.optim.epochs * (images // size),
            frozen=lambda path, sha256: _frozen(layout.folder / path, sha256, run.backbone.channels),
            **engine.setting_of(run.numerics),
        )
        method: nn.Module = methods.load(run.method.name).Method(
            method_config, lambda: backbones.build(run.backbone, run.data.image_size), setting
        )
        set_bn_groups(method, run.numerics.bn_groups)
        if getattr(method, "needs_labels", False) and run.optim.epochs and bool((prepared.split("train").label < 0).any()):
            found = f"method.name: {run.method.name} learns from labels, but some training images of this subset have none"
            raise ConfigError(found, "use a subset without `unlabelled: true`")
        if run.data.views_more and not getattr(method, "takes_more_views", False):
            raise ConfigError(f"data.views_more: {run.method.name} reads two views", "remove the key")
    # channels_last: 1.3x on one CPU core and the layout that tensor cores want; layout only, the same parameters
    method = method.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Plan(name, run, prepared, config, fingerprint(config), method, device)


def _frozen(path: Path, sha256: str, channels: int) -> Backbone:
    """The encoder of a checkpoint that `evaluate` reads."""
    # by name: the file's hash is a parameter, so the reader's code is no dependency of a run
    found = import_module("isd_repro.checkpoints").load(path)
    if found.sha256 != sha256:
        said = f"method.sha256: {sha256}, but that of {path} is {found.sha256}"
        raise ConfigError(said, "restore the file, or write its own sha256")
    if found.channels != channels:
        said = f"method.teacher: {path} takes images of {found.channels} channels, and the backbone of {channels}"
        raise ConfigError(said, "give another checkpoint, or change backbone.channels")
    encoder: Backbone = found.encoders["student"]
    return encoder


def _check_machine(run: Run) -> None:
    if run.optim.batch_size % ranks.world():
        found = f"optim.batch_size: {run.optim.batch_size} images for {ranks.world()} processes"
        raise ConfigError(found, "start a number of processes that divides the batch size")
    if run.numerics.precision == "bf16" and not torch.cuda.is_available() and not products.multiplies_bf16():
        raise ConfigError(
            "numerics.precision: bf16 needs a CUDA device or a CPU with bf16 instructions", "set numerics.precision to float32"
        )


# --- one process's work ---------------------------------------------------------------------------------------------------


class _Work:
    """One process's work on a run, between taking its lock and writing its outputs."""

    def __init__(self, plan: Plan, batches: Batches, params: Params, layout: Layout, console: Console) -> None:
        self.plan, self.batches, self.params, self.layout, self.console = plan, batches, params, layout, console
        self.encoders: dict[str, nn.Module] = dict(plan.method.encoders)  # type: ignore[arg-type]
        self.state = state = layout.state(plan.fingerprint)
        self.checkpoint, self.rows = state / "checkpoint.pt", state / "metrics.jsonl"
        self.total = plan.run.optim.epochs * batches.steps_per_epoch  # steps
        self.optimizer = loop.optimizer_of(plan.method, plan.run.optim, plan.run.numerics) if self.total else None
        self.code = checkpoint.code_of(plan.run.method.name, plan.device)
        self.saved = 0  # step of the newest checkpoint
        title = f"{plan.name}, run {list(params.runs).index(plan.name) + 1} of {len(params.runs)}"
        optim = plan.run.optim
        self.display = Display(console, title, optim.epochs, batches.steps_per_epoch, optim.batch_size)

    def say(self, line: str) -> None:
        """One plain line that begins with the run."""
        self.console.print(f"{self.plan.name}: {line}", highlight=False, markup=False, soft_wrap=True)

    def owner(self) -> bytes:
        """JSON that identifies the run to which an abandoned state folder belongs."""
        owner = {"profile": self.params.profile, "run": self.plan.name, "config": self.plan.config}
        return json.dumps(owner, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

    def resume(self) -> RunProgress:
        """Restore the run's state and return its progress."""
        if self.optimizer is None:
            self.rows.touch()
            return RunProgress(sources=[provenance.source_hash()])
        plan = self.plan
        progress = checkpoint.load(self.checkpoint, plan.fingerprint, plan.method, self.optimizer, plan.device, self.say)
        self.saved = progress.step
        if progress.step > self.total or len(progress.curve) != progress.step // self.batches.steps_per_epoch:
            found = f"{progress.step} steps and {len(progress.curve)} epochs"
            expected = f"at most {self.total} steps, {self.batches.steps_per_epoch} an epoch"
            raise DataError(f"{self.checkpoint}: has {found}, expected {expected}", f"delete {self.state} to restart this run")
        checkpoint.take_over(progress, self.code, self.state)
        if progress.step:
            self.say(f"resuming after step {progress.step}")
        if provenance.source_hash() not in progress.sources:
            progress.sources.append(provenance.source_hash())
        try:
            truncate_metrics(self.rows, lambda row: row["epoch"] <= len(progress.curve))
        except DataError as error:
            said = f"{error.message}; it is kept as {files.put_aside(self.rows).name}"
            self.say(f"{said}, and its rows are rewritten from the checkpoint")
        return checkpoint.share(plan.fingerprint, plan.method, self.optimizer, progress, self.code)

    def equipment(self, progress: RunProgress) -> str:
        """The device in words, after its kernels and compiler were chosen on the next batch, if there is one."""
        plan, numerics = self.plan, self.plan.run.numerics
        on_cpu = plan.device.type == "cpu"
        device = f"cpu ({checkpoint.arithmetic()})" if on_cpu else torch.cuda.get_device_name(plan.device)
        kernels, compiled = engine.kernels_of(plan.method, numerics), ""
        if progress.step < self.total:
            views = lambda: self.batches.at(progress.step).view_student  # noqa: E731
            compiled = engine.compile_(self.encoders, views, plan.device, numerics)
            for complaint in engine.complaints(kernels, compiled):
                self.say(f"warning: {complaint}; the run continues without it")
        return f"{device}{kernels}{compiled}" + (f", {ranks.world()} processes" if ranks.world() > 1 else "")

    def assist(self, stop: signals.StopRequest) -> None:
        """The work of every rank but 0: receive rank 0's state and train; rank 0 does the rest."""
        if self.optimizer is None:
            return
        progress = checkpoint.share(self.plan.fingerprint, self.plan.method, self.optimizer, RunProgress(), self.code)
        nothing = lambda *_: None  # noqa: E731
        self._loop(progress, loop.Hooks(save=nothing, epoch=nothing, tick=nothing, stopped=stop))

    def train(self, progress: RunProgress, log: Attempts, stop: signals.StopRequest) -> None:
        """Train to the end of the last epoch."""
        if self.optimizer is None:
            return
        plan, params = self.plan, self.params
        config = {**plan.config, **provenance.shown_provenance()}
        opened = open_stage("pretrain", plan.name, params, self.layout, identity=plan.fingerprint, config=config, rows=self.rows)
        with self.display as display, opened as tracker:
            for row in self._lost(progress):
                tracker.log(row)
            if progress.step == 0:
                tracker.log_image("views", *_views(self.batches, plan.run))
            display.begin(progress.step)
            hooks = loop.Hooks(
                save=lambda now: self._save(now, log),
                epoch=self._reporter(progress, tracker),
                tick=display.tick,
                stopped=stop,
            )
            try:
                self._loop(progress, hooks)
            except Preempted as error:  # here, not where it ends: W&B's last upload may take longer than a scheduler waits
                self._ask_for_resume(progress)
                raise Preempted(
                    f"{plan.name}: {stop.reason or 'a signal to another rank'}: {error.message}", error.hint
                ) from error
            except (monitor.Diverged, ranks.RankLost) as error:
                raise self._naming_checkpoint(error) from error

    def _loop(self, progress: RunProgress, hooks: loop.Hooks) -> None:
        assert self.optimizer is not None
        run, mine = self.plan.run, self.batches.part(ranks.rank(), ranks.world())
        loop.train(self.plan.method, self.optimizer, mine, run.optim, run.numerics, self.params.efficiency, progress, hooks)

    def export(self, progress: RunProgress, log: Attempts) -> None:
        """Write encoders, metrics and record, the record last."""
        plan, layout = self.plan, self.layout
        try:
            monitor.check_features(self.encoders, self.batches.at(max(self.total, 1) - 1).view_student)
        except monitor.Diverged as error:
            raise self._naming_checkpoint(error) from error
        path = layout.encoder(plan.name)
        self._save_encoders(path)
        copy_snapshots(self.state / SNAPSHOTS, layout.snapshots(plan.name))
        files.write_atomic(layout.metrics(plan.name), self.rows.read_bytes())
        warning = collapse.warning(progress.curve)
        record = PretrainRecord(
            profile=self.params.profile,
            run=plan.name,
            label=plan.run.label,
            notes=plan.run.notes,
            config=plan.config,
            fingerprint=plan.fingerprint,
            manifest=plan.prepared.identity,
            encoder_sha256=files.sha256_file(path),
            encoders=tuple(self.encoders),
            steps=progress.step,
            curve=tuple(progress.curve),
            sources=tuple(progress.sources),
            attempts=log.so_far("finished"),
            warnings=(*progress.remarks, *([warning] if warning else [])),
            provenance=provenance.describe(progress.seconds),
        )
        write_record(layout.record(plan.name, "pretrain"), record)

    def _save_encoders(self, path: Path, epoch: int | None = None) -> None:
        """Write the current encoders, tensors named `<encoder>.<name>`, with the file's identity in its header."""
        plan, run = self.plan, self.plan.run
        identity = {
            "profile": self.params.profile,
            "run": plan.name,
            "fingerprint": plan.fingerprint,
            "manifest": plan.prepared.identity.sha256,
            "backbone": run.backbone.model_dump(mode="json"),
            "image_size": run.data.image_size,
            "crop_ratio": run.data.crop_ratio,
            "mean": list(run.data.mean),
            "std": list(run.data.std),
            "encoders": list(self.encoders),
            **({} if epoch is None else {"epoch": epoch}),
        }
        tensors = {f"{which}.{key}": value for which, net in self.encoders.items() for key, value in net.state_dict().items()}
        save_tensors(path, "encoder", tensors, identity)

    def _save(self, progress: RunProgress, log: Attempts) -> None:
        assert self.optimizer is not None
        checkpoint.save(self.checkpoint, self.plan.fingerprint, self.plan.method, self.optimizer, progress)
        self.saved = progress.step
        log.note()

    def _lost(self, progress: RunProgress) -> list[dict[str, float]]:
        """Epochs of the checkpoint that the rows lack: a power cut can lose the end of a file that was only appended to."""
        there = {row["epoch"] for row in read_metrics(self.rows)} if self.rows.is_file() else set()
        return [row for row in progress.curve if row["epoch"] not in there]

    def _reporter(self, progress: RunProgress, tracker: RunTracker) -> Callable[[dict[str, float]], None]:
        name, epochs, every = self.plan.name, self.plan.run.optim.epochs, self.params.efficiency.snapshot_every
        watch = monitor.Monitor(self.plan.method, self.batches, progress.step)

        def epoch(row: dict[str, float]) -> None:
            health, at = watch.epoch(progress.step), int(row["epoch"])
            collapsed = collapse.collapsed(row)
            self.display.epoch(row)
            tracker.log({**row, **health, **({"warning": "collapse"} if collapsed else {})})
            if collapsed:
                found = f"embedding std {row[collapse.EMBEDDING_STD]:.2g}, below {collapse.LEAST_EMBEDDING_STD:g}"
                self.say(f"warning: the embeddings collapsed in epoch {at}: {found}")
            if every and at % every == 0 and at < epochs:
                self._save_encoders(self.state / SNAPSHOTS / snapshot_name(at), at)
            if not self.console.is_terminal:
                shown = {collapse.LABELS.get(key, key): value for key, value in row.items() if key not in {"epoch", "lr"}}
                values = ", ".join(f"{key} {value:.4f}" for key, value in shown.items())
                line = f"{name} epoch {at}/{epochs} {values}, {health['images_per_second']:.0f} images/s"
                self.console.print(line, highlight=False, soft_wrap=True)

        return epoch

    def _ask_for_resume(self, progress: RunProgress) -> None:
        """Leave a file `resume-me` for job scripts, since DVC's exit code hides a preemption."""
        command = shlex.join(["isd-repro", "pretrain", self.plan.name, "--params", str(self.layout.file)])
        text = f"run: {self.plan.name}\nstep: {progress.step} of {self.total}\ncommand: {command}\n"
        files.write_atomic(self.state / RESUME_ME, text.encode())

    def _naming_checkpoint(self, error: UserError) -> UserError:
        """The error, saying from where the run can be resumed."""
        last = f"{self.checkpoint}, of step {self.saved}" if self.saved else "none; the run failed before the first was saved"
        return type(error)(f"{error.message}; last good checkpoint: {last}", error.hint)


def copy_snapshots(source: Path, target: Path) -> None:
    """Copy the snapshots of a run, and remove those of an earlier one; an empty folder where there are none."""
    target.mkdir(parents=True, exist_ok=True)
    kept = {path.name: path for path in snapshots_in(source).values()}
    for path in target.iterdir():
        if path.name not in kept:
            path.unlink()
    if source.resolve() != target.resolve():
        for name, path in kept.items():
            files.write_atomic(target / name, path.read_bytes())


def _views(batches: Batches, run: Run) -> tuple[Tensor, str]:
    """The student's and the teacher's views of the first training images, with a caption."""
    batch = batches.at(0)
    rows = [
        contact_sheet.pixels_of(view[:SHOWN], run.data.mean, run.data.std) for view in (batch.view_student, batch.view_teacher)
    ]
    return contact_sheet.sheet(rows), "The first training images as the student (above) and the teacher (below) see them."
