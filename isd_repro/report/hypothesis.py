"""The comparison that a profile exists to make: its mean over the draws, how sure that is, and a verdict by a rule set before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Literal

from isd_repro.config.params import Hypothesis, Params
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.findings import Finding
from isd_repro.report.pivot import draw_cell, families, methods
from isd_repro.report.records import Key, Records
from isd_repro.report.tables import ENCODERS, groups_of, metrics_of
from isd_repro.runtime.errors import ConfigError

INTERVALS = (
    "Differences in points. Over draws: Student's interval of the mean. Over classes: bootstrap of the mean by classes, all draws"
    " of a class together, with the runs as given; a class counts where it is of the group. Draws that share classes are not"
    " independent, which the first does not know."
)
CONTRAST = "rare less large"
Outcome = Literal["supported", "contradicted", "undecided", "no verdict"]


@dataclass(frozen=True)
class Comparison:
    """One method less another under one (encoder, metric, group), over the draws that have both.

    Attributes:
        draws: the subsets compared, with the difference of each in points, seeds averaged within it.
        first, second: mean scores in percent.
        classes: differences by class, one for each draw in which it is of the group; empty without stored predictions.
        runs: all runs behind it.
    """

    key: Key
    draws: dict[str, float]
    first: float
    second: float
    classes: dict[str, list[float]]
    runs: tuple[str, ...]

    @property
    def values(self) -> list[float]:
        """The differences, in the draws' order."""
        return list(self.draws.values())


def compared(params: Params, records: Records, asked: Hypothesis, key: Key) -> Comparison | None:
    """Everything that the records say of one comparison; None while no draw has both methods.

    Raises:
        ConfigError: no family of draws has both methods.
    """
    subsets, first, second = _sides(params, asked)
    draws: dict[str, float] = {}
    levels: list[tuple[float, float]] = []
    classes: dict[str, list[float]] = defaultdict(list)
    runs: list[str] = []
    for subset in subsets:
        ours, theirs = (draw_cell(records, side.get(subset, ()), key) for side in (first, second))
        if ours.value is None or theirs.value is None:
            continue
        draws[subset] = ours.value - theirs.value
        levels.append((ours.value, theirs.value))
        runs += [*ours.runs, *theirs.runs]
        mine, other = (by_class(records, side.runs, key) for side in (ours, theirs))
        for name in mine.keys() & other.keys():
            classes[name].append(mine[name] - other[name])
    if not draws:
        return None
    one, two = (fmean(side) for side in zip(*levels, strict=True))
    return Comparison(key, draws, one, two, dict(sorted(classes.items())), tuple(runs))


def _sides(params: Params, asked: Hypothesis) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """The draws, and the runs by draw of both methods."""
    known: list[str] = []
    for subsets in families(params):
        found = methods(params, subsets)
        if len(subsets) > 1 and asked.first in found and asked.second in found:
            return subsets, found[asked.first], found[asked.second]
        known += found if len(subsets) > 1 else []
    missing = text.listing([name for name in (asked.first, asked.second) if name not in known])
    raise ConfigError(
        f"report.hypothesis: {missing or 'the two'} is no method of repeated draws; there are {text.listing(known) or 'none'}",
        "name methods as the labels of their runs do, without subset and seed",
    )


def by_class(records: Records, runs: Sequence[str], key: Key) -> dict[str, float]:
    """Percent of each class's queries that are answered rightly, seeds averaged; only classes of the group."""
    encoder, metric, group = key
    shares: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        found = records.runs[run].evaluation(metric)
        hits = found.hits(encoder, metric, group) if found else None
        if found is None or hits is None:
            return {}
        labels = found.label[found.masks[group]]
        for at, name in enumerate(found.record.manifest.classes):
            of_class = hits[labels == at]
            if len(of_class):
                shares[name].append(100 * float(of_class.double().mean()))
    return {name: fmean(values) for name, values in shares.items()}


def outcome(asked: Hypothesis, values: Sequence[float]) -> Outcome:
    """By the rule: support where Student's interval lies above 0, contradiction where it lies below the stated bound."""
    interval = intervals.student_interval(values)
    if asked.contradicted_below is None or interval is None or len(values) < asked.draws:
        return "no verdict"
    low, high = interval
    if low > 0:
        return "supported"
    return "contradicted" if high < asked.contradicted_below else "undecided"


