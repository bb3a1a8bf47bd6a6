"""One evaluation record, unpacked and recomputed from its own predictions."""

from __future__ import annotations

import binascii
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from isd_repro.records import EvaluationRecord, ManifestIdentity, Score, unpack_labels
from isd_repro.report.faults import AGAIN, Fault, Key, Sink

RECOMPUTED = "recomputed from stored predictions"
RECORDED = "recorded only"


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


def check(record: EvaluationRecord, path: Path, run: str, sink: Sink) -> Evaluation | None:
    """Recompute every score that has predictions; None where nothing can be unpacked and the sink takes that."""
    manifest = record.manifest
    unknown = sorted(set(manifest.large) - set(manifest.classes))
    if unknown:
        message = f"{path}: manifest.large names {', '.join(unknown)}, which manifest.classes lacks"
        sink(Fault(path, "manifest.large", ", ".join(unknown), "names in manifest.classes", AGAIN, (run,), words=message))
        return None
    packed = {"labels": record.labels, **{f"predictions[{name!r}]": text for name, text in sorted(record.predictions.items())}}
    unpacked = {key: _unpack(text, key, record, path, run, sink) for key, text in packed.items()}
    whole = {key: values for key, values in unpacked.items() if values is not None}
    if len(whole) < len(unpacked):
        return None
    label = whole["labels"]
    predictions = {name: whole[f"predictions[{name!r}]"] for name in record.predictions}
    masks = _masks(label, manifest)
    scores: dict[Key, Score] = {}
    levels: dict[Key, str] = {}
    for stated in record.scores:
        key = (stated.encoder, stated.metric, stated.group)
        name = " ".join(key)
        where = f"scores[{name}]"
        if key in scores:
            sink(Fault(path, where, "stated twice", "once", AGAIN, (run,), key, f"{path}: {name} is stated twice"))
        if not 0 <= stated.correct <= stated.n or stated.n == 0:
            message = f"{path}: {name} states {stated.correct} of {stated.n}, which is no score"
            sink(Fault(path, where, f"{stated.correct} of {stated.n}", "a score", AGAIN, (run,), key, message))
            continue
        predicted = predictions.get(f"{stated.encoder}/{stated.metric}")
        levels[key] = RECORDED if predicted is None else RECOMPUTED
        if predicted is not None:
            mask = masks.get(stated.group)
            correct, n = (0, 0) if mask is None else (int((predicted == label)[mask].sum()), int(mask.sum()))
            if (correct, n) != (stated.correct, stated.n):
                given, gives = f"{stated.correct} of {stated.n}", f"{correct} of {n}"
                message = f"{path}: {name} states {given}, its predictions give {gives}"
                sink(Fault(path, where, given, f"{gives}, from its predictions", AGAIN, (run,), key, message))
        scores[key] = stated
    lone = sorted(set(predictions) - {f"{encoder}/{metric}" for encoder, metric, _ in scores})
    if lone:
        message = f"{path}: predictions[{lone[0]!r}] belong to no score"
        sink(Fault(path, f"predictions[{lone[0]!r}]", "no score", "a score of the same name", AGAIN, (run,), words=message))
    return Evaluation(record, scores, levels, label, predictions, masks)


def _unpack(text: str, key: str, record: EvaluationRecord, path: Path, run: str, sink: Sink) -> Tensor | None:
    wanted, classes = record.manifest.query, len(record.manifest.classes)
    try:
        values = unpack_labels(text, record.manifest.query)
    except (binascii.Error, zlib.error, ValueError) as error:
        message = f"{path}: {key} cannot be unpacked ({error})"
        sink(Fault(path, key, f"no packed labels ({error})", f"{wanted} packed labels", AGAIN, (run,), words=message))
        return None
    if len(values) != wanted:
        message = f"{path}: {key} has {len(values)} entries, the manifest {wanted} queries"
        sink(Fault(path, key, f"{len(values)} entries", f"{wanted}, the manifest's queries", AGAIN, (run,), words=message))
        return None
    if len(values) and int(values.max()) >= classes:
        message = f"{path}: {key} names class {int(values.max())}, the manifest has {classes} classes"
        sink(Fault(path, key, f"class {int(values.max())}", f"0 to {classes - 1}", AGAIN, (run,), words=message))
        return None
    return values


def _masks(label: Tensor, manifest: ManifestIdentity) -> dict[str, Tensor]:
    """Queries of each group that has any: `all`, and `rare` and `large` where some class is large."""
    masks = {"all": label >= 0}
    if manifest.large:
        large = label.new_zeros(len(manifest.classes)).bool()
        large[[manifest.classes.index(name) for name in manifest.large]] = True
        masks |= {"rare": ~large[label], "large": large[label]}
    return {group: mask for group, mask in masks.items() if bool(mask.any())}
