"""The difference of two methods over draws of a subset: means, intervals, tests, and the verdict of a rule fixed beforehand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean
from typing import Literal

from isd_repro.config.params import Hypothesis, Params
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Row, Statement, Table
from isd_repro.report.intervals import Paired
from isd_repro.report.repetitions import families, methods, under_test
from isd_repro.report.run_records import Key, Records
from isd_repro.report.scores import method_cell
from isd_repro.report.tables import ENCODERS, first_metric, groups_of, metrics_of
from isd_repro.runtime.errors import ConfigError

NOTE = (
    "Differences in points. Over draws: Student's interval of the mean. Over classes: bootstrap of the mean by classes, all draws"
    " of a class together, with the runs as given; a class counts if it is in the group. The first interval does not account for"
    " draws that share classes and are not independent."
)
WITHIN = (
    "Within classes: each class that is rare in some draws and large in others is compared with itself; the interval is Student's"
    " over these classes."
)
OVER_DRAWS, OVER_CLASSES = "95 %, over draws", "95 %, over classes"
Outcome = Literal["supported", "contradicted", "undecided", "no verdict"]
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """One method minus another for one (encoder, metric, group), over the draws that have both."""

    key: Key
    draws: dict[str, float]  # the compared subsets with their differences in points, averaged over seeds
    first: float  # mean score in percent
    second: float
    classes: dict[str, list[tuple[float, float]]]  # both methods' scores in each draw in which the class is in the group
    runs: tuple[str, ...]  # all that contribute
    queries: str = ""  # what is compared, if it is not the queries of one group

    @property
    def name(self) -> str:
        """The name of the row."""
        encoder, metric, group = self.key
        return f"{self.queries or group.capitalize()}, {metric}, {encoder}"

    @property
    def values(self) -> list[float]:
        """The differences, in the draws' order."""
        return list(self.draws.values())

    @property
    def by_class(self) -> dict[str, list[float]]:
        """The differences by class."""
        return {name: [one - two for one, two in pairs] for name, pairs in self.classes.items()}

    @property
    def over_classes(self) -> Interval:
        """The interval from resampling classes; None if fewer than two are known."""
        return intervals.bootstrap(list(self.by_class.values())) if len(self.classes) > 1 else None


Runs = dict[str, list[str]]  # of one method, by subset


def compared(params: Params, records: Records, asked: Hypothesis, key: Key) -> Comparison | None:
    """All results of the stated comparison from the records; None while no draw has both methods.

    Raises:
        ConfigError: no family of draws has both methods.
    """
    return _compare(records, *_sides(params, asked), key)


def _compare(records: Records, subsets: Sequence[str], first: Runs, second: Runs, key: Key) -> Comparison | None:
    draws: dict[str, float] = {}
    levels: list[tuple[float, float]] = []
    classes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    runs: list[str] = []
    for subset in subsets:
        ours, theirs = (method_cell(records, side.get(subset, ()), key) for side in (first, second))
        if ours.value is None or theirs.value is None:
            continue
        draws[subset] = ours.value - theirs.value
        levels.append((ours.value, theirs.value))
        runs += [*ours.runs, *theirs.runs]
        mine, other = (by_class(records, side.runs, key) for side in (ours, theirs))
        for name in mine.keys() & other.keys():
            classes[name].append((mine[name], other[name]))
    if not draws:
        return None
    one, two = (fmean(side) for side in zip(*levels, strict=True))
    return Comparison(key, draws, one, two, dict(sorted(classes.items())), tuple(runs))


def _sides(params: Params, asked: Hypothesis) -> tuple[list[str], Runs, Runs]:
    """The draws, and the runs by draw of both methods."""
    known: list[str] = []
    for subsets in families(params):
        found = methods(params, subsets)
        if len(subsets) > 1 and asked.first in found and asked.second in found:
            return subsets, found[asked.first], found[asked.second]
        known += found if len(subsets) > 1 else []
    missing = text.listing([name for name in (asked.first, asked.second) if name not in known])
    raise ConfigError(
        f"report.hypothesis: no repeated draws of {missing or 'both methods'}; known: {text.listing(known) or 'none'}",
        "name methods by their runs' labels, without subset and seed",
    )


def by_class(records: Records, runs: Sequence[str], key: Key) -> dict[str, float]:
    """Accuracy in percent on each class of the group, averaged over seeds."""
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
                shares[name].append(100 * float(of_class.mean()))
    return {name: fmean(values) for name, values in shares.items()}


