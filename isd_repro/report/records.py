"""Reads a profile's committed records and checks them against each other and against their own predictions.

Each check that fails is a `Fault`, handed to a `Sink`. The report's sink raises at the first; `verify` keeps them all and goes
on with what is left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import (
    CurveRecord,
    EvaluationRecord,
    ExternalRecord,
    ManifestIdentity,
    PretrainRecord,
    Record,
    TargetsRecord,
    mean_per_class,
    read_record,
)
from isd_repro.report import forms, stated
from isd_repro.report.evaluation import RECOMPUTED as RECOMPUTED
from isd_repro.report.evaluation import RECORDED as RECORDED
from isd_repro.report.evaluation import Evaluation, check
from isd_repro.report.faults import AGAIN, Fault, Sink, refuse
from isd_repro.report.faults import Key as Key
from isd_repro.runtime.errors import DataError

Part = str
PARTS: tuple[Part, ...] = ("pretrain", "knn", "linear", "few_label")  # all about one manifest; transfer is about others
Present = dict[Part, PretrainRecord | EvaluationRecord | TargetsRecord]
EXTERNAL = "external.json"


def part_of(metric: str) -> Part:
    """The stage, and the part of a run's record, that a metric belongs to; `transfer` may be followed by a target data set."""
    kinds: dict[str, Part] = {"linear": "linear", "few": "few_label", "transfer": "transfer"}
    return kinds.get(metric.partition("-")[0], "knn")


@dataclass(frozen=True)
class Transfer:
    """A transfer record that has passed every check, and its evaluations by target data set."""

    record: TargetsRecord
    sets: Mapping[str, Evaluation]


@dataclass(frozen=True)
class RunRecords:
    """The parts of one run's record that exist."""

    run: str
    pretrain: PretrainRecord | None = None
    knn: Evaluation | None = None
    linear: Evaluation | None = None
    few_label: Evaluation | None = None
    transfer: Transfer | None = None
    trajectory: CurveRecord | None = None  # as it stands: `trajectory.load` holds it against the others

    @property
    def parts(self) -> dict[Part, PretrainRecord | EvaluationRecord | TargetsRecord]:
        """The records by part, in the order in which they are made."""
        found: dict[Part, PretrainRecord | EvaluationRecord | TargetsRecord] = {}
        found |= {"pretrain": self.pretrain} if self.pretrain else {}
        found |= {part.record.kind: part.record for part in self.own}
        return found | ({"transfer": self.transfer.record} if self.transfer else {})

    @property
    def every(self) -> dict[Part, PretrainRecord | EvaluationRecord | TargetsRecord | CurveRecord]:
        """The parts, and the record of snapshots, which names many encoders."""
        return {**self.parts, **({"trajectory": self.trajectory} if self.trajectory else {})}

    @property
    def own(self) -> list[Evaluation]:
        """Every checked evaluation on the run's own images."""
        return [part for part in (self.knn, self.linear, self.few_label) if part]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Every checked evaluation, those of transfer by target data set."""
        return [*self.own, *(self.transfer.sets.values() if self.transfer else ())]

    @property
    def manifest(self) -> ManifestIdentity | None:
        """The images behind every part; None where nothing was run."""
        return next((record.manifest for record in self.parts.values()), None)

    def evaluation(self, metric: str) -> Evaluation | None:
        """The evaluation on the run's own images that a metric belongs to."""
        return {"knn": self.knn, "linear": self.linear, "few_label": self.few_label}.get(part_of(metric))


@dataclass(frozen=True)
class External:
    """An evaluated checkpoint that no run of the profile made: what is said of the file, and its checked evaluations."""

    record: ExternalRecord
    found: RunRecords
    label: str = ""  # of its row; the record's own, or where another row could have that, followed by the record's name

    @property
    def manifest(self) -> ManifestIdentity:
        """The images behind its evaluations."""
        return self.record.evaluations[0].manifest


@dataclass(frozen=True)
class Records:
    """All records of a profile: one entry per run of the params, in their order."""

    runs: Mapping[str, RunRecords]
    strays: tuple[str, ...]  # record folders whose run is not in the params
    externals: tuple[External, ...] = ()  # record folders with external.json, by name


def load(params: Params, layout: Layout, sink: Sink = refuse) -> Records:
    """Read and verify all records of a profile.

    Raises:
        DataError: a record is damaged, belongs to another run, disagrees with another part or run about encoder, images or
            labels, or states a score that its predictions do not give; unless `sink` takes it.
    """
    runs = {name: _load_run(name, params, layout, sink) for name in params.runs}
    _same_images(runs, params, layout, sink)
    folders = sorted(path.name for path in layout.records.iterdir() if path.is_dir()) if layout.records.is_dir() else []
    others = [name for name in folders if name not in params.runs and not name.startswith(".")]
    files = {name: layout.records / name / EXTERNAL for name in others}
    found = (_load_external(name, path, sink) for name, path in files.items() if path.is_file())
    externals = _told_apart(params, [external for external in found if external])
    strays = tuple(name for name, path in files.items() if not path.is_file())
    return Records(runs=runs, strays=strays, externals=externals)


