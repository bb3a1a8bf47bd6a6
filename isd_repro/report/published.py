"""What follows from the paper's printed numbers alone: which do not add up, and what they say of two methods over draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from isd_repro.report import intervals, text
from isd_repro.report.paper import DifferenceCheck, MeanCheck, Paper, PaperTable, Value

HALF = Decimal("0.05")  # what rounding to one decimal can hide
Outcome = Literal["adds up", "within rounding", "does not add up"]


@dataclass(frozen=True)
class Check:
    """One printed mean or difference, recomputed.

    Attributes:
        table, where: the table's id, and row and column in words.
        rule: what was recomputed, with its numbers.
        printed, recomputed: percent or points; `recomputed` from the printed numbers, before rounding.
        outcome: `adds up` where the recomputed value rounds to the printed one, `within rounding` where unrounded numbers could
            have given both, else `does not add up`.
        mended: the same with the corrected numbers; None where nothing in it is corrected.
        why: the reason of the correction.
    """

    table: str
    where: str
    rule: str
    printed: Decimal
    recomputed: Decimal
    outcome: Outcome
    mended: Outcome | None
    why: str

    @property
    def sentence(self) -> str:
        """The check in words, with the correction."""
        first = f"{self.where}: {self.rule} = {text.decimal(float(self.recomputed), 2)}, printed {self.printed}: {self.outcome}"
        return f"{first}; {self.why}" if self.why else first


def checks(paper: Paper) -> list[Check]:
    """Every mean and every difference that the published tables print, in order."""
    found: list[Check] = []
    for table in paper.tables:
        for check in table.checks:
            found += _means(table, check) if isinstance(check, MeanCheck) else _differences(table, check)
    return found


def _means(table: PaperTable, check: MeanCheck) -> Iterator[Check]:
    for name, row in table.rows.items():
        values = [table.value(name, column) for column in check.of]
        mean = table.value(name, check.equals)
        if mean is not None and all(value is not None for value in values):
            parts = [value for value in values if value is not None]
            where = f"{row.label}, {table.columns[check.equals].head}"
            yield _check(table, where, f"mean of {len(parts)}", parts, mean, [Decimal(1) / len(parts)] * len(parts))


def _differences(table: PaperTable, check: DifferenceCheck) -> Iterator[Check]:
    for draw in table.draws:
        for column, about in table.columns.items():
            values = [table.of_draw(method, draw, column) for method in (check.minuend, check.subtrahend, check.equals)]
            if all(value is not None for value in values):
                first, second, difference = (value for value in values if value is not None)
                rule = f"{check.minuend} {first.printed} {text.MINUS} {check.subtrahend} {second.printed}"
                yield _check(table, f"{draw}, {about.head}", rule, [first, second], difference, [Decimal(1), Decimal(-1)])


def _check(table: PaperTable, where: str, rule: str, parts: list[Value], whole: Value, weights: list[Decimal]) -> Check:
    """A printed number against the weighted sum of others."""
    hidden = HALF * (1 + sum(abs(weight) for weight in weights))

    def outcome(numbers: list[Decimal], said: Decimal) -> tuple[Decimal, Outcome]:
        total = sum((weight * number for weight, number in zip(weights, numbers, strict=True)), Decimal(0))
        off = abs(total - said)
        return total, "adds up" if off <= HALF else "within rounding" if off <= hidden else "does not add up"

    recomputed, found = outcome([part.printed for part in parts], whole.printed)
    mended = [value for value in (*parts, whole) if value.corrected is not None]
    again = outcome([part.value for part in parts], whole.value)[1] if mended else None
    words = "; ".join(f"{value.printed} must be {value.corrected}: {value.why}" for value in mended)
    return Check(table.id, where, rule, whole.printed, recomputed, found, again, words)


@dataclass(frozen=True)
class Gain:
    """One method against another over the draws of a published table, in one group of queries.

    Attributes:
        head, group: the group; implied groups say so.
        implied: computed from two printed groups.
        first, second: mean of either method, percent.
        differences: by draw, points, in the table's order of draws; of corrected values.
        paired: what they say of their mean.
        hidden: points by which rounding alone can move one difference, at most.
        hidden_mean: standard deviation that rounding alone gives the mean difference, if rounding errors are independent.
    """

    head: str
    group: str
    implied: bool
    first: float
    second: float
    differences: tuple[float, ...]
    paired: intervals.Paired
    hidden: float
    hidden_mean: float


def gains(table: PaperTable) -> list[Gain]:
    """The comparison that a table of draws prints, with the mean, interval and test that it does not; the implied group last."""
    contest = table.contest
    if contest is None:
        return []
    sides = {
        column: [
            [value.value for draw in table.draws if (value := table.of_draw(method, draw, column)) is not None]
            for method in (contest.minuend, contest.subtrahend)
        ]
        for column in table.columns
    }
    found = [
        _gain(table.columns[column].head, table.columns[column].group, first, second, (1.0,))
        for column, (first, second) in sides.items()
    ]
    if table.implied:
        rule = table.implied
        pairs = zip(sides[rule.whole], sides[rule.part], strict=True)
        first, second = ([rule.of(*values) for values in zip(whole, part, strict=True)] for whole, part in pairs)
        rest = rule.classes - rule.part_classes
        weights = (rule.classes / rest, rule.part_classes / rest)
        found.append(_gain(rule.head, rule.group, first, second, weights, implied=True))
    return found


def _gain(
    head: str, group: str, first: list[Decimal], second: list[Decimal], weights: tuple[float, ...], *, implied: bool = False
) -> Gain:
    differences = tuple(float(a - b) for a, b in zip(first, second, strict=True))
    means = [float(sum(side, Decimal(0)) / len(side)) for side in (first, second)]
    deviation = 2 * float(HALF) / math.sqrt(12)  # of a rounding error, uniform on +-0.05
    one = math.sqrt(2 * sum(weight * weight for weight in weights)) * deviation
    hidden = 2 * sum(weights) * float(HALF)
    paired = intervals.paired(differences)
    return Gain(head, group, implied, means[0], means[1], differences, paired, hidden, one / math.sqrt(len(differences)))
