"""The charts of a report, drawn by matplotlib as SVG. Equal numbers give equal bytes under one version of matplotlib.

Every method has the same colour on every page. Colours are legible on white and on the dark background of the page; text and axes
follow the reader's colour scheme. matplotlib is imported only when a chart is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any
from zlib import crc32

from isd_repro.config.fields import GROUPS
from isd_repro.config.params import Params, Run
from isd_repro.records import SHOTS, CurveRecord, ManifestIdentity
from isd_repro.report import intervals
from isd_repro.report.cells import Cell
from isd_repro.report.hypothesis import Comparison, by_class
from isd_repro.report.learning_curves import Reference, by_epoch, names_of
from isd_repro.report.repetitions import method_name, methods
from isd_repro.report.run_records import Records
from isd_repro.report.scores import balancedness_cell, score_cell
from isd_repro.report.tables import first_metric, groups_of
from isd_repro.report.text import class_name, visible
from isd_repro.runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = {
    "isd": "#2f7fc1",
    "moco": "#d06a2a",
    "byol": "#2f9461",
    "supervised": "#9c6bb3",
    "sce": "#b08a1e",
    "msf": "#c7568b",
    "simclr": "#3c99a8",
    "simsiam": "#8f7a66",
}
OTHERS = ("#7d9a2c", "#b5524a", "#5f6fd0", "#4f9e8f")  # of other methods
UNTRAINED = "#848d95"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1.5, 2)), (0, (7, 2, 1.5, 2)))  # lines of one colour: the references
INK = "#010203"  # replaced by the colour of the text around the chart
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
WIDTH = 960  # px
FEW_CLASSES = 20  # shown one by one; more are shown as groups
MOST_DOTS = 400
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that no font of the machine changes the layout
    "font.size": 9,  # points: 12 px
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.75,
}
Line = tuple[str, str, list[dict[float, list[float]]]]  # a method, its colour, and in each panel the values at each place
STYLE = (  # the font is set once here, because a chart with many labels would repeat it for each
    f"svg{{font-family:{FONTS}}}"
    "svg{color:#1d2126}@media(prefers-color-scheme:dark){svg{color:#e6e8ea}}@media print{svg{color:#000}}"
)


@dataclass(frozen=True)
class Figure:
    """One chart."""

    name: str  # of its file, without `.svg`
    title: str  # what it shows; also the text alternative
    caption: str  # how to read it
    draw: Callable[[], Canvas]  # returns the matplotlib figure

    def svg(self) -> str:
        """The chart as an SVG document, the same bytes for the same numbers.

        Raises:
            UserError: matplotlib is not installed.
        """
        return svg(self.draw, self.title)


def svg(draw: Callable[[], Canvas], title: str) -> str:
    """Render the figure of `draw` with matplotlib's defaults and this module's settings, ignoring the user's settings."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("the charts need matplotlib, which is not installed", "pip install 'isd-repro[report]'") from error
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**SETTINGS, "svg.hashsalt": title})
        stream = io.StringIO()
        without_date = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw().savefig(stream, format="svg", transparent=True, metadata={"Title": visible(title), **without_date})
    drawn = re.sub(r"<metadata>.*?</metadata>\n|[ \t]+$", "", stream.getvalue(), flags=re.DOTALL | re.MULTILINE)
    # A hundredth of a point is enough, and a page of many charts stays small.
    drawn = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), drawn)
    drawn = drawn.replace(INK, "currentColor").replace("font-family: 'DejaVu Sans'; ", "")
    return drawn[drawn.index("<svg") :].replace("<defs>", f"<style>{STYLE}</style>\n<defs>", 1)


def colour(run: Run) -> str:
    """The colour of a run's method."""
    if not run.optim.epochs:
        return UNTRAINED
    return COLOURS.get(run.method.name) or OTHERS[crc32(run.method.name.encode()) % len(OTHERS)]


