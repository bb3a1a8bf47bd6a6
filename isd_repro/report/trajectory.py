"""Teacher against student over training: the `trajectory` records of a profile.

The records hold scores without predictions, so what is drawn is recorded only, except for the last point: it is the run's
exported encoder, and must be what the run's own records say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import CurveRecord, Score
from isd_repro.report.cells import Cell
from isd_repro.report.faults import Fault, Sink, refuse
from isd_repro.report.records import Records, RunRecords
from isd_repro.report.tables import ENCODERS

LAST = "last point's scores"
_AGAIN = "run `trajectory` again"
GROUPS = ("all", "rare", "large")


@dataclass(frozen=True)
class Reference:
    """A curve that the paper prints: the run of ours that it stands beside, the row's name, and a cell of the paper by epoch."""

    run: str
    encoder: str
    label: str
    points: tuple[tuple[int, Cell], ...]


def load(params: Params, layout: Layout, records: Records, sink: Sink = refuse) -> dict[str, CurveRecord]:
    """The trajectory records of a profile's runs, those that the sink was told of left out.

    Raises:
        DataError: a record belongs to another run or other images, has points out of order, or ends elsewhere than
            the run's other records; unless `sink` takes it.
    """
    found = {}
    for name, run in records.runs.items():
        record = run.trajectory
        if record is None:
            continue
        wrong = [fact for fact in _facts(name, params, record, run) if fact[1] != fact[2]]
        for key, ours, theirs in wrong:
            sink(Fault(layout.record(name, "trajectory"), key, repr(ours), repr(theirs), _AGAIN, (name,)))
        if not wrong:
            found[name] = record
    return found


def _facts(name: str, params: Params, record: CurveRecord, run: RunRecords) -> list[tuple[str, object, object]]:
    """What a record says and what it must say."""
    epochs = [point.epoch for point in record.points]
    facts: list[tuple[str, object, object]] = [
        ("profile", record.profile, params.profile),
        ("run", record.run, name),
        ("epochs", epochs, sorted(set(epochs))),
    ]
    last = record.points[-1]
    if run.manifest:
        facts.append(("manifest.sha256", record.manifest.sha256, run.manifest.sha256))
    if run.pretrain:
        facts.append(("last point's encoder_sha256", last.encoder_sha256, run.pretrain.encoder_sha256))
        facts.append(("last epoch", last.epoch, run.pretrain.config["optim"]["epochs"]))
    if run.knn:
        ours = {(score.encoder, score.metric, score.group): (score.correct, score.n) for score in last.scores}
        theirs = {key: (score.correct, score.n) for key, score in run.knn.scores.items() if key in ours}
        facts.append((LAST, {key: ours[key] for key in theirs}, theirs))
    for point in record.points:
        odd = [score.metric for score in point.scores if not 0 <= score.correct <= score.n or not score.n]
        facts.append((f"scores of epoch {point.epoch} out of range", odd, []))
    return facts


def names_of(params: Params, found: Mapping[str, CurveRecord], subset: str, paper: Sequence[Reference]) -> list[str]:
    """Runs of a subset that have snapshots or stand beside the paper's, in the order of the parameters."""
    beside = {one.run for one in paper}
    return [name for name, run in params.runs.items() if run.data.subset == subset and (name in found or name in beside)]


def by_epoch(record: CurveRecord, metric: str, group: str) -> dict[str, list[tuple[int, Score]]]:
    """(epoch, score) by encoder; encoders without such a score are left out."""
    found: dict[str, list[tuple[int, Score]]] = {encoder: [] for encoder in ENCODERS}
    for point in record.points:
        for score in point.scores:
            if (score.metric, score.group) == (metric, group):
                found[score.encoder].append((point.epoch, score))
    return {encoder: points for encoder, points in found.items() if points}
