"""Command `verify`: from every number of a rendered report to its record, and on to the files that are here."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from isd_repro import artifacts, methods
from isd_repro.artifacts import EvaluationRecord, sha256_file, unpack_labels
from isd_repro.config import Layout, find_run
from isd_repro.data import images, prepared
from isd_repro.data.images import Frame, StoreReader
from isd_repro.data.packing import rule_of
from isd_repro.data.prepared import Prepared
from isd_repro.errors import ConfigError, DataError
from isd_repro.evals import replay
from isd_repro.evals.arithmetic import best_device
from isd_repro.evals.encoders import EncoderIdentity, load_encoders
from isd_repro.evals.extract import load_features
from isd_repro.evals.heads import duration, pace
from isd_repro.evals.progress import Progress
from isd_repro.evals.replay import Replay
from isd_repro.params import Linear, Params
from isd_repro.report import account, cards, declared, page, rendered, trajectory, verdicts
from isd_repro.report.account import Account
from isd_repro.report.evaluation import Evaluation
from isd_repro.report.faults import Fault
from isd_repro.report.records import Records, RunRecords, load
from isd_repro.report.rendered import Place

_BACK = "bring the run's own file back with `dvc checkout`; or run {} and what follows it again"


@dataclass(frozen=True)
class Asked:
    """Options; `runs` empty means all of them."""

    runs: tuple[str, ...] = ()
    quick: bool = False
    linear: bool = False
    as_json: bool = False


@dataclass
class _Walk:
    """What has been found so far."""

    params: Params
    layout: Layout
    asked: Asked
    progress: Progress
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replayed: set[tuple[str, str, str]] = field(default_factory=set)
    subsets: dict[str, Prepared | None] = field(default_factory=dict)

    def fault(self, file: Path, key: str, found: object, expected: object, hint: str, *runs: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(file, key, str(found), str(expected), hint, runs))

    def shown(self, path: Path) -> str:
        """A path as a reader of this profile is told it."""
        root = self.layout.root
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def verify(params: Params, layout: Layout, asked: Asked, console: Console) -> None:
    """Print a verdict for every number; tables or JSON on standard output, progress on `console`.

    Raises:
        ConfigError: no such run, or a method's parameters are wrong.
        DataError: after the account, where anything failed.
        UserError: a package of the extra `report` is missing.
    """
    started = time.monotonic()
    for name in asked.runs:
        find_run(params, name)
    walk = _Walk(params, layout, asked, Progress(console))
    records = load(params, layout, walk.faults.append)
    planned = declared.Planned(
        methods={name: _method(name, params, layout) for name in params.runs},
        rules={name: rule_of(subset) for name, subset in params.subsets.items()},
    )
    walk.faults += declared.parameters(params, records, layout, planned)
    walk.faults += [*declared.copies(records, layout), *declared.locked(records, layout)]
    if not asked.quick:
        for name in asked.runs or params.runs:
            _files(walk, name, records.runs[name])
    numbers = _rendered(walk, records)
    found = Account(params.profile, layout.root, numbers, walk.faults, walk.notes, time.monotonic() - started)
    if asked.as_json:
        sys.stdout.write(json.dumps(account.as_json(found), indent=1, sort_keys=True, allow_nan=False) + "\n")
    else:
        account.show(found, Console(file=sys.stdout, highlight=False))
    if found.faults:
        raise DataError(f"{found.failed}, named above", "docs/verify.md says what each step compares")


def _method(name: str, params: Params, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's `method` block with every default, and without."""
    named, config = {"name": params.runs[name].method.name}, methods.config_of(name, params.runs[name].method, layout.file)
    return {**named, **config.model_dump(mode="json")}, {**named, **config.model_dump(mode="json", exclude_defaults=True)}


# --- the rendered report ------------------------------------------------------------------------------------------------


def _rendered(walk: _Walk, records: Records) -> list[verdicts.Number]:
    """Compare the report with a fresh one, and judge its numbers."""
    layout, damaged = walk.layout, {run for fault in walk.faults for run in fault.runs}
    report = page.assemble(walk.params, records, layout, walk.faults.append)
    files = page.render(report)
    fresh = rendered.cells_of(files[rendered.CELLS]) or {}
    path = layout.report / rendered.CELLS
    disk = rendered.cells_of(path.read_bytes()) if path.is_file() else None
    cells: dict[Place, Fault] = {}
    if not layout.report.is_dir():
        walk.notes.append(f"no report in {walk.shown(layout.report)} yet: the numbers are those that `report` would render")
    else:
        if disk is not None:
            for place, fault in rendered.cell_faults(path, disk, fresh, rendered.cause(layout.report, files, path.name), damaged):
                cells.setdefault(place, fault)
                walk.faults.append(fault)
        if damaged:
            walk.notes.append("other rendered files were not compared: the faults of records and parameters come first")
        else:
            seen = {rendered.CELLS} if cells else set()
            walk.faults += [fault for fault in rendered.compare(layout.report, files) if fault.file.name not in seen]
            walk.faults += (
                rendered.compare(layout.cards, cards.render(walk.params, records, layout)) if layout.cards.is_dir() else []
            )
    shown = {**(disk or {}), **{place: cell for place, cell in fresh.items() if cell["value"] is not None or not disk}}
    evidence = verdicts.Evidence(records, walk.faults, frozenset(walk.replayed), cells)
    runs, kept = walk.params.runs, trajectory.read(walk.params, layout, lambda fault: None)  # faults were told by the page
    snapshots = verdicts.judge_snapshots(
        kept, evidence, walk.asked.runs, lambda run: (f"trajectory-{runs[run].data.subset}", runs[run].label)
    )
    return [*verdicts.judge(shown, evidence, walk.asked.runs), *snapshots]