def differences(comparisons: Sequence[Comparison], first: str, second: str, bound: float | None) -> Figure:
    """A forest plot: the difference of every draw as a dot, their mean with Student's 95 % interval, and the rule's threshold."""
    encoder, metric, _ = comparisons[0].key

    def draw() -> Canvas:
        figure, (ax,) = canvas(1, 36 * len(comparisons) + 46, left=64)
        for at, one in enumerate(comparisons):
            mean, mark = fmean(one.values), UNTRAINED if at else COLOURS["isd"]
            ax.scatter(one.values, [at + 0.2] * len(one.values), s=12, color=mark, alpha=0.55, lw=0)
            ax.plot(intervals.student_interval(one.values) or (mean, mean), [at - 0.12] * 2, color=mark, lw=2.5)
            ax.scatter([mean], [at - 0.12], s=42, marker="D", color=mark, lw=0, zorder=3)
        for x, style in ((0, "-"), (bound, (0, (4, 3)))):
            if x is not None:
                ax.axvline(x, color=INK, lw=1, linestyle=style)
        _rows(ax, [one.key[2].capitalize() for one in comparisons])
        ax.set_title(f"{first} minus {second}, points ({metric}, {encoder})")
        return figure

    rule = (
        ""
        if bound is None
        else f" By the rule, an interval above 0 supports the hypothesis and an interval below the dashed line ({bound:+g})"
        " contradicts it."
    )
    caption = f"Dots: draws. Diamonds: their mean with its 95 % interval over draws.{rule}"
    return Figure("differences", f"{first} minus {second}: differences in {metric} accuracy, points", caption, draw)


def scores(params: Params, records: Records, subsets: Sequence[str]) -> Figure | None:
    """The first nearest-neighbour score of every method's student, one panel per query group; None if there is no score.

    Every run is a dot. A single run has its Wilson interval, and several seeds or draws have a bar at their mean.
    """
    metric = first_metric(params)
    groups = list(dict.fromkeys(group for subset in subsets for group in groups_of(params, records, subset)))
    rows: list[tuple[str, str, list[list[Cell]]]] = []
    for name, mark, by_subset in _methods(params, subsets):
        runs = [run for subset in subsets for run in by_subset.get(subset, ())]
        cells = [[score_cell(records.runs[run], "student", metric, group) for run in runs] for group in groups]
        known = [[cell for cell in of_group if cell.value is not None] for of_group in cells]
        rows += [(name, mark, known)] if any(known) else []
    if not rows:
        return None

    def draw() -> Canvas:
        room = max(len(_shorten(name, 34)) for name, *_ in rows) * 6.6 + 16
        height = min(22 * len(rows), 284)  # px: the first table stays on the first screen
        figure, axes = canvas(len(groups), height + 74, left=room)
        for at, (ax, group) in enumerate(zip(axes, groups, strict=True)):
            for row, (_, mark, known) in enumerate(rows):
                values = [cell.value or 0.0 for cell in known[at]]
                if len(values) == 1:
                    ends = [known[at][0].low or values[0], known[at][0].high or values[0]]
                    ax.plot(ends, [row, row], color=mark, lw=2.5, alpha=0.5)
                if len(values) > 1:
                    ax.scatter([fmean(values)], [row], s=150, marker="|", color=mark, lw=2.5)
                ax.scatter(values, [row] * len(values), s=34 if len(values) == 1 else 16, color=mark, alpha=0.8, lw=0)
            _rows(ax, [name if ax is axes[0] else "" for name, *_ in rows])
            ax.set(title=f"{group.capitalize()} queries", xlabel=f"{metric} accuracy, %")
        return figure

    where = subsets[0] if len(subsets) == 1 else f"{subsets[0]} to {subsets[-1]}"
    many = any(len(of_group) > 1 for *_, known in rows for of_group in known)
    what = "Each dot is a run, and the bar is their mean" if many else "Each dot is one run with its 95 % interval over queries"
    name, title = f"scores-{where.replace(' ', '-')}", f"{where}: {metric} accuracy of the student, percent"
    return Figure(name, title, f"{what}. The axis does not start at zero.", draw)