def within_class(rare: Mapping[str, Sequence[float]], large: Mapping[str, Sequence[float]]) -> list[float]:
    """Difference rare minus large for each class that is rare in some sets and large in others, with averages of its values.

    Rare and large queries of one set come from different classes, and classes differ more than methods do. Over several sets most
    classes are rare in some and large in others, so each class can be compared with itself.
    """
    return [fmean(rare[cls]) - fmean(large[cls]) for cls in sorted(rare.keys() & large.keys()) if rare[cls] and large[cls]]


def hypothesis_table(params: Params, records: Records, asked: Hypothesis) -> Table | None:
    """A table with the stated comparison in the first row, followed by the same two methods for every other key."""
    primary: Key = (asked.encoder, f"{asked.k}-NN", asked.group)
    subsets, first, second = _sides(params, asked)
    found = [records.runs[run] for side in (first, second) for runs in side.values() for run in runs]
    groups = groups_of(params, records, subsets[0])
    keys = [(encoder, *key) for encoder in ENCODERS for key in product(metrics_of(params, found, encoder), groups)]
    ordered = [primary, *(key for key in keys if key != primary)]
    comparisons = [done for key in ordered if (done := _compare(records, subsets, first, second, key))]
    if not comparisons or comparisons[0].key != primary:
        return None
    title = f"{asked.first} against {asked.second} over the draws"
    return comparison_table("hypothesis", title, (asked.first, asked.second), comparisons, len(subsets))


def family_tables(params: Params, records: Records, subsets: Sequence[str]) -> list[Table]:
    """Tables of the method under test minus each other method over the draws (student, first metric), without the stated pair."""
    asked = params.report.hypothesis
    of_method, (subject, others) = methods(params, subsets), under_test(params, subsets)
    tables = []
    for other in others if subject else ():
        if asked and {asked.first, asked.second} == {subject, other}:
            continue
        keys = [("student", first_metric(params), group) for group in groups_of(params, records, subsets[0])]
        sides = of_method[str(subject)], of_method[other]
        comparisons = [done for key in keys if (done := _compare(records, subsets, *sides, key))]
        title = f"{subject} against {other}, {subsets[0]} to {subsets[-1]}"
        if comparisons:
            name = f"{subsets[0]}-{subsets[-1]}-against-{other}"
            tables.append(comparison_table(name, title, (str(subject), other), comparisons, len(subsets)))
    return tables


def _contrast(rare: Comparison, large: Comparison) -> Comparison:
    """The difference on rare queries minus the difference on large queries, by draw; no class is in both groups."""
    draws = {name: value - large.draws[name] for name, value in rare.draws.items() if name in large.draws}
    levels = rare.first - large.first, rare.second - large.second
    return Comparison(rare.key, draws, *levels, {}, (*rare.runs, *large.runs), "Rare less large")


def _within_classes(rare: Comparison, large: Comparison) -> Row | None:
    """Rare minus large within classes that are rare in some draws and large in others, by method and for their difference."""
    difference = within_class(rare.by_class, large.by_class)
    interval = intervals.student_interval(difference) if difference else None
    if interval is None:
        return None
    levels = []
    for at in (0, 1):
        of_method = ({name: [pair[at] for pair in pairs] for name, pairs in one.classes.items()} for one in (rare, large))
        levels.append(fmean(within_class(*of_method)))
    detail = f"over {len(difference)} classes that are rare in some draws and large in others"
    blank = Cell("statistic", (*rare.runs, *large.runs), *rare.key, detail=detail)
    numbers = [fmean(difference), None, None, None, *interval, None, None, None]
    words = [text.decimal(level, 2) for level in levels] + [
        text.ABSENT if one is None else text.signed(one, 2) for one in numbers
    ]
    cells = [replace(blank, value=value, words=said) for value, said in zip([*levels, *numbers], words, strict=True)]
    return Row(f"Rare less large within {len(difference)} classes, {rare.key[1]}, {rare.key[0]}", tuple(cells))


def comparison_table(name: str, title: str, pair: tuple[str, str], comparisons: Sequence[Comparison], draws: int) -> Table:
    """A table with a row for each comparison of two methods, then rare minus large, over the draws and within classes."""
    by_key = {done.key: done for done in comparisons}
    both_groups = [
        (rare, by_key[encoder, metric, "large"])
        for (encoder, metric, group), rare in by_key.items()
        if group == "rare" and (encoder, metric, "large") in by_key
    ]
    rows = []
    for done in (*comparisons, *(_contrast(*groups) for groups in both_groups)):
        blank = Cell("statistic", done.runs, *done.key, detail=f"over {text.listing(list(done.draws))}")
        both = (intervals.student_interval(done.values), done.over_classes)
        cells = statistic_cells(blank, (done.first, done.second), intervals.paired(done.values), both)
        cells[2] = replace(cells[2], detail=", ".join(f"{draw} {text.signed(value, 2)}" for draw, value in done.draws.items()))
        rows.append(Row(done.name, tuple(cells)))
    within = [row for groups in both_groups if (row := _within_classes(*groups))]
    n = f"n = {len(comparisons[0].draws)} of {draws} draws, those with both methods; seeds are averaged within a draw first."
    columns = statistic_columns(*pair, (OVER_DRAWS, OVER_CLASSES))
    notes = (n, NOTE, *([WITHIN] if within else []))
    return Table(name, title, "Queries", columns, (*rows, *within), notes=notes, sortable=False)


