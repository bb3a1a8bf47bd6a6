"""Format-independent tables: rows, columns, and cells with the source of each number."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from isd_repro.evaluations import kind_of
from isd_repro.report import text
from isd_repro.report.run_records import RECORDED

Kind = Literal[
    "score", "snapshot", "external", "difference", "mean", "statistic", "not run", "none", "paper", "against", "computed"
]
Verdict = Literal["", "within", "outside", "not comparable"]


@dataclass(frozen=True)
class Printed:
    """A number of the paper: its place, and its correction if it is misprinted.

    Attributes:
        table, row, column: place in `paper.yaml`.
        where: the place as text, with the paper's version.
        printed, corrected: percent; `corrected` is None if the printed number is right.
        why: reason for the correction.
        source: the publication that was read; `borrowed` if it is not the paper's own table.
    """

    table: str
    row: str
    column: str
    where: str
    printed: float
    corrected: float | None
    why: str
    source: str
    borrowed: bool
    confidence: str


@dataclass(frozen=True)
class Cell:
    """One cell; `value` is in percent or points, and None if the cell has no number.

    Attributes:
        kind: ours: a score of one run, of a snapshot of it or of an evaluated checkpoint, a difference of two, a mean over seeds
            or draws, a `statistic` of differences over draws (a bound, a deviation, a count, p), `not run`, or `none` where no
            number can exist; the paper's: a number as printed or corrected (`paper`), or `computed` from its printed ones;
            `against` is ours less the paper's.
        runs: the runs from which the number comes.
        correct, n, level: only for a score.
        low, high: 95 % interval: Wilson's for a score, in percent; the bootstrap's for a mean difference, in points.
        deviation, count: standard deviation over `count` seeds or draws of a mean.
        detail: how a number that is not a score was computed, or why there is no number.
        best: whether it is the largest of the values with which it is compared.
        paper: the published number that the cell shows or is compared with.
        verdict, tolerance: only for `against`; the tolerance is in points.
        words: text that is shown instead of the value.
    """

    kind: Kind
    runs: tuple[str, ...] = ()
    encoder: str = ""
    metric: str = ""
    group: str = ""
    value: float | None = None
    correct: int | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    deviation: float | None = None
    count: int | None = None
    level: str = ""
    detail: str = ""
    best: bool = False
    paper: Printed | None = None
    verdict: Verdict = ""
    tolerance: float | None = None
    words: str = ""

    @property
    def part(self) -> str:
        """The stage whose record contains the number."""
        return "trajectory" if self.kind == "snapshot" else kind_of(self.metric)

    @property
    def known(self) -> bool:
        """Whether there is more information about the cell than it shows."""
        return (bool(self.runs) and self.kind not in ("none", "against")) or (self.paper is not None and self.value is not None)

    @property
    def number(self) -> str:
        """The value as text, or the words shown instead."""
        if self.words:
            return self.words
        if self.value is None:
            return "" if self.kind == "against" else text.NOT_RUN if self.kind == "not run" else text.ABSENT
        mark = "\N{DAGGER}" if self.level == RECORDED else ""
        if self.kind == "paper" and self.paper:
            mark = "*" * (self.paper.corrected is not None) + "\N{DOUBLE DAGGER}" * self.paper.borrowed
        return (text.signed(self.value) if self.kind in ("difference", "against") else text.decimal(self.value)) + mark

    @property
    def half(self) -> str:
        """Half-width of a score's interval, as text; "" if there is none."""
        if self.low is None or self.high is None or self.kind not in ("score", "external"):
            return ""
        return text.decimal((self.high - self.low) / 2)

    @property
    def aside(self) -> str:
        """The smaller text after the number: interval, standard deviation or verdict."""
        if self.half:
            return f"\N{PLUS-MINUS SIGN} {self.half}"
        if self.count is not None:
            return f"s.d. {text.decimal(self.deviation)}, n = {self.count}" if self.deviation is not None else f"n = {self.count}"
        return self.verdict

    @property
    def plain(self) -> str:
        """The whole cell as plain text."""
        aside = self.aside if self.half or not self.number else f"({self.aside})" if self.aside else ""
        return f"{self.number} {aside}".strip()


@dataclass(frozen=True)
class Column:
    """A column's heading, and the heading that it shares with neighbouring columns."""

    span: str
    head: str


@dataclass(frozen=True)
class Row:
    """A row's name, its run (none if columns are runs), and one cell per column."""

    label: str
    cells: tuple[Cell, ...]
    run: str = ""

    @property
    def blank(self) -> bool:
        """Whether it cannot have a number, such as a teacher's row of a method without a teacher, or differences without runs."""
        return not any(cell.plain for cell in self.cells if cell.kind != "none")

    @property
    def scored(self) -> bool:
        """Whether any of its cells has a number."""
        return any(cell.value is not None for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """One table; `foot` rows are separated from the others, below them."""

    id: str
    title: str
    first: str
    columns: tuple[Column, ...] = ()
    rows: tuple[Row, ...] = ()
    foot: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    main: bool = True
    sortable: bool = True

    @property
    def shown(self) -> tuple[Row, ...]:
        """The rows above the foot that have a number; if none has, or in comparisons with the paper, those that can have one."""
        rows = tuple(row for row in self.rows if not row.blank)
        beside_paper = any(cell.kind == "paper" for row in rows for cell in row.cells)
        return tuple(row for row in rows if row.scored or beside_paper) or rows

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the rows that are left out because none of their runs exists."""
        return tuple(row.label for row in self.rows if not row.blank and row not in self.shown)

    @property
    def groups(self) -> list[tuple[Row, tuple[Row, ...]]]:
        """The rows above the foot, grouped: a method's mean over seeds, if there is one, and the rows of its seeds."""
        means = {run: row for row in self.foot for run in row.cells[0].runs}
        found: dict[str, tuple[Row, list[Row]]] = {}
        for row in self.shown:
            mean = means.get(row.run)
            found.setdefault(mean.label if mean else row.label + row.run, (mean or row, []))[1].extend([row] if mean else [])
        return [(row, tuple(seeds)) for row, seeds in found.values()]

    @property
    def last(self) -> tuple[Row, ...]:
        """The rows of the foot that are not a method's mean over seeds."""
        means = {row.label for row, seeds in self.groups if seeds}
        return tuple(row for row in self.foot if row.label not in means)

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Shared headings with the number of columns under each."""
        return [(span, len(list(under))) for span, under in groupby(column.span for column in self.columns)]


@dataclass(frozen=True)
class Statement:
    """One sentence about what the tables show; `lead` is its subject, which is emphasised."""

    lead: str
    body: str

    @property
    def plain(self) -> str:
        """The whole sentence."""
        return f"{self.lead}: {self.body}"
