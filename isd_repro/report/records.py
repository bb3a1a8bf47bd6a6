"""Reads a profile's committed records and checks them against each other and against their own predictions."""

from __future__ import annotations

import binascii
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from isd_repro.artifacts import (
    EvaluationRecord,
    ExternalRecord,
    ManifestIdentity,
    PretrainRecord,
    Score,
    read_record,
    unpack_labels,
)
from isd_repro.config import Layout, fingerprint
from isd_repro.errors import DataError
from isd_repro.params import Params

Part = Literal["pretrain", "knn", "linear"]
PARTS: tuple[Part, ...] = ("pretrain", "knn", "linear")
Key = tuple[str, str, str]  # encoder, metric, group
RECOMPUTED = "recomputed from stored predictions"
RECORDED = "recorded only"
EXTERNAL = "external.json"
_AGAIN = "run its stage again; if it was edited by hand, restore it from git"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation record that has passed every check.

    Attributes:
        record: what the file says.
        scores: each score by (encoder, metric, group).
        levels: how far each score was verified, by the same key.
        label: class of every query, int64, N.
        predictions: predicted class of every query by "<encoder>/<metric>", int64, N.
        masks: queries of each group, bool, N.
    """

    record: EvaluationRecord
    scores: Mapping[Key, Score]
    levels: Mapping[Key, str]
    label: Tensor
    predictions: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]

    def hits(self, encoder: str, metric: str, group: str) -> Tensor | None:
        """Whether each query of a group was answered rightly, bool; None without stored predictions."""
        predicted = self.predictions.get(f"{encoder}/{metric}")
        return None if predicted is None or group not in self.masks else (predicted == self.label)[self.masks[group]]


@dataclass(frozen=True)
class RunRecords:
    """The parts of one run's record that exist."""

    run: str
    pretrain: PretrainRecord | None = None
    knn: Evaluation | None = None
    linear: Evaluation | None = None

    @property
    def parts(self) -> dict[str, PretrainRecord | EvaluationRecord]:
        """The records by part, in the order in which they are made."""
        found: dict[str, PretrainRecord | EvaluationRecord] = {"pretrain": self.pretrain} if self.pretrain else {}
        return found | {part.record.kind: part.record for part in (self.knn, self.linear) if part}

    @property
    def manifest(self) -> ManifestIdentity | None:
        """The images behind every part; None where nothing was run."""
        return next((record.manifest for record in self.parts.values()), None)

    def evaluation(self, metric: str) -> Evaluation | None:
        """The evaluation that a metric belongs to."""
        return self.linear if metric.startswith("linear") else self.knn


@dataclass(frozen=True)
class External:
    """An evaluated checkpoint that no run of the profile made: what is said of the file, and its checked evaluations."""

    record: ExternalRecord
    found: RunRecords

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


def load(params: Params, layout: Layout) -> Records:
    """Read and verify all records of a profile.

    Raises:
        DataError: a record is damaged, belongs to another run, disagrees with another part or run about encoder, images or
            labels, or states a score that its predictions do not give.
    """
    runs = {name: _load_run(name, params, layout) for name in params.runs}
    _same_images(runs, params, layout)
    folders = sorted(path.name for path in layout.records.iterdir() if path.is_dir()) if layout.records.is_dir() else []
    others = [name for name in folders if name not in params.runs and not name.startswith(".")]
    files = {name: layout.records / name / EXTERNAL for name in others}
    externals = tuple(_load_external(name, path) for name, path in files.items() if path.is_file())
    strays = tuple(name for name, path in files.items() if not path.is_file())
    return Records(runs=runs, strays=strays, externals=externals)