def _methods(params: Params, subsets: Sequence[str]) -> Iterator[tuple[str, str, dict[str, list[str]]]]:
    """Name, colour and runs by subset of every method."""
    for name, by_subset in methods(params, subsets).items():
        yield name, colour(params.runs[next(iter(by_subset.values()))[0]]), by_subset


def by_imbalance(params: Params, records: Records, imbalance: Mapping[str, float]) -> Figure | None:
    """The student's first nearest-neighbour accuracy (one panel per query group) and balancedness against the imbalance.

    `imbalance` is by subset. Every run is a dot, and a line goes through the means of each method; None if there is no score.
    """
    metric = first_metric(params)
    found_groups = {group for subset in imbalance for group in groups_of(params, records, subset)}
    groups = [group for group in GROUPS if group in found_groups]
    titles = [*(f"{group.capitalize()} queries: {metric} accuracy, %" for group in groups), "Balancedness, points"]
    lines: list[Line] = []
    for name, mark, by_subset in _methods(params, list(imbalance)):
        values: list[dict[float, list[float]]] = [{} for _ in titles]
        for subset in sorted(by_subset, key=lambda subset: imbalance[subset]):
            for found in (records.runs[run] for run in by_subset[subset]):
                cells = [score_cell(found, "student", metric, group) for group in groups]
                for points, cell in zip(values, [*cells, balancedness_cell(found, "student", metric)], strict=True):
                    if cell.value is not None:
                        points.setdefault(imbalance[subset], []).append(cell.value)
        lines += [(name, mark, values)] if any(values) else []
    if not lines:
        return None
    ticks = sorted(set(imbalance.values()))

    def draw() -> Canvas:
        figure, axes = _against(lines, titles, "imbalance: largest over smallest class", ticks)
        for ax in axes:
            ax.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        return figure

    caption = "Dots: runs. Lines: means over seeds. Balancedness: standard deviation over classes; smaller is more even."
    if not found_groups.isdisjoint(SHOTS):
        caption += (
            " Classes are many, medium or few by their number of training images, so at another imbalance a group has other"
            " classes."
        )
    title = f"{params.subsets[next(iter(imbalance))].source.dataset}: accuracy and balancedness against imbalance"
    return Figure(f"imbalance-{next(iter(imbalance))}", title, caption, draw)


def class_gains(params: Params, records: Records, subsets: Sequence[str], first: str, second: str) -> Figure | None:
    """The difference between two methods' accuracies, one bar per class, sorted; None if no subset has predictions of both.

    A class that is large in some draws and rare in others has one bar for each; a bar is the mean over draws.
    """
    metric, runs = first_metric(params), methods(params, subsets)
    found: dict[tuple[str, str], list[float]] = {}
    for subset in subsets:
        for group in ("rare", "large") if "rare" in groups_of(params, records, subset) else ("all",):
            sides = [by_class(records, runs[name].get(subset, ()), ("student", metric, group)) for name in (first, second)]
            for name in sides[0].keys() & sides[1].keys():
                found.setdefault((name, group), []).append(sides[0][name] - sides[1][name])
    bars = sorted(((fmean(values), *key) for key, values in found.items()), key=lambda bar: (-bar[0], bar[1:]))
    if not bars:
        return None
    marks = {"large": UNTRAINED, "rare": COLOURS["isd"], "all": COLOURS["isd"]}

    def draw() -> Canvas:
        names = [_shorten(class_name(name), 30) for _, name, _ in bars] if len(bars) <= 50 else []
        room = max((5 * len(name) + 22 for name in names), default=8)
        figure, (ax,) = canvas(1, 180 + room, left=44, legend=1, labels=room)
        ax.bar(range(len(bars)), [gain for gain, *_ in bars], color=[marks[group] for *_, group in bars], width=0.75)
        ax.axhline(0, color=INK, lw=1)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_xlim(-0.6, len(bars) - 0.4)
        ax.grid(visible=False, axis="x")
        ax.set_title(f"{first} minus {second}, points by class ({metric}, student)")
        shown = dict.fromkeys(group for group in ("rare", "large") if any(bar[2] == group for bar in bars))
        _legend(figure, [(f"{group} classes", {"color": marks[group], "lw": 5}) for group in shown] or [("classes", {})], 4)
        return figure

    ahead = sum(gain > 0 for gain, *_ in bars)
    caption = f"{first} is ahead on {ahead} of {len(bars)} classes{', means over draws' if len(subsets) > 1 else ''}."
    return Figure(f"classes-{subsets[0]}", f"{first} minus {second} by class, points of {metric} accuracy", caption, draw)


