"""Stage `pretrain`: a prepared subset and a run's parameters in, encoders and a record out.

Resume state lives in `.state/<fingerprint>/` until the outputs are written, because DVC deletes outputs before a stage
starts. The fingerprint covers every value that changes the result, so a changed temperature starts afresh.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import nn

from isd_repro import artifacts, methods
from isd_repro.artifacts import ManifestIdentity, PretrainRecord
from isd_repro.config import Layout, find_run, fingerprint, naming
from isd_repro.data.loader import Batches
from isd_repro.data.prepared import Prepared, open_prepared
from isd_repro.errors import ConfigError
from isd_repro.nn import backbones
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.params import Params, Run
from isd_repro.protocols import Setting
from isd_repro.tracking import open_tracker, truncate_metrics
from isd_repro.train import checkpoint, guard, loop
from isd_repro.train.checkpoint import Progress


@dataclass(frozen=True)
class Plan:
    """A run with everything resolved: what the fingerprint covers, and the module it trains."""

    name: str
    run: Run
    config: dict[str, Any]  # the result-affecting groups, defaults included
    fingerprint: str
    method: nn.Module
    device: torch.device


def pretrain(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Train one run to its end, resuming where an earlier process stopped, and write its outputs.

    Raises:
        ConfigError: the run, its method or a size is wrong.
        DataError: the prepared subset is missing or damaged.
        Preempted: a signal asked to stop; the state is saved.
    """
    artifacts.remember_code()
    run = find_run(params, name)
    prepared = open_prepared(layout.prepared(run.data.subset))
    plan = make_plan(name, run, prepared, layout)
    with naming(layout.file, name):
        batches = Batches(prepared.store, prepared.split("train"), run.data, run.optim.batch_size, run.numerics.seed, plan.device)
    state = layout.state(plan.fingerprint)
    with guard.exclusive(state), guard.stop_on_signal() as stop:
        progress = _train(plan, batches, params, layout, state, stop, console)
        _export(plan, prepared.identity, progress, params, layout, state)
        shutil.rmtree(state)
    console.print(f"{name}: {progress.step} steps in {progress.seconds:.0f} s -> {layout.encoder(name)}", highlight=False)