def _read(path: Path, model: type[Record], run: str, sink: Sink) -> Record | None:
    """One record; None where the file is missing, or is none and the sink takes that. A link to nowhere is not missing."""
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        record = read_record(path, model)
    except DataError as error:
        words = error.message.removeprefix(f"{path}: ")
        sink(Fault(path, "form", words, f"a {model.__name__}", error.hint, (run,), words=error.message))
        return None
    stage, settings = getattr(record, "kind", ""), getattr(record, "settings", None)
    wrong = forms.problem(stage, settings) if settings is not None else ""
    if wrong:
        sink(Fault(path, "settings", wrong, f"settings of `{stage}`", AGAIN, (run,)))
        return None
    return record


def _load_run(name: str, params: Params, layout: Layout, sink: Sink) -> RunRecords:
    paths = {part: layout.record(name, part) for part in PARTS}
    paths["transfer"] = layout.record(name, "transfer")
    pretrain = _read(paths["pretrain"], PretrainRecord, name, sink)
    opened = {part: _read(paths[part], EvaluationRecord, name, sink) for part in PARTS[1:]}
    raw = {part: evaluation for part, evaluation in opened.items() if evaluation}
    transfer = _read(paths["transfer"], TargetsRecord, name, sink)
    trajectory = _read(layout.record(name, "trajectory"), CurveRecord, name, sink)
    present: Present = {**({"pretrain": pretrain} if pretrain else {}), **raw, **({"transfer": transfer} if transfer else {})}
    for part, record in present.items():
        expected = {"kind": part, "profile": params.profile, "run": name, "manifest.subset": params.runs[name].data.subset}
        found = {"kind": record.kind, "profile": record.profile, "run": record.run, "manifest.subset": record.manifest.subset}
        for key, value in expected.items():
            if found[key] != value:
                sink(Fault(paths[part], key, repr(found[key]), repr(value), AGAIN, (name,)))
    first = next(iter(present), None)
    for part, record in present.items():
        for key, ours, theirs in (
            ("encoder_sha256", record.encoder_sha256, present[first].encoder_sha256 if first else ""),
            ("manifest.sha256", record.manifest.sha256, present[first].manifest.sha256 if first else ""),
        ):
            if first and ours != theirs:
                message = f"{paths[first]} and {paths[part]} disagree on {key}: {theirs} and {ours}"
                hint = "the parts come from different runs; run the later stages again"
                sink(Fault(paths[part], key, ours, f"{theirs}, as {paths[first].name} says", hint, (name,), words=message))
    checked = {part: check(record, paths[part], name, sink) for part, record in raw.items()}
    stated.consistent(name, present, paths, sink)
    if trajectory:
        paths["trajectory"] = layout.record(name, "trajectory")
    everything: stated.Every = present | ({"trajectory": trajectory} if trajectory else {})
    stated.plausible(name, everything, paths, sink)
    others = _check_transfer(transfer, paths["transfer"], sink) if transfer else None
    knn, linear, few = checked.get("knn"), checked.get("linear"), checked.get("few_label")
    return RunRecords(name, pretrain, knn, linear, few, others, trajectory)


def _load_external(name: str, path: Path, sink: Sink) -> External | None:
    """A record that `evaluate --out` wrote; checked like a run's, and against what it says of its own file."""
    record = _read(path, ExternalRecord, name, sink)
    if record is None:
        return None
    kinds = [evaluation.kind for evaluation in record.evaluations]
    facts = [("name", record.name, name), ("evaluations", len(kinds), len(set(kinds)))]
    for part in record.evaluations:
        facts += [(f"{part.kind}.run", part.run, name), (f"{part.kind}.encoder_sha256", part.encoder_sha256, record.sha256)]
        facts += [(f"{part.kind}.manifest.sha256", part.manifest.sha256, record.evaluations[0].manifest.sha256)]
    for key, found, expected in facts:
        if found != expected:
            sink(Fault(path, key, repr(found), repr(expected), "run `evaluate` again", (name,)))
    checked = {part.kind: check(part, path, name, sink) for part in record.evaluations}
    return External(record, RunRecords(name, None, checked.get("knn"), checked.get("linear")))


