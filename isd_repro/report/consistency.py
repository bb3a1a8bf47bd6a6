"""Consistency of the parts of one run's record, checked without images or encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations, product
from typing import Any

from isd_repro.config.reader import fingerprint
from isd_repro.records import AnyEvaluation, CurveRecord, EvaluationRecord, PretrainRecord, Score, TargetsRecord
from isd_repro.report.problems import Key

Parts = Mapping[str, PretrainRecord | AnyEvaluation]
Fact = tuple[str, str, object, object, str]  # part, key, found, expected, and what says so where it is another part
LAST = "last point's scores"  # of a curve: those of the run's exported encoder


def facts(parts: Parts, profile: str, run: str, subset: str) -> Iterator[Fact]:
    """Values that a part states twice, that two parts state, or that other values limit, as facts to compare."""
    first = next(iter(parts), "")
    for part, record in parts.items():
        yield part, "kind", record.kind, part, ""
        yield part, "profile", record.profile, profile, ""
        yield part, "run", record.run, run, ""
        yield part, "manifest.subset", record.manifest.subset, subset, ""
        other, said = parts[first], f", as {first}.json says"
        yield part, "encoder_sha256", record.encoder_sha256, other.encoder_sha256, said
        ours, theirs = (one.manifest.model_dump(mode="json") for one in (record, other))
        key = next((key for key in ours if ours[key] != theirs.get(key)), "sha256")
        yield part, f"manifest.{key}", ours[key], theirs.get(key), said
    features = {part: record.features_sha256 for part, record in parts.items() if isinstance(record, EvaluationRecord)}
    for part, another in permutations(features, 2):
        yield part, "features_sha256", features[part], features[another], f", as {another}.json says"
    pretrain = parts.get("pretrain")
    encoders = set(pretrain.encoders) if isinstance(pretrain, PretrainRecord) else None
    for part, record in parts.items():
        if isinstance(record, PretrainRecord):
            yield from _of_pretrain(part, record)
            continue
        if encoders is not None:
            yield part, "encoders with scores", sorted(_encoders(record)), sorted(_encoders(record) & encoders), ""
        if isinstance(record, EvaluationRecord):
            yield part, "settings.best_epoch", _impossible_epochs(record.settings), [], ""
        if isinstance(record, TargetsRecord):
            sets = {one.manifest.subset: one for one in record.evaluations}
            yield part, "sets", list(sets), record.settings.get("sets"), ""
            for (name, one), key in product(sets.items(), ("run", "profile", "encoder_sha256", "protocol")):
                yield part, f"{name}: {key}", getattr(one, key), getattr(record, key), ""
        if isinstance(record, CurveRecord):
            yield from _of_curve(part, record, parts)


def _of_pretrain(part: str, record: PretrainRecord) -> Iterator[Fact]:
    yield part, "fingerprint", record.fingerprint, fingerprint(record.config), ", from its config"
    yield part, "curve", f"{len(record.curve)} epochs", f"{_epochs(record)} epochs", ", from its config"
    yield part, "curve's epochs", [row.get("epoch") for row in record.curve], list(range(1, len(record.curve) + 1)), ""
    made = record.provenance.source
    yield part, "sources", list(record.sources), [*(one for one in record.sources if one != made), made], ""


def _epochs(record: PretrainRecord) -> Any:
    optim = record.config.get("optim")
    return optim.get("epochs") if isinstance(optim, dict) else None


def _key(score: Score) -> Key:
    return score.encoder, score.metric, score.group


def _encoders(record: AnyEvaluation) -> set[str]:
    if isinstance(record, EvaluationRecord):
        return {score.encoder for score in record.scores}
    found = record.points if isinstance(record, CurveRecord) else record.evaluations
    return {score.encoder for one in found for score in one.scores}


def _impossible_epochs(settings: Mapping[str, Any]) -> list[object]:
    """Best epochs outside the epochs of the head."""
    best, last = settings.get("best_epoch"), settings.get("epochs")
    if not isinstance(best, dict) or not isinstance(last, int):
        return []
    found = [one for value in best.values() for one in (value.values() if isinstance(value, dict) else (value,))]
    return [one for one in found if not (isinstance(one, int) and 1 <= one <= last)]


def _of_curve(part: str, record: CurveRecord, parts: Parts) -> Iterator[Fact]:
    """Check that points are in order, that the last one is the run's encoder, and that scores and groups agree between epochs."""
    epochs, last = [point.epoch for point in record.points], record.points[-1]
    yield part, "epochs", epochs, sorted(set(epochs)), ""
    sizes = {score.group: score.n for score in last.scores} | {"all": record.manifest.query}
    ours = {_key(score): (score.correct, score.n) for score in last.scores}
    for other, known in parts.items():
        if isinstance(known, PretrainRecord):
            yield part, "last epoch", last.epoch, _epochs(known), f", as {other}.json says"
        if isinstance(known, EvaluationRecord):
            both = {_key(score): (score.correct, score.n) for score in known.scores if _key(score) in ours}
            yield part, LAST, {key: ours[key] for key in both}, both, f", as {other}.json says"
    for point in record.points:
        keys = [_key(score) for score in point.scores]
        at = f"epoch {point.epoch}"
        yield part, f"{at}: scores stated twice", sorted({key for key in keys if keys.count(key) > 1}), [], ""
        wrong = {score.group: score.n for score in point.scores if sizes.get(score.group, score.n) != score.n}
        yield part, f"{at}: queries of other groups", wrong, {}, ""
        odd = [score.metric for score in point.scores if not 0 <= score.correct <= score.n or not score.n]
        yield part, f"{at}: scores out of range", odd, [], ""