def _load_run(name: str, params: Params, layout: Layout) -> RunRecords:
    paths = {part: layout.record(name, part) for part in PARTS}
    pretrain = read_record(paths["pretrain"], PretrainRecord) if paths["pretrain"].is_file() else None
    raw = {part: read_record(paths[part], EvaluationRecord) for part in PARTS[1:] if paths[part].is_file()}
    present: dict[Part, PretrainRecord | EvaluationRecord] = {**({"pretrain": pretrain} if pretrain else {}), **raw}
    for part, record in present.items():
        expected = {"kind": part, "profile": params.profile, "run": name, "manifest.subset": params.runs[name].data.subset}
        found = {"kind": record.kind, "profile": record.profile, "run": record.run, "manifest.subset": record.manifest.subset}
        for key, value in expected.items():
            if found[key] != value:
                raise DataError(f"{paths[part]}: {key} is {found[key]!r}, expected {value!r}", _AGAIN)
    first = next(iter(present), None)
    for part, record in present.items():
        for key, ours, theirs in (
            ("encoder_sha256", record.encoder_sha256, present[first].encoder_sha256 if first else ""),
            ("manifest.sha256", record.manifest.sha256, present[first].manifest.sha256 if first else ""),
        ):
            if first and ours != theirs:
                message = f"{paths[first]} and {paths[part]} disagree on {key}: {theirs} and {ours}"
                raise DataError(message, "the parts come from different runs; run the later stages again")
    checked = {part: _check(record, paths[part]) for part, record in raw.items()}
    _consistent(present, paths)
    return RunRecords(name, pretrain, checked.get("knn"), checked.get("linear"))


def _consistent(present: Mapping[Part, PretrainRecord | EvaluationRecord], paths: Mapping[Part, Path]) -> None:
    """What one part says twice, or two parts both say, must be the same."""
    first = next(iter(present), None)
    for part, record in present.items():
        if first and record.manifest != present[first].manifest:
            raise DataError(f"{paths[first]} and {paths[part]} disagree on what the manifest holds", _AGAIN)
        if isinstance(record, PretrainRecord):
            if fingerprint(record.config) != record.fingerprint:
                found = fingerprint(record.config)
                raise DataError(f"{paths[part]}: fingerprint is {record.fingerprint}, its config gives {found}", _AGAIN)
            epochs = record.config["optim"]["epochs"]
            if len(record.curve) != epochs:
                raise DataError(f"{paths[part]}: the curve has {len(record.curve)} epochs, its config {epochs}", _AGAIN)
    features = {part: record.features_sha256 for part, record in present.items() if isinstance(record, EvaluationRecord)}
    if len(set(features.values())) > 1:
        files = " and ".join(str(paths[part]) for part in features)
        raise DataError(f"{files} disagree on features_sha256", "run `knn` and `linear` again on the same features")


def _load_external(name: str, path: Path) -> External:
    """A record that `evaluate --out` wrote; checked like a run's, and against what it says of its own file."""
    record = read_record(path, ExternalRecord)
    kinds = [evaluation.kind for evaluation in record.evaluations]
    facts = [("name", record.name, name), ("evaluations", len(kinds), len(set(kinds)))]
    for part in record.evaluations:
        facts += [(f"{part.kind}.run", part.run, name), (f"{part.kind}.encoder_sha256", part.encoder_sha256, record.sha256)]
        facts += [(f"{part.kind}.manifest.sha256", part.manifest.sha256, record.evaluations[0].manifest.sha256)]
    for key, found, expected in facts:
        if found != expected:
            raise DataError(f"{path}: {key} is {found!r}, expected {expected!r}", "run `evaluate` again")
    checked = {part.kind: _check(part, path) for part in record.evaluations}
    return External(record, RunRecords(name, None, checked.get("knn"), checked.get("linear")))