def make_plan(name: str, run: Run, prepared: Prepared, layout: Layout) -> Plan:
    """Check a run against its method and data, and build its module from its seed."""
    method_config = methods.config_of(name, run.method, layout.file)
    with naming(layout.file, name):
        _check_sizes(run)
    identity = prepared.identity
    config = {
        "backbone": run.backbone.model_dump(mode="json"),
        "method": {"name": run.method.name, **method_config.model_dump(mode="json")},
        "optim": run.optim.model_dump(mode="json"),
        "data": run.data.model_dump(mode="json", exclude={"subset"}),
        "numerics": run.numerics.model_dump(mode="json"),
        "manifest": identity.sha256,
        "store": prepared.store.info.settings.model_dump(mode="json"),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with naming(layout.file, name), torch.random.fork_rng():
        torch.manual_seed(run.numerics.seed)
        setting = Setting(classes=len(identity.classes), batch_size=run.optim.batch_size)
        method: nn.Module = methods.load(run.method.name).Method(
            method_config, lambda: backbones.build(run.backbone, run.data.image_size), setting
        )
    set_bn_groups(method, run.numerics.bn_groups)
    # channels_last: 1.3x on one CPU core and the layout that tensor cores want; layout only, the same parameters
    method = method.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Plan(name, run, config, fingerprint(config), method, device)


def _check_sizes(run: Run) -> None:
    batch, groups = run.optim.batch_size, run.numerics.bn_groups
    if batch % groups or batch // groups < 2:
        raise ConfigError(
            f"numerics.bn_groups: {groups} groups of a batch of {batch}; each needs equally many images, two or more",
            "choose optim.batch_size as a multiple of bn_groups, at least twice as large",
        )
    if not len(run.data.mean) == len(run.data.std) == run.backbone.channels:
        raise ConfigError(
            f"data: {len(run.data.mean)} means, {len(run.data.std)} deviations, {run.backbone.channels} channels",
            "give one mean and one std per channel",
        )
    if run.backbone.arch == "pixels" and run.optim.epochs:
        raise ConfigError("optim.epochs: a backbone without weights cannot be trained", "use 0 with backbone.arch pixels")
    if run.numerics.precision == "bf16" and not torch.cuda.is_available():
        raise ConfigError("numerics.precision: bf16 needs a CUDA device and there is none", "use float32 here")


def _train(
    plan: Plan, batches: Batches, params: Params, layout: Layout, state: Path, stop: guard.StopRequest, console: Console
) -> Progress:
    run = plan.run
    if run.optim.epochs == 0:
        (state / "metrics.jsonl").touch()
        return Progress(sources=[artifacts.source_hash()])
    optimizer = loop.optimizer_of(plan.method, run.optim)
    resume = state / "checkpoint.pt"
    progress = checkpoint.load(resume, plan.fingerprint, plan.method, optimizer, plan.device)
    if progress.step:
        console.print(f"{plan.name}: resuming after step {progress.step}", highlight=False)
    if artifacts.source_hash() not in progress.sources:
        progress.sources.append(artifacts.source_hash())
    rows = state / "metrics.jsonl"
    if rows.exists():
        truncate_metrics(rows, lambda row: row["epoch"] <= len(progress.curve))

    total = run.optim.epochs * batches.steps_per_epoch
    names = {"run_id": f"{params.profile}-{plan.name}-pretrain", "group": f"{params.profile}-{plan.name}", "job_type": "pretrain"}
    bar = Bar(console=console, disable=not console.is_terminal)
    with bar, open_tracker(rows, tracking=params.tracking, layout_root=layout.root, config=plan.config, **names) as tracker:
        task = bar.add_task(plan.name, total=total, completed=progress.step)
        began, first = time.monotonic(), progress.step

        def epoch(row: dict[str, float]) -> None:
            speed = (progress.step - first) * run.optim.batch_size / max(time.monotonic() - began, 1e-9)
            tracker.log({**row, "images_per_second": round(speed, 1)})
            if not console.is_terminal:
                values = " ".join(f"{key} {value:.4f}" for key, value in row.items() if key not in {"epoch", "lr"})
                line = f"{plan.name} epoch {int(row['epoch'])}/{run.optim.epochs} {values} {speed:.0f} images/s"
                console.print(line, highlight=False, soft_wrap=True)

        hooks = loop.Hooks(
            save=lambda now: checkpoint.save(resume, plan.fingerprint, plan.method, optimizer, now),
            epoch=epoch,
            tick=lambda step, loss: bar.update(task, completed=step, description=f"{plan.name} loss {loss:.3f}"),
            stopped=stop,
        )
        loop.train(plan.method, optimizer, batches, run.optim, run.numerics, params.efficiency, progress, hooks)
    return progress


def _export(plan: Plan, manifest: ManifestIdentity, progress: Progress, params: Params, layout: Layout, state: Path) -> None:
    run = plan.run
    encoders: dict[str, nn.Module] = dict(plan.method.encoders)  # type: ignore[arg-type]
    identity = {
        "profile": params.profile,
        "run": plan.name,
        "fingerprint": plan.fingerprint,
        "manifest": manifest.sha256,
        "backbone": run.backbone.model_dump(mode="json"),
        "image_size": run.data.image_size,
        "crop_ratio": run.data.crop_ratio,
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "encoders": list(encoders),
    }
    tensors = {f"{which}.{key}": value for which, encoder in encoders.items() for key, value in encoder.state_dict().items()}
    path = layout.encoder(plan.name)
    artifacts.save_tensors(path, "encoder", tensors, identity)
    artifacts.write_atomic(layout.metrics(plan.name), (state / "metrics.jsonl").read_bytes())
    record = PretrainRecord(
        profile=params.profile,
        run=plan.name,
        label=run.label,
        notes=run.notes,
        config=plan.config,
        fingerprint=plan.fingerprint,
        manifest=manifest,
        encoder_sha256=artifacts.sha256_file(path),
        encoders=tuple(encoders),
        steps=progress.step,
        curve=tuple(progress.curve),
        sources=tuple(progress.sources),
        provenance=artifacts.provenance(progress.seconds),
    )
    artifacts.write_record(layout.record(plan.name, "pretrain"), record)