def training_images(manifest: ManifestIdentity) -> dict[str, float]:
    """Training images of each class, if the manifest's rule determines them, with the mean for large classes; otherwise empty."""
    rule, classes = manifest.rule, manifest.classes
    if rare := rule.get("rare_images"):
        large = round((manifest.train - rare * (len(classes) - len(manifest.large))) / max(1, len(manifest.large)))
        return {name: float(large if name in manifest.large else rare) for name in classes}
    if rule.get("name") == "exponential" and rule.get("order", "name") == "name" and rule.get("max_per_class"):
        falls = [rule["imbalance"] ** -(rank / max(1, len(classes) - 1)) for rank in range(len(classes))]  # as data.subsets draws
        return {name: float(max(1, int(rule["max_per_class"] * fall + 1e-9))) for name, fall in zip(classes, falls, strict=True)}
    return {}


def class_accuracy(params: Params, records: Records, subsets: Sequence[str]) -> Figure | None:
    """Accuracy of every method against a class's training images; None if classes have one size or their sizes are unknown."""
    metric = first_metric(params)
    lines: list[Line] = []
    for name, mark, by_subset in _methods(params, subsets):
        points: dict[float, list[float]] = {}
        for runs in by_subset.values():
            manifest = records.runs[runs[0]].manifest
            sizes = training_images(manifest) if manifest else {}
            for cls, accuracy in by_class(records, runs, ("student", metric, "all")).items() if sizes else ():
                points.setdefault(sizes[cls], []).append(accuracy)
        lines += [(name, mark, [dict(sorted(points.items()))])] if len(points) > 1 else []
    if not lines:
        return None
    ticks = sorted({size for *_, [points] in lines for size in points})
    dots = sum(len(values) for *_, [points] in lines for values in points.values()) <= MOST_DOTS

    def draw() -> Canvas:
        titles, few = [f"{metric} accuracy of a class, %"], ticks if len(ticks) < 6 else ()
        return _against(lines, titles, "training images of the class", few, dots=dots)[0]

    caption = f"{'Dots: classes. ' if dots else ''}Lines: means over classes with equally many training images."
    title = f"Accuracy of each class against its number of training images, {metric}, student"
    return Figure(f"sizes-{subsets[0]}", title, caption, draw)


