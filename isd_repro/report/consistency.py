"""What the parts of one run's record say of themselves and of each other, without any image or encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from isd_repro.config.reader import fingerprint
from isd_repro.records import CurvePoint, CurveRecord, EvaluationRecord, PretrainRecord, Score, TargetsRecord
from isd_repro.report.problems import AGAIN, OnProblem, Problem

Parts = Mapping[Any, PretrainRecord | EvaluationRecord | TargetsRecord]
Every = Mapping[Any, PretrainRecord | EvaluationRecord | TargetsRecord | CurveRecord]
_Fact = tuple[str, str, object, object]  # part, key, found, expected


def consistent(name: str, present: Parts, paths: Mapping[Any, Path], tell: OnProblem) -> None:
    """What one part says twice, or two parts both say, must be the same."""
    first = next(iter(present), None)
    for part, record in present.items():
        if first and record.manifest != present[first].manifest and record.manifest.sha256 == present[first].manifest.sha256:
            key, ours, theirs = _difference(
                record.manifest.model_dump(mode="json"), present[first].manifest.model_dump(mode="json")
            )
            where = f"{theirs}, as {paths[first].name} says"
            tell(Problem(paths[part], f"manifest.{key}", ours, where, AGAIN, (name,)))
        if isinstance(record, PretrainRecord):
            given = fingerprint(record.config)
            if given != record.fingerprint:
                tell(Problem(paths[part], "fingerprint", record.fingerprint, f"{given}, from its config", AGAIN, (name,)))
            optim = record.config.get("optim")
            epochs = optim.get("epochs") if isinstance(optim, dict) else None
            if len(record.curve) != epochs:
                found = f"{len(record.curve)} epochs"
                tell(Problem(paths[part], "curve", found, f"{epochs}, from its config", AGAIN, (name,)))
    features = {part: record.features_sha256 for part, record in present.items() if isinstance(record, EvaluationRecord)}
    if len(set(features.values())) > 1:
        hint = "run `knn`, `linear` and `few-label` again on the same features"
        for part, other in permutations(features, 2):
            said = f"{features[other]}, as {other}.json says"
            tell(Problem(paths[part], "features_sha256", str(features[part]), said, hint, (name,)))


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, str, str]:
    """The first key in which two mappings of the same form differ, and both values."""
    key = next(key for key in ours if ours[key] != theirs[key])
    return key, repr(ours[key]), repr(theirs[key])


def plausible(name: str, everything: Every, paths: Mapping[Any, Path], tell: OnProblem) -> None:
    """Encoders, epochs, images and protocols that a part states must be possible by what it states elsewhere."""
    for part, key, found, expected in _facts(everything):
        if found != expected:
            tell(Problem(paths[part], key, repr(found), repr(expected), AGAIN, (name,)))


def _facts(everything: Every) -> Iterator[_Fact]:
    pretrain = everything.get("pretrain")
    if isinstance(pretrain, PretrainRecord):
        rows = [row.get("epoch") for row in pretrain.curve]
        yield "pretrain", "curve's epochs", rows, list(range(1, len(rows) + 1))
        made = pretrain.provenance.source
        yield "pretrain", "sources", list(pretrain.sources), [*(one for one in pretrain.sources if one != made), made]
    for part, record in everything.items():
        if isinstance(record, PretrainRecord):
            continue
        settings = record.settings
        if isinstance(pretrain, PretrainRecord):
            scored = {score.encoder for score in _scores(record)}
            yield part, "encoders with scores", sorted(scored), sorted(scored & set(pretrain.encoders))
        if isinstance(record, EvaluationRecord):
            yield from _epochs(part, settings)
        for one in record.evaluations if isinstance(record, TargetsRecord) else ():
            yield part, f"{one.manifest.subset}: protocol", one.protocol, record.protocol
        if isinstance(record, CurveRecord):
            for point in record.points:
                yield from _point(point, record)


def _scores(record: EvaluationRecord | TargetsRecord | CurveRecord) -> Iterator[Score]:
    if isinstance(record, EvaluationRecord):
        yield from record.scores
    for one in record.evaluations if isinstance(record, TargetsRecord) else ():
        yield from one.scores
    for point in record.points if isinstance(record, CurveRecord) else ():
        yield from point.scores


def _epochs(part: str, settings: Mapping[str, Any]) -> Iterator[_Fact]:
    """Best epochs lie within the epochs of the head."""
    best, last = settings.get("best_epoch"), settings.get("epochs")
    if isinstance(best, dict) and isinstance(last, int):
        found = [one for value in best.values() for one in (value.values() if isinstance(value, dict) else (value,))]
        odd = [one for one in found if not (isinstance(one, int) and 1 <= one <= last)]
        yield part, "settings.best_epoch", odd, []


def _point(point: CurvePoint, record: CurveRecord) -> Iterator[_Fact]:
    """Each score once, `all` over every query, groups over the same queries at every epoch."""
    keys = [(score.encoder, score.metric, score.group) for score in point.scores]
    at = f"epoch {point.epoch}"
    yield "trajectory", f"{at}: scores stated twice", sorted({key for key in keys if keys.count(key) > 1}), []
    sizes = {score.group: score.n for score in record.points[-1].scores} | {"all": record.manifest.query}
    wrong = {score.group: score.n for score in point.scores if sizes.get(score.group, score.n) != score.n}
    yield "trajectory", f"{at}: queries of other groups", wrong, {}
