"""Figures as SVG, drawn without a plotting library: colours follow the light or dark scheme, and equal records give equal bytes.

An SVG here has no `id`, so any number of them share a page. Geometry is computed in this module, markup is in the templates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isd_repro.config.params import Params
from isd_repro.report import text
from isd_repro.report.cells import Cell
from isd_repro.report.pivot import draw_cell, methods
from isd_repro.report.records import Records
from isd_repro.report.tables import ENCODERS, groups_of, runs_of, score_cell

WIDTH = 960.0  # of a full figure, in px at scale 1
_LABEL = 7.4  # width of one character of a row label, generous
_ROW = 30.0
Grid = list[list[Cell]]


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in px."""

    at: float
    label: str


@dataclass(frozen=True)
class CurvePanel:
    """The loss of one run."""

    x: float
    y: float
    title: str
    last: str
    points: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def path(self) -> str:
        """The line as SVG path data."""
        return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Curves:
    """Small multiples of loss curves; each panel has its own scale, since methods minimise different losses."""

    width: float
    height: float
    plot_width: float
    plot_height: float
    panels: tuple[CurvePanel, ...]


@dataclass(frozen=True)
class Dot:
    """One score: centre and interval in px, series number, and what a reader is told on pointing at it."""

    x: float
    y: float
    low: float
    high: float
    series: int
    title: str


@dataclass(frozen=True)
class Series:
    """An entry of the legend; `number` chooses its colour."""

    x: float
    label: str
    number: int