def _same_images(runs: Mapping[str, RunRecords], params: Params, layout: Layout) -> None:
    """Rows of one table must answer the same queries over the same images, under the same settings."""
    seen: dict[str, tuple[Path, ManifestIdentity]] = {}
    labels: dict[str, tuple[Path, Tensor]] = {}
    settings: dict[Part, tuple[Path, dict[str, Any]]] = {}
    for name, found in runs.items():
        subset = params.runs[name].data.subset
        for part in PARTS:
            record = found.parts.get(part)
            if record is None:
                continue
            path = layout.record(name, part)
            other, manifest = seen.setdefault(subset, (path, record.manifest))
            if manifest.sha256 != record.manifest.sha256:
                message = f"{other} and {path} disagree on manifest.sha256: {manifest.sha256} and {record.manifest.sha256}"
                raise DataError(message, f"runs of subset {subset!r} saw different images; run the older ones again")
            if isinstance(record, EvaluationRecord):
                stated = {key: value for key, value in record.settings.items() if key != "best_epoch"}
                other, before = settings.setdefault(part, (path, stated))
                if stated != before:
                    raise DataError(f"{other} and {path} were made with different settings", f"run `{part}` again for the older")
            evaluation = {"knn": found.knn, "linear": found.linear}.get(part)
            if evaluation is not None:
                other, label = labels.setdefault(subset, (path, evaluation.label))
                if not label.equal(evaluation.label):
                    raise DataError(f"{other} and {path} hold different query labels for one manifest", _AGAIN)


def _check(record: EvaluationRecord, path: Path) -> Evaluation:
    """Recompute every score that has predictions."""
    manifest = record.manifest
    unknown = sorted(set(manifest.large) - set(manifest.classes))
    if unknown:
        raise DataError(f"{path}: manifest.large names {', '.join(unknown)}, which manifest.classes lacks", _AGAIN)
    label = _unpack(record.labels, "labels", record, path)
    packed = sorted(record.predictions.items())
    predictions = {name: _unpack(text, f"predictions[{name!r}]", record, path) for name, text in packed}
    masks = _masks(label, manifest)
    scores: dict[Key, Score] = {}
    levels: dict[Key, str] = {}
    for stated in record.scores:
        key = (stated.encoder, stated.metric, stated.group)
        name = f"{stated.encoder} {stated.metric} {stated.group}"
        if key in scores:
            raise DataError(f"{path}: {name} is stated twice", _AGAIN)
        if not 0 <= stated.correct <= stated.n or stated.n == 0:
            raise DataError(f"{path}: {name} states {stated.correct} of {stated.n}, which is no score", _AGAIN)
        predicted = predictions.get(f"{stated.encoder}/{stated.metric}")
        levels[key] = RECORDED if predicted is None else RECOMPUTED
        if predicted is not None:
            mask = masks.get(stated.group)
            correct, n = (0, 0) if mask is None else (int((predicted == label)[mask].sum()), int(mask.sum()))
            if (correct, n) != (stated.correct, stated.n):
                message = f"{path}: {name} states {stated.correct} of {stated.n}, its predictions give {correct} of {n}"
                raise DataError(message, _AGAIN)
        scores[key] = stated
    return Evaluation(record, scores, levels, label, predictions, masks)


def _unpack(text: str, key: str, record: EvaluationRecord, path: Path) -> Tensor:
    try:
        values = unpack_labels(text)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise DataError(f"{path}: {key} cannot be unpacked ({error})", _AGAIN) from error
    if len(values) != record.manifest.query:
        raise DataError(f"{path}: {key} has {len(values)} entries, the manifest {record.manifest.query} queries", _AGAIN)
    if len(values) and int(values.max()) >= len(record.manifest.classes):
        message = f"{path}: {key} names class {int(values.max())}, the manifest has {len(record.manifest.classes)} classes"
        raise DataError(message, _AGAIN)
    return values


def _masks(label: Tensor, manifest: ManifestIdentity) -> dict[str, Tensor]:
    """Queries of each group that has any: `all`, and `rare` and `large` where some class is large."""
    masks = {"all": label >= 0}
    if manifest.large:
        large = label.new_zeros(len(manifest.classes)).bool()
        large[[manifest.classes.index(name) for name in manifest.large]] = True
        masks |= {"rare": ~large[label], "large": large[label]}
    return {group: mask for group, mask in masks.items() if bool(mask.any())}