# --- the files of one run -----------------------------------------------------------------------------------------------


def _files(walk: _Walk, name: str, found: RunRecords) -> None:
    """Images, encoder and features of a run, as far as they are here."""
    parts = found.parts
    if not parts:
        return
    opened = _images(walk, name, found)
    path, (first, record) = walk.layout.encoder(name), next(iter(parts.items()))
    expected = record.encoder_sha256
    if not path.is_file():
        walk.notes.append(f"{name}: no encoder here ({walk.shown(path)}), so its numbers are not re-evaluated")
        return
    sha256 = sha256_file(path)
    if sha256 != expected:
        said = f"{expected}, as {name}/{first}.json says"
        walk.fault(path, "sha256 of the file", sha256, said, _BACK.format("`pretrain`"), name)
        return
    _features_file(walk, name, found, sha256)
    try:
        encoders, identity = load_encoders(path)
        header = artifacts.load_tensors(path, "encoder")[1]
    except DataError as error:
        walk.fault(path, "tensors", error.message.removeprefix(f"{path}: "), "an encoder", error.hint, name)
        return
    if _header(walk, name, found, header) and opened is not None:
        _replay(walk, name, found, encoders, identity, opened)


def _images(walk: _Walk, name: str, found: RunRecords) -> Prepared | None:
    """The prepared subset of a run where it is here and is what the records say."""
    subset = walk.params.runs[name].data.subset
    folder = walk.layout.prepared(subset)
    if subset not in walk.subsets:
        walk.subsets[subset] = None
        if not (folder / "manifest.json").is_file():
            walk.notes.append(f"subset {subset}: no prepared images here ({walk.shown(folder)}), so its manifest is not read")
            return None
        try:
            walk.subsets[subset] = prepared.open_prepared(folder)
        except DataError as error:
            said = error.message.removeprefix(f"{folder / 'manifest.json'}: ")
            runs = [run for run, config in walk.params.runs.items() if config.data.subset == subset]
            walk.fault(folder, "prepared images", said, "those that `prepare` wrote", error.hint, *runs)
    here = walk.subsets[subset]
    if here is None or found.manifest is None:
        return None
    if here.identity != found.manifest:
        ours, theirs = here.identity.model_dump(mode="json"), found.manifest.model_dump(mode="json")
        key = next(key for key in ("sha256", *ours) if ours[key] != theirs[key])
        said = f"{theirs[key]}, as the records of {name} say"
        hint = "these are other images than the run saw: run `prepare` again with the run's parameters, or `dvc checkout`"
        walk.fault(folder / "manifest.json", f"identity.{key}", ours[key], said, hint, name)
        return None
    wrong = [part for part in found.own if not _labels(walk, name, part, here.split("query").label)]
    return None if wrong else here


def _labels(walk: _Walk, name: str, evaluation: Evaluation, label: torch.Tensor) -> bool:
    """Whether a record's labels are those of the images."""
    if evaluation.label.equal(label):
        return True
    at, classes = int((evaluation.label != label).nonzero()[0]), evaluation.record.manifest.classes
    said, truth = classes[int(evaluation.label[at])], f"{classes[int(label[at])]}, as the manifest's images say"
    path = walk.layout.record(name, evaluation.record.kind)
    walk.fault(path, f"labels[{at}]", said, truth, "restore the record from git, or run its stage again", name)
    return False


def _features_file(walk: _Walk, name: str, found: RunRecords, sha256: str) -> None:
    """The stored features, where they are here: of this encoder, and those that the evaluations used."""
    path = walk.layout.features(name)
    if not path.is_file():
        return
    hint = _BACK.format("`extract`")
    try:
        load_features(path, sha256)
    except DataError as error:
        said = error.message.removeprefix(f"{path}: ")
        walk.fault(path, "encoder_sha256", said, f"features of encoder {sha256[:12]}", hint, name)
        return
    evaluations = [part for part in found.parts.values() if isinstance(part, EvaluationRecord) and part.features_sha256]
    here = sha256_file(path) if evaluations else ""
    for record in evaluations:
        if record.features_sha256 != here:
            said = f"{record.features_sha256}, as {name}/{record.kind}.json says"
            walk.fault(path, "sha256 of the file", here, said, hint, name)
            return


