"""Teacher against student over training: the `trajectory` records of a profile, and their figure.

The records hold scores without predictions, so what is drawn is recorded only, except for the last point: it is the run's
exported encoder, and must be what the run's own records say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from isd_repro.artifacts import TrajectoryRecord
from isd_repro.config import Layout
from isd_repro.params import Params
from isd_repro.report.faults import Fault, Sink, refuse
from isd_repro.report.figures import WIDTH, Tick, nice_ticks
from isd_repro.report.records import Records, RunRecords
from isd_repro.report.tables import ENCODERS

LAST = "last point's scores"
_AGAIN = "run `trajectory` again"
_LEFT, _TOP, _GAP, _BOTTOM, _HEIGHT = 44.0, 62.0, 24.0, 46.0, 230.0
_CHARACTER = 7.4  # px of a legend's label, generous


@dataclass(frozen=True)
class Curve:
    """One encoder of one run: points in px, the number of its colour, and what a reader is told on pointing at each."""

    number: int
    teacher: bool
    points: tuple[tuple[float, float], ...]
    titles: tuple[str, ...]

    @property
    def path(self) -> str:
        """The line as SVG path data."""
        return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Panel:
    """One query group."""

    x: float
    title: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Entry:
    """A run in the legend."""

    x: float
    label: str
    number: int


@dataclass(frozen=True)
class Trajectories:
    """Scores over training, one panel a query group."""

    subset: str
    title: str
    width: float
    height: float
    top: float
    plot_width: float
    plot_height: float
    legend: tuple[Entry, ...]
    panels: tuple[Panel, ...]
    y_ticks: tuple[Tick, ...]


def load(params: Params, layout: Layout, records: Records, sink: Sink = refuse) -> dict[str, TrajectoryRecord]:
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


def _facts(name: str, params: Params, record: TrajectoryRecord, run: RunRecords) -> list[tuple[str, object, object]]:
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


def figure(params: Params, found: Mapping[str, TrajectoryRecord], subset: str) -> Trajectories | None:
    """First nearest-neighbour score by epoch of every run of a subset that has a record; None where none has."""
    metric = f"{params.evaluation.knn.k[0]}-NN"
    names = [name for name in found if params.runs[name].data.subset == subset]
    values = {(name, group): _values(found[name], metric, group) for name in names for group in ("all", "rare", "large")}
    groups = [group for group in ("all", "rare", "large") if any(values[name, group] for name in names)]
    if not groups:
        return None
    flat = [value for by_encoder in values.values() for points in by_encoder.values() for _, value in points]
    epochs = [epoch for by_encoder in values.values() for points in by_encoder.values() for epoch, _ in points]
    low, high = min(flat), max(flat)
    margin = 0.06 * (high - low) or 1.0
    low, high, first, last = max(0.0, low - margin), min(100.0, high + margin), min(epochs), max(epochs)
    width = (WIDTH - _LEFT - _GAP * (len(groups) - 1)) / len(groups)

    def down(value: float) -> float:
        return _TOP + _HEIGHT * (high - value) / (high - low)

    panels = []
    for at, group in enumerate(groups):
        x = _LEFT + at * (width + _GAP)

        def across(epoch: int, x: float = x) -> float:
            return x + (width / 2 if first == last else width * (epoch - first) / (last - first))

        curves = [
            Curve(
                number,
                encoder == "teacher",
                tuple((across(epoch), down(value)) for epoch, value in points),
                tuple(f"{params.runs[name].label}, {encoder}, {group}, epoch {epoch}: {value:.1f} %" for epoch, value in points),
            )
            for number, name in enumerate(names)
            for encoder, points in values[name, group].items()
        ]
        whole = [value for value in nice_ticks(first, last, 5) if value == int(value)] or [first]
        panels.append(Panel(x, group.capitalize(), tuple(curves), tuple(Tick(across(int(v)), f"{v:.0f}") for v in whole)))
    legend, x = [], 0.0
    for number, name in enumerate(names):
        legend.append(Entry(x, params.runs[name].label, number))
        x += len(params.runs[name].label) * _CHARACTER + 44
    ticks = tuple(Tick(down(value), f"{value:g}") for value in nice_ticks(low, high, 6))
    height = _TOP + _HEIGHT + _BOTTOM
    title = f"{subset}: {metric} top-1 by epoch, %"
    return Trajectories(subset, title, WIDTH, height, _TOP, width, _HEIGHT, tuple(legend), tuple(panels), ticks)


def _values(record: TrajectoryRecord, metric: str, group: str) -> dict[str, list[tuple[int, float]]]:
    """(epoch, top1) by encoder; encoders without such a score are left out."""
    found: dict[str, list[tuple[int, float]]] = {encoder: [] for encoder in ENCODERS}
    for point in record.points:
        for score in point.scores:
            if (score.metric, score.group) == (metric, group):
                found[score.encoder].append((point.epoch, score.top1))
    return {encoder: points for encoder, points in found.items() if points}
