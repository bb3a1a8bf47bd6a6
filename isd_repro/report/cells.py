"""Format-independent tables: rows, columns, and cells with the source of each number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    """A number of the paper in percent, its place in `paper.yaml`, and its correction if it is misprinted."""

    table: str
    row: str
    column: str
    where: str  # the place as text, with the paper's version
    printed: float
    corrected: float | None  # None if the printed number is right
    why: str  # reason for the correction
    source: str  # the publication that was read
    borrowed: bool  # whether this is another one than the table's
    confidence: str


@dataclass(frozen=True)
class Cell:
    """One cell; `value` is in percent or points, and None if the cell has no number.

    Kinds: ours are a score of one run, of a snapshot of it or of an evaluated checkpoint, a difference of two, a mean over seeds
    or draws, a `statistic` of differences over draws (a bound, a deviation, a count, p), `not run`, or `none` where no number can
    exist; the paper's are a number as printed or corrected (`paper`), or `computed` from its printed ones; `against` is ours
    minus the paper's.
    """

    kind: Kind
    runs: tuple[str, ...] = ()  # from which the number comes
    encoder: str = ""
    metric: str = ""
    group: str = ""
    value: float | None = None
    correct: int | None = None  # of a score, as `n` and `level`
    n: int | None = None
    low: float | None = None  # 95 % interval: Wilson's of a score, in percent; the bootstrap's of a mean difference, in points
    high: float | None = None
    deviation: float | None = None  # standard deviation over `count` seeds or draws of a mean
    count: int | None = None
    level: str = ""
    detail: str = ""  # how a number that is not a score was computed, or why there is no number
    best: bool = False  # whether it is the largest of the values with which it is compared
    paper: Printed | None = None  # the published number that the cell shows or is compared with
    verdict: Verdict = ""  # of `against`
    tolerance: float | None = None  # of `against`, in points
    words: str = ""  # shown instead of the value

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
        return tuple(row for row in rows if beside_paper or any(cell.value is not None for cell in row.cells)) or rows

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

    def only(self, columns: Sequence[int]) -> Table:
        """The table with these columns alone."""
        rows, foot = (
            tuple(replace(row, cells=tuple(row.cells[at] for at in columns)) for row in part) for part in (self.rows, self.foot)
        )
        return replace(self, columns=tuple(self.columns[at] for at in columns), rows=rows, foot=foot)

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Shared headings with the number of columns under each."""
        return [(span, len(list(under))) for span, under in groupby(column.span for column in self.columns)]


def by_columns(
    blank: Table,
    labels: Sequence[str],
    columns: Sequence[tuple[Column, Sequence[Cell]]],
    *,
    runs: Sequence[str] = (),
    foot: int = 0,
) -> Table:
    """A table filled from its columns, each a heading with its cells; the last `foot` rows are the foot's."""
    cells = zip(*(under for _, under in columns), strict=True)
    rows = [Row(*one) for one in zip(labels, cells, [*runs, *[""] * (len(labels) - len(runs))], strict=True)]
    body = len(rows) - foot
    return replace(blank, columns=tuple(head for head, _ in columns), rows=tuple(rows[:body]), foot=tuple(rows[body:]))


@dataclass(frozen=True)
class Statement:
    """One sentence about what the tables show; `lead` is its subject, which is emphasised."""

    lead: str
    body: str

    @property
    def plain(self) -> str:
        """The whole sentence."""
        return f"{self.lead}: {self.body}"