def confusions(params: Params, records: Records, subsets: Sequence[str], first: str, second: str) -> Figure | None:
    """The predictions of two methods for the queries of each class, summed over seeds and draws; None without predictions.

    Many classes are shown as the groups rare and large, and not at all if there are no such groups.
    """
    metric, marks = first_metric(params), {name: (mark, runs) for name, mark, runs in _methods(params, subsets)}
    panels = []
    for name in (first, second):
        mark, runs = marks[name]
        panels.append((name, mark, _answers(records, [run for subset in subsets for run in runs.get(subset, ())], metric)))
    if not all(counts for *_, counts in panels):
        return None
    rows, columns = (sorted({key[at] for *_, counts in panels for key in counts}) for at in (0, 1))

    def draw() -> Canvas:
        from matplotlib.colors import LinearSegmentedColormap

        room = max(len(_shorten(class_name(name), 24)) for name in rows) * 6.6 + 16
        figure, axes = canvas(2, 22 * len(rows) + 74, left=room, gap=room)
        for ax, (name, mark, counts) in zip(axes, panels, strict=True):
            sums = [max(1, sum(counts[row, column] for column in columns)) for row in rows]
            shares = [[counts[row, column] / whole for column in columns] for row, whole in zip(rows, sums, strict=True)]
            edges = [[at - 0.5 for at in range(len(names) + 1)] for names in (columns, rows)]
            shades = LinearSegmentedColormap.from_list("shares", [(mark, 0.0), (mark, 1.0)])
            ax.pcolormesh(*edges, shares, cmap=shades, vmin=0, vmax=1)
            for y, of_row in enumerate(shares):
                for x, share in enumerate(of_row):
                    if share >= 0.005 and len(columns) <= 12:
                        ax.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
            _rows(ax, [_shorten(class_name(row), 24) for row in rows])
            ax.set_xticks(range(len(columns)), columns)
            ax.grid(visible=False)
            ax.set(title=name, xlabel="prediction")
        return figure

    title = f"{first} and {second}: predictions for the queries of each class, percent ({metric}, student)"
    return Figure(f"confusions-{subsets[0]}", title, f"Predictions in percent of the queries of a row ({metric}, student).", draw)


def _answers(records: Records, runs: Sequence[str], metric: str) -> Counter[tuple[str, str]]:
    """Number of queries by class and prediction or, if there are many classes, by group and kind of prediction."""
    counts: Counter[tuple[str, str]] = Counter()
    for found in (records.runs[run].evaluation(metric) for run in runs):
        predicted = found.predictions.get(f"student/{metric}") if found else None
        if found is None or predicted is None:
            continue
        names, large = found.record.manifest.classes, set(found.record.manifest.large)
        group = ["large" if name in large else "rare" for name in names]
        pairs = zip(found.label.tolist(), predicted.tolist(), strict=True)
        if len(names) <= FEW_CLASSES:
            counts.update((names[label], names[answer]) for label, answer in pairs)
        elif large:
            counts.update((group[one], "right" if one == two else f"another class, {group[two]}") for one, two in pairs)
    return counts


def losses(params: Params, records: Records) -> Figure | None:
    """Mean loss by epoch, one panel per method (with all of its trials), one line per run; None if no run has trained."""
    panels: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for name, found in records.runs.items():
        curve = found.pretrain.curve if found.pretrain else ()
        if points := [(row["epoch"], row["loss"]) for row in curve if {"epoch", "loss"} <= row.keys()]:
            method = params.runs[name].method.name if params.report.trials else method_name(params, name)
            panels.setdefault(method, []).append((colour(params.runs[name]), points))
    if not panels:
        return None

    def draw() -> Canvas:
        figure, axes = canvas(len(panels), 150, left=44, gap=52)
        for ax, (label, runs) in zip(axes, panels.items(), strict=True):
            for mark, points in runs:
                many = {"alpha": 0.55} if len(runs) > 1 else {"marker": "."} if len(points) == 1 else {}
                ax.plot(*zip(*points, strict=True), color=mark, linewidth=1.6, **many)
            ax.set_title(_shorten(f"{label}, {len(runs)} runs" if len(runs) > 1 else label, 38))
            ax.locator_params(nbins=4)
            ax.set_xlabel("epoch")
        return figure

    caption = "Mean loss by epoch, one line per run. Methods minimise different losses, so panels cannot be compared."
    return Figure("loss-curves", "Training loss by epoch", caption, draw)