def _header(walk: _Walk, name: str, found: RunRecords, header: dict[str, Any]) -> bool:
    """What the encoder file says of itself against its run's records."""
    manifest = found.manifest.sha256 if found.manifest else ""
    expected: dict[str, Any] = {"run": name, "profile": walk.params.profile, "manifest": manifest}
    if found.pretrain is not None:
        expected |= {"fingerprint": found.pretrain.fingerprint, "encoders": list(found.pretrain.encoders)}
    wrong = [key for key, value in expected.items() if header.get(key) != value]
    for key in wrong:
        said = f"{expected[key]}, as the records of {name} say"
        walk.fault(walk.layout.encoder(name), key, header.get(key), said, _BACK.format("`pretrain`"), name)
    return not wrong


# --- evaluated anew -----------------------------------------------------------------------------------------------------


def _replay(
    walk: _Walk, name: str, found: RunRecords, encoders: dict[str, nn.Module], identity: EncoderIdentity, opened: Prepared
) -> None:
    """Features and nearest neighbours anew, the linear heads where they are asked for, each prediction compared."""
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    device, reader = best_device(), StoreReader(opened.store)
    splits = {"search": opened.split("search"), "query": opened.split("query")}
    views = {which: (images.centred(reader, split.index, frame, device), len(split)) for which, split in splits.items()}
    ks = tuple(found.knn.record.settings["k"]) if found.knn else (1,)
    try:
        with walk.progress.task(f"{name}: features") as bar:
            bar.begin(sum(len(split) for split in splits.values()))
            again = replay.neighbours(encoders, views, splits["search"].label, ks, device, bar.advance)
    except (ConfigError, DataError) as error:
        walk.fault(walk.layout.encoder(name), "features", error.message, "features that can be searched", error.hint, name)
        return
    _note_features(walk, name, again, found)
    if found.knn is not None:
        _compare(walk, name, found.knn.record, again.predictions)
    if found.linear is not None and walk.asked.linear:
        record = found.linear.record
        settings = Linear.model_validate({key: value for key, value in record.settings.items() if key != "best_epoch"})
        batches = images.augmented(reader, splits["search"], frame, settings, device)
        count = settings.epochs * len(splits["search"])
        expected = pace(encoders, batches, device) * count
        walk.progress.say(f"{name}: linear again, {settings.epochs} epochs, about {duration(expected)}")
        with walk.progress.task(f"{name}: linear epochs") as bar:
            bar.begin(settings.epochs)
            classes, label = len(opened.identity.classes), splits["query"].label
            heads = replay.heads(encoders, again, label, classes, batches, settings, device, lambda row: bar.advance())
            _compare(walk, name, record, heads)
    elif found.linear is not None:
        walk.notes.append(f"{name}: linear heads were not trained again; --linear does it")
    others = [words for words, part in (("few labels", found.few_label), ("transfer", found.transfer)) if part]
    if others:
        walk.notes.append(f"{name}: {' and '.join(others)} were not done again: the numbers are recomputed from predictions")


def _note_features(walk: _Walk, name: str, again: Replay, found: RunRecords) -> None:
    path = walk.layout.features(name)
    if path.is_file():
        try:
            stored = load_features(path, next(iter(found.parts.values())).encoder_sha256)
        except DataError:
            return  # named before
        far = replay.farthest(again, stored)
        if far is None or far > 0:
            what = "have another form" if far is None else f"differ by {far:.2g} at most"
            walk.notes.append(f"{name}: features computed here {what} from {walk.shown(path)}")


def _compare(walk: _Walk, name: str, record: EvaluationRecord, again: dict[str, torch.Tensor]) -> None:
    """Every stored prediction against the encoder's; a difference that another arithmetic explains leaves the verdict alone."""
    path, classes = walk.layout.record(name, record.kind), record.manifest.classes
    here = artifacts.provenance(0.0)
    same = replay.same_arithmetic(here.machine, here.versions, record.provenance)
    for key, packed in sorted(record.predictions.items()):
        stored, now = unpack_labels(packed), again.get(key)
        encoder, metric = key.split("/")
        if now is None:
            walk.fault(path, f"predictions[{key!r}]", "predictions", f"none: the encoder file has no {key}", "restore it", name)
        elif stored.equal(now):
            walk.replayed.add((name, encoder, metric))
        elif len(stored) == len(now):
            other = (stored != now).nonzero()[:, 0]
            at, share = int(other[0]), len(other) / len(now)
            said = f"{len(other)} of {len(now)} predictions differ"
            if not same and share <= replay.TOLERATED:
                walk.notes.append(f"{name}: {said} in {key}; this machine or torch is not the record's, so it stays recomputed")
                continue
            truth = f"{classes[int(now[at])]}, as the encoder here answers ({said})"
            hint = "restore the record from git, or run its stage again"
            walk.fault(path, f"predictions[{key!r}][{at}]", classes[int(stored[at])], truth, hint, name)