@dataclass(frozen=True)
class DotPanel:
    """One query group: a row of dots per run or subset."""

    x: float
    title: str
    dots: tuple[Dot, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Dots:
    """Scores with their intervals."""

    title: str
    width: float
    height: float
    top: float
    plot_width: float
    plot_height: float
    rows: tuple[Tick, ...]
    series: tuple[Series, ...]
    hollow: bool  # the second series is the teacher's: same colour, hollow
    panels: tuple[DotPanel, ...]


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers inside [low, high], about `wanted` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _tick_label(value: float) -> str:
    return text.MINUS + f"{-value:.6g}" if value < 0 else f"{value:.6g}"


def loss_curves(params: Params, records: Records) -> Curves | None:
    """Loss of every run that trained for an epoch or more; None where none did."""
    trained = [(name, found.pretrain.curve) for name, found in records.runs.items() if found.pretrain and found.pretrain.curve]
    points_of = {
        name: [(row["epoch"], row["loss"]) for row in curve if {"epoch", "loss"} <= row.keys()] for name, curve in trained
    }
    series = [(name, points) for name, points in points_of.items() if points]
    if not series:
        return None
    across = min(3, len(series))
    left, top, gap, bottom, plot_height = 52.0, 34.0, 22.0, 46.0, 130.0
    cell = WIDTH / 3
    plot_width = cell - left - gap
    panels = []
    several = len({params.runs[name].data.subset for name, _ in series}) > 1
    for at, (name, points) in enumerate(series):
        x, y = (at % across) * cell + left, (at // across) * (top + plot_height + bottom) + top
        label, subset = params.runs[name].label, params.runs[name].data.subset
        title = f"{label}, {subset}" if several and subset.lower() not in label.lower() else label
        panels.append(_curve_panel(title, points, x, y, plot_width, plot_height))
    rows = math.ceil(len(series) / across)
    return Curves(across * cell, rows * (top + plot_height + bottom), plot_width, plot_height, tuple(panels))


def _curve_panel(
    title: str, points: Sequence[tuple[float, float]], x: float, y: float, width: float, height: float
) -> CurvePanel:
    epochs, losses = [point[0] for point in points], [point[1] for point in points]
    left, right = min(epochs), max(epochs)
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or max(abs(high) * 0.05, 0.5)
    low, high = low - margin, high + margin

    def across(value: float) -> float:
        return x + (width / 2 if right == left else width * (value - left) / (right - left))

    def down(value: float) -> float:
        return y + height * (high - value) / (high - low)

    whole = [value for value in nice_ticks(left, right, 5) if value == int(value)]
    return CurvePanel(
        x=x,
        y=y,
        title=_shorten(title, 30),
        last=f"{losses[-1]:.4g}",
        points=tuple((across(epoch), down(loss)) for epoch, loss in points),
        x_ticks=tuple(Tick(across(value), _tick_label(value)) for value in whole or [left]),
        y_ticks=tuple(Tick(down(value), _tick_label(value)) for value in nice_ticks(low, high, 5)),
    )


def subset_dots(params: Params, records: Records, subset: str) -> Dots | None:
    """First nearest-neighbour score of every run of a subset, student and teacher, one panel a query group."""
    metric = f"{params.evaluation.knn.k[0]}-NN"
    names = runs_of(params, subset)
    rows = [params.runs[name].label for name in names]
    cells = {
        group: [[score_cell(records.runs[name], encoder, metric, group) for encoder in ENCODERS] for name in names]
        for group in groups_of(params, records, subset)
    }
    return _dots(f"{subset}: {metric} top-1, %", rows, list(ENCODERS), cells, hollow=True)


def pivot_dots(params: Params, records: Records, subsets: Sequence[str]) -> Dots | None:
    """First nearest-neighbour score of every method on every draw, student, one panel a query group."""
    metric = f"{params.evaluation.knn.k[0]}-NN"
    by_method = methods(params, subsets)
    groups = dict.fromkeys(group for subset in subsets for group in groups_of(params, records, subset))

    def of(runs: Sequence[str], group: str) -> Cell:
        return draw_cell(records, runs, ("student", metric, group))

    cells = {group: [[of(runs.get(subset, ()), group) for runs in by_method.values()] for subset in subsets] for group in groups}
    title = f"{subsets[0]} to {subsets[-1]}: {metric} top-1, student, %"
    return _dots(title, subsets, list(by_method), cells, hollow=False)


def _dots(title: str, rows: Sequence[str], series: Sequence[str], cells: Mapping[str, Grid], *, hollow: bool) -> Dots | None:
    """Lay out scores: `cells` holds, for each group, a row of cells per entry of `rows`, one cell per entry of `series`."""
    flat = [cell for group in cells.values() for row in group for cell in row if cell.value is not None]
    if not flat:
        return None
    used = [at for at in range(len(series)) if any(row[at].value is not None for group in cells.values() for row in group)]
    low, high = min(_whisker(cell)[0] for cell in flat), max(_whisker(cell)[1] for cell in flat)
    low, high = max(0.0, 5 * math.floor(low / 5)), min(100.0, 5 * math.ceil(high / 5))
    labels = min(max(len(_shorten(row, 30)) for row in rows) * _LABEL + 16, 240.0)
    legend = len(used) > 1
    top, bottom, gap = 34.0 + 30.0 * legend + 28.0 * (len(cells) > 1), 30.0, 28.0
    plot_width = (WIDTH - labels - gap * len(cells)) / len(cells)
    row_height = max(_ROW, 11.0 * len(used) + 8)
    panels = []
    for at, (group, members) in enumerate(cells.items()):
        x = labels + at * (plot_width + gap)

        def across(value: float, x: float = x) -> float:
            return x + plot_width * (value - low) / (high - low)

        dots = []
        for row, line in enumerate(members):
            shown = [number for number in used if line[number].value is not None]
            for place, number in enumerate(shown):
                cell = line[number]
                if cell.value is not None:
                    ends = [across(end) for end in _whisker(cell)]
                    y = top + row_height * (row + 0.5) + 11.0 * (place - (len(shown) - 1) / 2)
                    words = f"{rows[row]}, {series[number]}, {group}: {cell.plain}"
                    dots.append(Dot(across(cell.value), y, ends[0], ends[1], number, words))
        ticks = tuple(Tick(across(value), _tick_label(value)) for value in nice_ticks(low, high, 6))
        panels.append(DotPanel(x, group.capitalize(), tuple(dots), ticks))
    height = row_height * len(rows)
    names, x = [], labels
    for number in used:
        names.append(Series(x, series[number], number))
        x += len(series[number]) * _LABEL + 44
    marks = tuple(Tick(top + row_height * (at + 0.5), _shorten(row, 30)) for at, row in enumerate(rows))
    legends = tuple(names) if legend else ()
    return Dots(title, WIDTH, top + height + bottom, top, plot_width, height, marks, legends, hollow, tuple(panels))


def _whisker(cell: Cell) -> tuple[float, float]:
    """The interval of one run's score; one standard deviation either way where several seeds stand behind a dot."""
    value, spread = cell.value or 0.0, cell.deviation or 0.0
    return (value - spread, value + spread) if cell.low is None or cell.high is None else (cell.low, cell.high)


def _shorten(label: str, length: int) -> str:
    return label if len(label) <= length else f"{label[: length - 1]}\N{HORIZONTAL ELLIPSIS}"