def trajectories(params: Params, found: Mapping[str, CurveRecord], subset: str, paper: Sequence[Reference] = ()) -> Figure | None:
    """First nearest-neighbour score by epoch of a subset's runs, and the paper's curves; None if there is neither."""
    metric = first_metric(params)
    names = names_of(params, found, subset, paper)
    values = {(name, group): by_epoch(found[name], metric, group) for name in names if name in found for group in GROUPS}
    groups = [group for group in GROUPS if any(values.get((name, group)) for name in names)] or (["all"] if paper else [])
    if not groups:
        return None
    marks = {name: colour(params.runs[name]) for name in names}

    def draw() -> Canvas:
        figure, axes = canvas(len(groups), 260, left=44, gap=44, legend=1)
        ours: dict[str, Any] = {"student": "-", "teacher": (0, (5, 3))}
        theirs: dict[str, Any] = {"student": (0, (5, 3)), "teacher": (0, (1.5, 2))}
        for ax, group in zip(axes, groups, strict=True):
            for name in names:
                for encoder, points in values.get((name, group), {}).items():
                    line = [(epoch, score.top1) for epoch, score in points]
                    ax.plot(*zip(*line, strict=True), color=marks[name], linestyle=ours[encoder], marker=".")
            for one in paper if group == "all" else ():
                line = [(epoch, cell.value or 0.0) for epoch, cell in one.points.items()]
                style = {"linestyle": theirs[one.encoder], "linewidth": 1, "marker": "s", "markersize": 2.5}
                ax.plot(*zip(*line, strict=True), color=marks[one.run], alpha=0.8, **style)
            ax.set(title=f"{group.capitalize()} queries", xlabel="epoch")
            ax.sharey(axes[0])
        axes[0].set_ylabel(f"{metric} accuracy, %")
        known = [(params.runs[name].label + ("" if name in found else " (not run)"), {"color": marks[name]}) for name in names]
        _legend(figure, [*known, *((encoder, {"color": UNTRAINED, "linestyle": ours[encoder]}) for encoder in ours)], 6)
        return figure

    beside = " Thin lines with squares: the paper's Figure 2, digitised (dashed: student, dotted: teacher)." if paper else ""
    title = f"{subset}: {metric} accuracy by epoch, percent"
    caption = f"Encoders saved during training; solid: student, dashed: teacher.{beside}"
    return Figure(f"trajectory-{subset}", title, caption, draw)


