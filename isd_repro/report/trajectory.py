"""Teacher against student over training: the `trajectory` records of a profile, and their figure.

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
from isd_repro.report.figures import WIDTH, Tick, nice_ticks
from isd_repro.report.records import Records, RunRecords
from isd_repro.report.tables import ENCODERS

LAST = "last point's scores"
_AGAIN = "run `trajectory` again"
GROUPS = ("all", "rare", "large")
_LEFT, _TOP, _GAP, _RIGHT, _BOTTOM, _HEIGHT = 44.0, 74.0, 28.0, 14.0, 28.0, 230.0
_CHARACTER = 7.4  # px of a legend's label, generous


@dataclass(frozen=True)
class Curve:
    """One encoder of one run: points in px, the number of its colour, and what a reader is told on pointing at each."""

    number: int
    teacher: bool
    points: tuple[tuple[float, float], ...]
    titles: tuple[str, ...]
    paper: bool = False  # the paper's, and not ours

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
    paper: bool = False  # whether any curve is the paper's


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


def figure(params: Params, found: Mapping[str, CurveRecord], subset: str, paper: Sequence[Reference] = ()) -> Trajectories | None:
    """First nearest-neighbour score by epoch of every run of a subset that has a record, and the paper's; None where none is."""
    metric = f"{params.evaluation.knn.k[0]}-NN"
    names = names_of(params, found, subset, paper)
    values = {(name, group): by_epoch(found[name], metric, group) for name in names if name in found for group in GROUPS}
    groups = [group for group in GROUPS if any(values.get((name, group)) for name in names)] or (["all"] if paper else [])
    if not groups:
        return None
    ours = [(score.top1, epoch) for by_encoder in values.values() for points in by_encoder.values() for epoch, score in points]
    both = [*ours, *((cell.value or 0.0, epoch) for reference in paper for epoch, cell in reference.points)]
    area = _area([value for value, _ in both], [epoch for _, epoch in both], len(groups), 22.0 if paper else 0.0)
    panels = []
    for at, group in enumerate(groups):
        x = _LEFT + at * (area.width + _GAP)
        curves = [
            Curve(
                number,
                encoder == "teacher",
                tuple((area.across(epoch, x), area.down(score.top1)) for epoch, score in points),
                tuple(
                    f"{params.runs[name].label}, {encoder}, {group}, epoch {epoch}: {score.top1:.1f} %" for epoch, score in points
                ),
            )
            for number, name in enumerate(names)
            for encoder, points in values.get((name, group), {}).items()
        ]
        curves += [_reference(one, names.index(one.run), area, x) for one in paper if group == "all"]
        whole = [value for value in nice_ticks(*area.epochs, 5) if value == int(value)] or [area.epochs[0]]
        ticks = tuple(Tick(area.across(int(v), x), f"{v:.0f}") for v in whole)
        panels.append(Panel(x, group.capitalize(), tuple(curves), ticks))
    legend, x = [], 0.0
    for number, name in enumerate(names):
        label = params.runs[name].label + ("" if name in found else " (not run)")
        legend.append(Entry(x, label, number))
        x += len(label) * _CHARACTER + 44
    ticks = tuple(Tick(area.down(value), f"{value:g}") for value in nice_ticks(*area.values, 6))
    title = f"{subset}: {metric} top-1 by epoch, %"
    height = area.top + _HEIGHT + _BOTTOM
    return Trajectories(
        subset, title, WIDTH, height, area.top, area.width, _HEIGHT, tuple(legend), tuple(panels), ticks, bool(paper)
    )


@dataclass(frozen=True)
class _Area:
    """Where values and epochs stand in a panel, in px."""

    values: tuple[float, float]
    epochs: tuple[int, int]
    width: float
    top: float

    def down(self, value: float) -> float:
        low, high = self.values
        return self.top + _HEIGHT * (high - value) / (high - low)

    def across(self, epoch: int, x: float) -> float:
        first, last = self.epochs
        return x + (self.width / 2 if first == last else self.width * (epoch - first) / (last - first))


def _area(values: Sequence[float], epochs: Sequence[int], panels: int, room: float) -> _Area:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    bounds = max(0.0, low - margin), min(100.0, high + margin)
    width = (WIDTH - _LEFT - _RIGHT - _GAP * (panels - 1)) / panels
    return _Area(bounds, (min(epochs), max(epochs)), width, _TOP + room)


def _reference(one: Reference, number: int, area: _Area, x: float) -> Curve:
    """A curve of the paper's."""
    points = tuple((area.across(epoch, x), area.down(cell.value or 0.0)) for epoch, cell in one.points)
    titles = tuple(f"The paper's {one.label}, {one.encoder}, epoch {epoch}: {cell.value:.1f} %" for epoch, cell in one.points)
    return Curve(number, one.encoder == "teacher", points, titles, paper=True)


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