def statistic_columns(first: str, second: str, named: Sequence[str]) -> tuple[Column, ...]:
    """The columns of a table of differences over draws; `named` are its intervals."""
    return (
        *(Column("Mean", method) for method in (first, second)),
        *(Column(f"{first} {text.MINUS} {second}", word) for word in ("mean", "s.d.")),
        *(Column(interval, word) for interval in named for word in ("low", "high")),
        *(Column("Draws", word) for word in ("ahead", "behind")),
        Column("Sign-flip test", "p"),
    )


def statistic_cells(blank: Cell, means: tuple[float, float], paired: Paired, found: Sequence[Interval]) -> list[Cell]:
    """The cells of these columns."""
    bounds = [bound for interval in found for bound in interval or (None, None)]
    numbers: list[tuple[float | None, str]] = [
        *((mean, text.decimal(mean, 2)) for mean in means),
        (paired.mean, text.signed(paired.mean, 2)),
        (paired.deviation, "" if paired.deviation is None else text.decimal(paired.deviation, 2)),
        *((bound, "" if bound is None else text.signed(bound, 2)) for bound in bounds),
        *((count, str(count)) for count in (paired.above, paired.below)),
        (paired.p, f"{paired.p:.3f}" if paired.n > 1 else ""),
    ]
    return [replace(blank, value=value, words=words or text.ABSENT) for value, words in numbers]


def outcome(asked: Hypothesis, values: Sequence[float]) -> Outcome:
    """The verdict by the rule: supported if Student's interval is above 0, contradicted if it is below the stated bound."""
    interval = intervals.student_interval(values)
    if asked.contradicted_below is None or interval is None or len(values) < asked.draws:
        return "no verdict"
    low, high = interval
    if low > 0:
        return "supported"
    return "contradicted" if high < asked.contradicted_below else "undecided"


def finding(params: Params, records: Records, asked: Hypothesis) -> Statement:
    """The verdict as a sentence, with the numbers that the rule uses and the profile's reading of the verdict."""
    key: Key = (asked.encoder, f"{asked.k}-NN", asked.group)
    lead = f"{asked.first} above {asked.second} on {asked.group} queries ({key[1]}, {asked.encoder})"
    done, subsets = compared(params, records, asked, key), _sides(params, asked)[0]
    if done is None:
        return Statement(lead, f"unknown: none of the {len(subsets)} draws has runs of both methods.")
    verdict, values = outcome(asked, done.values), done.values
    said = f"{text.signed(fmean(values), 2)} points on average over {len(values)} of {len(subsets)} draws"
    if interval := intervals.student_interval(values):
        said += f", 95 % interval {text.span(interval)} over draws"
    if interval := done.over_classes:
        said += f" and {text.span(interval)} over {len(done.classes)} classes"
    if asked.contradicted_below is None:
        return Statement(lead, f"{said}. A secondary outcome, without a verdict.")
    if verdict == "no verdict":
        return Statement(lead, f"no verdict: {said}; the rule requires {asked.draws} draws or more.")
    reading = f" {asked.readings[verdict]}" if verdict in asked.readings else ""
    return Statement(
        lead,
        f"{verdict}: {said}.{reading} {_registered(records, asked, done.runs)}: supported if the interval over draws lies"
        f" above 0, contradicted if its upper end is below {text.signed(asked.contradicted_below)}, undecided otherwise.",
    )


def _registered(records: Records, asked: Hypothesis, runs: Sequence[str]) -> str:
    """The rule with the commits that show when it was set, which `verify` checks in git."""
    if asked.registered is None:
        return "The rule (when it was set is not stated here; `isd-repro verify` checks this with git)"
    made = [one.provenance for run in runs for one in records.runs[run].records.values()]
    first = min(made, key=lambda one: one.written).commit
    since = f"since commit {asked.registered[:12]}, first record at commit {first[:12] if first else 'unknown'}"
    return f"The rule ({since}; `isd-repro verify` checks this with git)"