def class_sizes(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """Training images of each class, largest first, one line per set; `counts` is by set and class."""
    marks = [*COLOURS.values(), *OTHERS]

    def draw() -> Canvas:
        figure, (ax,) = canvas(1, 300, left=52, legend=math.ceil(len(counts) / 4))
        lines = []
        for at, (name, sizes) in enumerate(counts.items()):
            style = {"color": marks[at % len(marks)], "linestyle": _DASHES[at // len(marks) % len(_DASHES)]}
            ax.step(range(1, len(sizes) + 1), sorted(sizes.values(), reverse=True), where="mid", lw=1.6, **style)
            lines.append((name, style))
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set(xlabel="classes, largest first", ylabel="training images")
        _legend(figure, lines, 4)
        return figure

    return Figure("class-sizes", "Training images by class", "Classes in the order of their size.", draw)


def embedding(facts: Mapping[str, Any]) -> Figure:
    """The t-SNE panels of a run, from the `tsne` part of `figures.json`."""
    classes, panels = facts["classes"], facts["panels"]

    def draw() -> Canvas:
        import matplotlib as mpl

        figure, axes = canvas(len(panels), 340, left=8, gap=16, legend=math.ceil(len(classes) / 5), labels=4)
        marks = [mpl.colormaps["tab10"](at) for at in range(len(classes))]
        for ax, panel in zip(axes, panels, strict=True):
            ax.scatter(
                *zip(*panel["points"], strict=True), s=12, c=[marks[at] for at in facts["class_of_point"]], alpha=0.8, lw=0
            )
            epoch = "Final encoder" if panel["epoch"] is None else f"Epoch {panel['epoch']}"
            ax.set_title(f"{epoch}: 1-NN here {panel['neighbours']:.1f} %")
            ax.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
            ax.spines[:].set(visible=True, alpha=0.3)
        _legend(figure, [(name, {"color": mark, "marker": "o", "lw": 0}) for name, mark in zip(classes, marks, strict=True)], 5)
        return figure

    title = f"t-SNE of {len(facts['class_of_point'])} validation images, {facts['encoder']}"
    return Figure("tsne", title, "Distances between groups, sizes of groups and the axes have no meaning.", draw)


def canvas(
    panels: int, height: float, *, left: float, gap: float = 24, legend: int = 0, labels: float = 40
) -> tuple[Canvas, list[Axes]]:
    """A figure with at most three panels per row; lengths are in px.

    `height` is of a row, including a title above and `labels` for the axis below its panels; `left` is the space for the labels
    of rows or values, `gap` that between the panels of a row, and `legend` the number of lines of the legend above all panels.
    """
    from matplotlib.figure import Figure as Canvas

    across, title, above = min(3, panels), 24.0, 20.0 * legend
    whole = above + height * math.ceil(panels / across)
    figure = Canvas(figsize=(WIDTH / 96, whole / 96))
    width, inner = (WIDTH - left - gap * (across - 1) - 8) / across, height - title - labels
    corners = [(left + at % across * (width + gap), above + at // across * height + title) for at in range(panels)]
    return figure, [figure.add_axes((x / WIDTH, 1 - (y + inner) / whole, width / WIDTH, inner / whole)) for x, y in corners]


def _against(
    lines: Sequence[Line], titles: Sequence[str], label: str, ticks: Sequence[float], *, dots: bool = True
) -> tuple[Canvas, list[Axes]]:
    """Panels with a line through each method's means, and with dots for the values, against a logarithmic axis."""
    figure, axes = canvas(len(titles), 260, left=44, gap=52, legend=math.ceil(len(lines) / 5))
    styles = [{"color": mark, "linestyle": _DASHES[row % len(_DASHES)]} for row, (_, mark, _) in enumerate(lines)]
    for at, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        for values, style in ((panels[at], style) for (*_, panels), style in zip(lines, styles, strict=True) if panels[at]):
            ax.plot(list(values), [fmean(found) for found in values.values()], **style, lw=1.6)
            if dots:
                points = [(x, value) for x, found in values.items() for value in found]
                ax.scatter(*zip(*points, strict=True), s=16, color=style["color"], alpha=0.8, lw=0)
        ax.set_xscale("log")
        if ticks:
            ax.set_xticks(ticks, [f"{one:g}" for one in ticks])
            ax.minorticks_off()
        ax.set(title=title, xlabel=label)
    _legend(figure, [(name, style) for (name, *_), style in zip(lines, styles, strict=True)], 5)
    return figure, axes


def _rows(ax: Axes, names: Sequence[str]) -> None:
    """Named rows from the top down; grid lines along the values alone."""
    ax.set_yticks(range(len(names)), [_shorten(name, 34) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")


def _legend(canvas: Canvas, entries: Sequence[tuple[str, dict[str, Any]]], columns: int) -> None:
    """A legend of names and line styles above all panels, for names that begin with any character."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **style, label=f"{at}") for at, (_, style) in enumerate(entries)]
    names = [_shorten(name, 34) for name, _ in entries]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 1), "ncols": min(columns, len(lines))}
    plain = [name.lstrip("_") or "-" for name in names]
    legend = canvas.legend(lines, plain, borderaxespad=0.4, borderpad=0, frameon=False, **place)
    for entry, name in zip(legend.get_texts(), names, strict=True):
        entry.set_text(name)


def _shorten(label: str, length: int) -> str:
    label = visible(label)
    return label if len(label) <= length else f"{label[: length - 1]}\N{HORIZONTAL ELLIPSIS}"