def table_of(params: Params, records: Records, asked: Hypothesis) -> Table | None:
    """The comparison that is asked for in the first row, below it the same two methods under every other key."""
    primary: Key = (asked.encoder, f"{asked.k}-NN", asked.group)
    subsets = _sides(params, asked)[0]
    found = [records.runs[run] for side in _sides(params, asked)[1:] for runs in side.values() for run in runs]
    groups = groups_of(params, records, subsets[0])
    keys = [
        (encoder, metric, group) for encoder in ENCODERS for metric, group in product(metrics_of(params, found, encoder), groups)
    ]
    ordered = [primary, *(key for key in keys if key != primary)]
    every = [done for key in ordered if (done := compared(params, records, asked, key))]
    if not every or every[0].key != primary:
        return None
    every += contrasts(every)
    columns = (
        Column("Mean", asked.first),
        Column("Mean", asked.second),
        *(Column(f"{asked.first} {text.MINUS} {asked.second}", word) for word in ("mean", "s.d.")),
        *(Column("95 %, over draws", word) for word in ("low", "high")),
        *(Column("95 %, over classes", word) for word in ("low", "high")),
        *(Column("Draws", word) for word in ("ahead", "behind")),
        Column("Sign-flip test", "p"),
    )
    rows = tuple(Row(_name(done.key), tuple(_cells(done))) for done in every)
    n = f"n = {len(every[0].draws)} of {len(subsets)} draws, those that have both methods; seeds averaged within a draw first."
    notes = (n, INTERVALS)
    title = f"{asked.first} against {asked.second} over the draws"
    return Table("hypothesis", title, "Queries", columns, rows, notes=notes, sortable=False)


def contrasts(every: Sequence[Comparison]) -> list[Comparison]:
    """By how much more the first method leads on rare queries than on large ones, draw by draw; no class is in both groups."""
    by_key = {done.key: done for done in every}
    found = []
    for (encoder, metric, group), rare in by_key.items():
        large = by_key.get((encoder, metric, "large"))
        if group != "rare" or large is None:
            continue
        draws = {name: value - large.draws[name] for name, value in rare.draws.items() if name in large.draws}
        levels = rare.first - large.first, rare.second - large.second
        found.append(Comparison((encoder, metric, CONTRAST), draws, *levels, {}, (*rare.runs, *large.runs)))
    return found


def _name(key: Key) -> str:
    encoder, metric, group = key
    return f"{group.capitalize()}, {metric}, {encoder}"


def _cells(done: Comparison) -> list[Cell]:
    paired, interval = intervals.paired(done.values), intervals.student_interval(done.values)
    clusters = intervals.bootstrap(list(done.classes.values())) if len(done.classes) > 1 else None
    numbers: list[tuple[float | None, str]] = [
        (done.first, text.decimal(done.first, 2)),
        (done.second, text.decimal(done.second, 2)),
        (paired.mean, text.signed(paired.mean, 2)),
        (paired.deviation, "" if paired.deviation is None else text.decimal(paired.deviation, 2)),
        *((bound, text.signed(bound, 2)) if bound is not None else (None, "") for bound in interval or (None, None)),
        *((bound, text.signed(bound, 2)) if bound is not None else (None, "") for bound in clusters or (None, None)),
        (paired.above, str(paired.above)),
        (paired.below, str(paired.below)),
        (paired.p, f"{paired.p:.3f}"),
    ]
    over = f"over {text.listing(list(done.draws))}"
    encoder, metric, group = done.key
    key = encoder, metric, "rare" if group == CONTRAST else group  # what a cell's verdict looks up
    return [Cell("statistic", done.runs, *key, value, detail=over, words=words or text.ABSENT) for value, words in numbers]


def finding(params: Params, records: Records, asked: Hypothesis) -> Finding:
    """The verdict in a sentence, with the numbers that the rule looks at."""
    key: Key = (asked.encoder, f"{asked.k}-NN", asked.group)
    lead = f"{asked.first} above {asked.second} on {asked.group} queries ({key[1]}, {asked.encoder})"
    done = compared(params, records, asked, key)
    subsets = _sides(params, asked)[0]
    if done is None:
        return Finding(lead, f"not known: no draw of {len(subsets)} has both methods.")
    verdict, values = outcome(asked, done.values), done.values
    said = f"{text.signed(fmean(values), 2)} points on average over {len(values)} of {len(subsets)} draws"
    if interval := intervals.student_interval(values):
        said += f", 95 % interval {_range(interval)} over draws"
    if len(done.classes) > 1:
        said += f" and {_range(intervals.bootstrap(list(done.classes.values())))} over {len(done.classes)} classes"
    if asked.contradicted_below is None:
        return Finding(lead, f"{said}. A secondary outcome, without a verdict.")
    if len(values) < asked.draws:
        return Finding(lead, f"no verdict: {said}; the rule asks for {asked.draws} draws or more.")
    return Finding(
        lead,
        f"{verdict}: {said}. The rule, set before the runs: supported if the interval over draws lies above 0, contradicted if"
        f" its upper end is below {text.signed(asked.contradicted_below)}, undecided otherwise.",
    )


def _range(interval: tuple[float, float]) -> str:
    return f"{text.signed(interval[0], 2)} to {text.signed(interval[1], 2)}"
