"""What the parts of one run's record say of themselves and of each other, without any image or encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

from isd_repro.config.reader import fingerprint
from isd_repro.records import AnyEvaluation, CurvePoint, CurveRecord, EvaluationRecord, PretrainRecord, Score, TargetsRecord

Parts = Mapping[str, PretrainRecord | AnyEvaluation]
Fact = tuple[str, str, object, object, str]  # part, key, found, expected, and what says so where it is another part


def facts(parts: Parts, profile: str, run: str, subset: str) -> Iterator[Fact]:
    """Everything that a part says twice, that two parts both say, or that must be possible by what is stated elsewhere."""
    of_one_encoder = {part: record for part, record in parts.items() if not isinstance(record, CurveRecord)}
    for part, record in of_one_encoder.items():
        yield part, "kind", record.kind, part, ""
        yield part, "profile", record.profile, profile, ""
        yield part, "run", record.run, run, ""
        yield part, "manifest.subset", record.manifest.subset, subset, ""
    first = next(iter(of_one_encoder), "")
    for part, record in of_one_encoder.items():
        other, said = of_one_encoder[first], f", as {first}.json says"
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
        scored = {score.encoder for score in _scores(record)}
        if encoders is not None:
            yield part, "encoders with scores", sorted(scored), sorted(scored & encoders), ""
        if isinstance(record, EvaluationRecord):
            yield part, "settings.best_epoch", _impossible_epochs(record.settings), [], ""
        for one in record.evaluations if isinstance(record, TargetsRecord) else ():
            yield part, f"{one.manifest.subset}: protocol", one.protocol, record.protocol, ""
        for point in record.points if isinstance(record, CurveRecord) else ():
            yield from _of_point(part, point, record)


def _of_pretrain(part: str, record: PretrainRecord) -> Iterator[Fact]:
    yield part, "fingerprint", record.fingerprint, fingerprint(record.config), ", from its config"
    optim = record.config.get("optim")
    epochs = optim.get("epochs") if isinstance(optim, dict) else None
    yield part, "number of epochs in curve", len(record.curve), epochs, ", from its config"
    yield part, "curve's epochs", [row.get("epoch") for row in record.curve], list(range(1, len(record.curve) + 1)), ""
    made = record.provenance.source
    yield part, "sources", list(record.sources), [*(one for one in record.sources if one != made), made], ""


def _scores(record: AnyEvaluation) -> Iterator[Score]:
    of = (
        record.evaluations
        if isinstance(record, TargetsRecord)
        else record.points
        if isinstance(record, CurveRecord)
        else (record,)
    )
    for one in of:
        yield from one.scores


def _impossible_epochs(settings: Mapping[str, Any]) -> list[object]:
    """Best epochs outside the epochs of the head."""
    best, last = settings.get("best_epoch"), settings.get("epochs")
    if not isinstance(best, dict) or not isinstance(last, int):
        return []
    found = [one for value in best.values() for one in (value.values() if isinstance(value, dict) else (value,))]
    return [one for one in found if not (isinstance(one, int) and 1 <= one <= last)]


def _of_point(part: str, point: CurvePoint, record: CurveRecord) -> Iterator[Fact]:
    """Each score once, `all` over every query, groups over the same queries at every epoch."""
    keys = [(score.encoder, score.metric, score.group) for score in point.scores]
    at = f"epoch {point.epoch}"
    yield part, f"{at}: scores stated twice", sorted({key for key in keys if keys.count(key) > 1}), [], ""
    sizes = {score.group: score.n for score in record.points[-1].scores} | {"all": record.manifest.query}
    wrong = {score.group: score.n for score in point.scores if sizes.get(score.group, score.n) != score.n}
    yield part, f"{at}: queries of other groups", wrong, {}, ""
