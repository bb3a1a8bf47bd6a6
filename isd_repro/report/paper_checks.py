"""Checks of the paper's printed numbers: which of them do not add up, and the difference of two methods over draws.

The command `paper check` prints the result. It needs no profile, no images and no runs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal

from isd_repro.report import intervals, paper, text
from isd_repro.report.paper import DifferenceCheck, MeanCheck, Paper, PaperTable, Tolerance, Value

HALF = Decimal("0.05")  # what rounding to one decimal can hide
Agreement = Literal["adds up", "within rounding", "does not add up"]


@dataclass(frozen=True)
class Check:
    """One printed mean or difference, recomputed.

    It `adds up` if the recomputed value rounds to the printed one, is `within rounding` if unrounded numbers could have given
    both, and otherwise `does not add up`.
    """

    table: str  # its id
    where: str  # row and column
    rule: str  # the formula that was recomputed, with its numbers
    printed: Decimal  # percent or points
    recomputed: Decimal  # from the printed numbers, not rounded
    outcome: Agreement
    corrected: Agreement | None  # the outcome with the corrected numbers; None if no number in it is corrected
    why: str  # the reason for the correction

    @property
    def sentence(self) -> str:
        """The check as a sentence, with the correction."""
        first = f"{self.where}: {self.rule} = {text.decimal(float(self.recomputed), 2)}, printed {self.printed}: {self.outcome}"
        return f"{first}; {self.why}" if self.why else first


def checks(published: Paper) -> list[Check]:
    """Every mean and every difference that the published tables print, in order."""
    every = [(table, check) for table in published.tables for check in table.checks]
    return [done for of, rule in every for done in (_means(of, rule) if isinstance(rule, MeanCheck) else _differences(of, rule))]


def _means(table: PaperTable, check: MeanCheck) -> Iterator[Check]:
    for name, row in table.rows.items():
        parts = [value for column in check.of if (value := table.value(name, column))]
        mean = table.value(name, check.equals)
        if mean is not None and len(parts) == len(check.of):
            where = f"{row.label}, {table.columns[check.equals].head}"
            yield _check(table, where, f"mean of {len(parts)}", parts, mean, [Decimal(1) / len(parts)] * len(parts))


def _differences(table: PaperTable, check: DifferenceCheck) -> Iterator[Check]:
    for draw in table.draws:
        for column, about in table.columns.items():
            named = (check.minuend, check.subtrahend, check.equals)
            first, second, difference = (table.of_draw(name, draw, column) for name in named)
            if first and second and difference:
                rule = f"{check.minuend} {first.printed} {text.MINUS} {check.subtrahend} {second.printed}"
                yield _check(table, f"{draw}, {about.head}", rule, [first, second], difference, [Decimal(1), Decimal(-1)])


def _check(table: PaperTable, where: str, rule: str, parts: list[Value], whole: Value, weights: list[Decimal]) -> Check:
    """Compare a printed number with the weighted sum of others."""
    hidden = HALF * (1 + sum(abs(weight) for weight in weights))

    def outcome(numbers: list[Decimal], said: Decimal) -> tuple[Decimal, Agreement]:
        total = sum((weight * number for weight, number in zip(weights, numbers, strict=True)), Decimal(0))
        off = abs(total - said)
        return total, "adds up" if off <= HALF else "within rounding" if off <= hidden else "does not add up"

    recomputed, found = outcome([part.printed for part in parts], whole.printed)
    misprints = [value for value in (*parts, whole) if value.corrected is not None]
    again = outcome([part.value for part in parts], whole.value)[1] if misprints else None
    words = "; ".join(f"{value.printed} must be {value.corrected}: {value.why}" for value in misprints)
    return Check(table.id, where, rule, whole.printed, recomputed, found, again, words)


@dataclass(frozen=True)
class Gain:
    """One method against another over the draws of a published table, in one group of queries."""

    head: str
    group: str
    metric: str  # our number for the group
    column: str  # the paper's; empty if the group is implied by two printed groups
    tolerance: Tolerance | None  # for the mean difference
    first: float  # mean of each method, percent
    second: float
    differences: tuple[float, ...]  # points, in the table's order of draws, with corrected values
    paired: intervals.Paired  # of the mean difference
    hidden: float  # the largest change of one difference, in points, that rounding can cause
    hidden_mean: float  # standard deviation of the mean difference due to rounding, if rounding errors are independent


def gains(table: PaperTable) -> list[Gain]:
    """The comparison in a table of draws, with a mean, interval and test that the paper lacks; the implied group is last."""
    pair = table.difference
    if pair is None:
        return []
    sides = {
        column: [
            [value.value for draw in table.draws if (value := table.of_draw(method, draw, column)) is not None]
            for method in (pair.minuend, pair.subtrahend)
        ]
        for column in table.columns
    }
    found = [
        _gain((about.head, about.group, about.metric or "", column, about.mean_difference), sides[column], (1.0,))
        for column, about in table.columns.items()
    ]
    if rule := table.implied:
        both = zip(sides[rule.whole], sides[rule.part], strict=True)
        implied = [[rule.of(*values) for values in zip(whole, part, strict=True)] for whole, part in both]
        rest = rule.classes - rule.part_classes
        about = (rule.head, rule.group, table.columns[rule.whole].metric or "", "", rule.mean_difference)
        found.append(_gain(about, implied, (rule.classes / rest, rule.part_classes / rest)))
    return found


def _gain(about: tuple[str, str, str, str, Tolerance | None], sides: list[list[Decimal]], weights: tuple[float, ...]) -> Gain:
    differences = tuple(float(a - b) for a, b in zip(*sides, strict=True))
    means = [float(sum(side, Decimal(0)) / len(side)) for side in sides]
    deviation = 2 * float(HALF) / math.sqrt(12)  # of a rounding error, uniform on +-0.05
    one = math.sqrt(2 * sum(weight * weight for weight in weights)) * deviation
    hidden, hidden_mean = 2 * sum(weights) * float(HALF), one / math.sqrt(len(differences))
    return Gain(*about, means[0], means[1], differences, intervals.paired(differences), hidden, hidden_mean)


def check(*, as_json: bool = False) -> None:
    """Print which printed means and differences do not add up, what the draws say, and where the sources disagree."""
    published = paper.load()
    found = checks(published)
    if as_json:
        exact = json.dumps(_tree(published, found), default=float)
        rounded = json.loads(exact, parse_float=lambda number: round(float(number), 6))  # so that sums in binary do not show
        sys.stdout.write(f"{json.dumps(rounded, indent=1, sort_keys=True, ensure_ascii=False)}\n")
        return
    odd, titles = [one for one in found if one.outcome != "adds up"], {table.id: table.title for table in published.tables}
    lines = [f"Computed: {len(found)} printed means and differences, {len(odd)} do not add up as printed."]
    lines += [f"- {titles[one.table]}: {one.sentence}." for one in odd]
    for table in published.tables:
        if pair := table.difference:
            versus = f"{pair.minuend} {text.MINUS} {pair.subtrahend}"
            lines += ["", f"Computed: {table.title}, {versus} in points, misprints corrected."]
            lines += [f"- {gain.head}: mean {text.signed(gain.paired.mean, 2)}; {gain.paired.words}" for gain in gains(table)]
    lines += ["", f"Read, not computed: {len(published.disagreements)} disagreements between sources."]
    for item in published.disagreements:
        said = "; ".join(f"{published.sources[source].name}: {words}" for source, words in item.says.items())
        lines.append(f"- {item.about}. {said}. Verdict: {item.verdict} (confidence {item.confidence}).")
    lines += ["", "Not found in any source that was read:", *(f"- {words}" for words in published.absent)]
    sys.stdout.write("\n".join([*lines, ""]))


def _tree(published: Paper, found: list[Check]) -> dict[str, Any]:
    return {
        "computed": {
            "checks": [{**asdict(one), "sentence": one.sentence} for one in found],
            "gains": {
                table.id: [{**asdict(gain), "tolerance": gain.tolerance and gain.tolerance.points} for gain in gains(table)]
                for table in published.tables
                if table.difference
            },
        },
        "read": [item.model_dump(mode="json") for item in published.disagreements],
        "absent": list(published.absent),
        "sources": {name: source.model_dump() for name, source in published.sources.items()},
    }