def _told_apart(params: Params, externals: Sequence[External]) -> tuple[External, ...]:
    """Rows of evaluated checkpoints under labels that no run, no mean over seeds and no other checkpoint has."""

    def plain(label: str) -> str:
        return " ".join(label.split()).casefold()

    taken = Counter([plain(run.label) for run in params.runs.values()] + [plain(one.record.label) for one in externals])
    found = []
    for one in externals:
        label, name = one.record.label, one.record.name
        alike = taken[plain(label)] > 1 or re.search(r"\(checkpoint |, \d+ seeds", label)
        found.append(replace(one, label=f"{label} (checkpoint {name})" if alike else label))
    return tuple(found)


def _same_images(runs: Mapping[str, RunRecords], params: Params, layout: Layout, sink: Sink) -> None:
    """Rows of one table must answer the same queries over the same images, under the same settings."""
    seen: dict[str, tuple[Path, ManifestIdentity]] = {}
    labels: dict[str, tuple[Path, Tensor]] = {}
    settings: dict[Part, tuple[Path, dict[str, Any]]] = {}
    for name, found in runs.items():
        subset = params.runs[name].data.subset
        for part, record in found.parts.items():
            path = layout.record(name, part)
            other, manifest = seen.setdefault(subset, (path, record.manifest))
            ours, theirs = record.manifest.sha256, manifest.sha256
            if theirs != ours:
                message = f"{other} and {path} disagree on manifest.sha256: {theirs} and {ours}"
                hint = f"runs of subset {subset!r} saw different images; run the older ones again"
                sink(Fault(path, "manifest.sha256", ours, f"{theirs}, as {other} says", hint, (name,), words=message))
            if not isinstance(record, PretrainRecord):
                said = {key: value for key, value in record.settings.items() if key != "best_epoch"}
                said["protocol"] = [said.get("protocol"), record.protocol]
                other, before = settings.setdefault(part, (path, said))
                if said != before:
                    message = f"{other} and {path} were made with different settings"
                    hint = f"run `{part}` again for the older"
                    sink(Fault(path, "settings", f"{said}", f"{before}, as {other} says", hint, (name,), words=message))
            evaluation = {"knn": found.knn, "linear": found.linear, "few_label": found.few_label}.get(part)
            if evaluation is not None:
                other, label = labels.setdefault(subset, (path, evaluation.label))
                if not label.equal(evaluation.label):
                    message = f"{other} and {path} hold different query labels for one manifest"
                    sink(Fault(path, "labels", "other labels", f"those of {other}", AGAIN, (name,), words=message))
    _same_targets(runs, layout, sink)


def _same_targets(runs: Mapping[str, RunRecords], layout: Layout, sink: Sink) -> None:
    """A column of the transfer table is about one division of one data set."""
    seen: dict[str, tuple[Path, Evaluation]] = {}
    for name, found in runs.items():
        for key, one in (found.transfer.sets if found.transfer else {}).items():
            path = layout.record(name, "transfer")
            other, first = seen.setdefault(key, (path, one))
            if first.record.manifest != one.record.manifest or not first.label.equal(one.label):
                hint = "the images or their division changed; run `transfer` again for the older"
                message = f"{other} and {path} disagree on the images of {key}"
                sink(Fault(path, f"{key}: manifest", "other images", f"those of {other}", hint, (name,), words=message))


def _of_set(key: str, sink: Sink, fault: Fault) -> None:
    """A fault of one target data set: it is that set's number which it makes worthless."""
    score = (fault.score[0], f"{fault.score[1]}-{key}", fault.score[2]) if fault.score else None
    sink(replace(fault, key=f"{key}: {fault.key}", score=score))


def _check_transfer(record: TargetsRecord, path: Path, sink: Sink) -> Transfer:
    """Recompute both numbers of every target set, and hold each evaluation against its record."""
    keys = [part.manifest.subset for part in record.evaluations]
    facts: list[tuple[str, object, object]] = [("sets", keys, record.settings.get("sets"))]
    checked: dict[str, Evaluation] = {}
    for key, part in zip(keys, record.evaluations, strict=True):
        facts += [(f"{key}: run", part.run, record.run), (f"{key}: profile", part.profile, record.profile)]
        facts += [(f"{key}: encoder_sha256", part.encoder_sha256, record.encoder_sha256)]
        one = check(part, path, record.run, partial(_of_set, key, sink))
        if one is None:
            continue
        checked[key] = one
        means = {name: mean_per_class(found, one.label) for name, found in one.predictions.items()}
        given = part.mean_per_class
        if given.keys() != means.keys() or any(abs(means[name] - given[name]) > 1e-9 for name in means):
            message = f"{path}: {key}: mean_per_class is {given}, its predictions give {means}"
            where = f"{means}, from its predictions"
            sink(Fault(path, f"{key}: mean_per_class", f"{given}", where, AGAIN, (record.run,), words=message))
    for fact, found, expected in facts:
        if found != expected:
            sink(Fault(path, fact, repr(found), repr(expected), AGAIN, (record.run,)))
    return Transfer(record, checked)
