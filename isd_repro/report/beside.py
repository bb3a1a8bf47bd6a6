"""Our numbers beside the paper's: a column of ours, one of the paper's, and the difference with a verdict fixed beforehand.

Ours is never filled from the paper: where there is no run it says `not run`. A verdict is withheld (`not comparable`) where the
paper's protocol is not the run's, whatever the reason, or where nothing checks our number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isd_repro.config.params import Beside, ListFile, Params
from isd_repro.report import text
from isd_repro.report.cells import Cell, Column, Printed, Row, Table, Verdict
from isd_repro.report.paper import MeanCheck, Paper, PaperColumn, PaperRow, PaperTable, Value
from isd_repro.report.pool import method_name, pool
from isd_repro.report.protocols import METRIC
from isd_repro.report.records import RECORDED, Records
from isd_repro.report.run_details import changes
from isd_repro.report.tables import score_cell, with_n
from isd_repro.runtime.errors import ConfigError

OURS, THEIRS, AGAINST = "ours", "paper", "diff"
ACROSS = 3  # columns of the paper up to which ours, paper and difference stand side by side
ROUNDING = 1e-9  # a difference of exactly the tolerance is within


def resolve(params: Params, paper: Paper, wanted: Beside) -> PaperTable:
    """The table that runs stand beside, once every run's row is known to exist in it.

    Raises:
        ConfigError: the table or a row does not exist, or a run is trained on other images than the paper's.
    """
    table = paper.table(wanted.table)
    for run, row in wanted.rows.items():
        if row not in table.rows:
            raise ConfigError(f"report.paper.rows.{run}: {table.id} has no row {row!r}", f"its rows are {', '.join(table.rows)}")
        dataset = params.subsets[params.runs[run].data.subset].source.dataset
        if dataset != table.dataset:
            message = f"report.paper.rows.{run}: trained on {dataset}, the paper's table on {table.dataset}"
            raise ConfigError(message, "the paper's numbers stand only beside runs of its protocol; remove the row")
    return table


def printed(paper: Paper, table: PaperTable, row: str, column: str, value: Value) -> Printed:
    """A published number with its place and source."""
    source = paper.sources[value.source or table.source]
    return Printed(
        table=table.id,
        row=row,
        column=column,
        where=f"{table.title} ({table.version}): {table.rows[row].label}, {table.columns[column].head}",
        printed=float(value.printed),
        corrected=None if value.corrected is None else float(value.corrected),
        why=value.why,
        source=f"{source.title}; {source.where}",
        borrowed=value.source is not None,
        confidence=table.confidence,
    )


def paper_cell(paper: Paper, table: PaperTable, row: str, column: str) -> Cell:
    """What the paper prints, corrected where it is misprinted."""
    value, about = table.value(row, column), table.columns[column]
    cell = Cell("none", (), table.rows[row].encoder, about.metric or "", about.group)
    if value is None:
        return replace(cell, detail="the paper prints no number here")
    return replace(cell, kind="paper", value=float(value.value), paper=printed(paper, table, row, column, value))


def obstacle(params: Params, records: Records, run: str, row: PaperRow) -> str:
    """Why a run does not follow the protocol of the paper's row, as far as its parameters and record tell; else nothing."""
    config, found = params.runs[run], records.runs[run]
    rule = params.subsets[config.data.subset].rule
    for name, ours, theirs in (
        ("network", config.backbone.arch, row.arch),
        ("epochs", config.optim.epochs, row.epochs),
        ("list", rule.list if isinstance(rule, ListFile) else "another draw", row.draw),
    ):
        if theirs is not None and ours != theirs:
            return f"{name}: {ours} here, {theirs} in the paper"
    if row.draw is None and rule.name != "all":
        return f"images: a subset drawn by {rule.name!r} here, all of the data set in the paper"
    if found.pretrain and (changed := changes(config, found.pretrain.config)):
        return f"{run} was made with other parameters than the profile states: {'; '.join(changed)}"
    return ""


def unfit(params: Params, records: Records, cell: Cell, row: PaperRow) -> str:
    """Why our number must not be judged by the paper's, or nothing."""
    if cell.level == RECORDED:
        return "nothing checks our number"
    for run in cell.runs:
        evaluation = records.runs[run].evaluation(cell.metric)
        if cell.metric.startswith("linear") and evaluation and evaluation.record.protocol != "paper":
            return f"linear protocol {evaluation.record.protocol!r}, not the paper's"
        if why := obstacle(params, records, run, row):
            return why
    return ""


def against(ours: Cell, theirs: Cell, column: PaperColumn, why_not: str) -> Cell:
    """Our number less the paper's, and the verdict by the column's tolerance."""
    cell = replace(ours, kind="against", value=None, correct=None, n=None, low=None, high=None, deviation=None, count=None)
    cell = replace(cell, level="", best=False, detail="", words="")
    if theirs.value is None:
        return replace(cell, kind="none", detail=theirs.detail)
    cell = replace(cell, paper=theirs.paper)
    if column.tolerance:
        cell = replace(cell, tolerance=float(column.tolerance.points))
    if ours.value is None:
        return replace(cell, detail="needs our number")
    if column.tolerance is None or why_not:
        return replace(cell, verdict="not comparable", detail=why_not or column.not_comparable)
    difference = ours.value - theirs.value
    points = float(column.tolerance.points)
    detail = f"{OURS} {ours.value:.2f}, paper {theirs.value:.1f}; tolerance {points} points: {column.tolerance.why}"
    verdict: Verdict = "within" if abs(difference) <= points + ROUNDING else "outside"
    return replace(cell, value=difference, verdict=verdict, detail=detail)


def ours_cell(records: Records, table: PaperTable, runs: Sequence[str], row: PaperRow, column: str) -> Cell:
    """Our number in the place of the paper's: one run's, the mean of repetitions, or the mean of the columns it averages."""
    about = table.columns[column]
    if about.metric:
        return pool([score_cell(records.runs[run], row.encoder, about.metric, about.group) for run in runs], "seeds")
    means = [check for check in table.checks if isinstance(check, MeanCheck) and check.equals == column]
    if not means:
        return Cell("none", tuple(runs), detail="no stage measures this")
    parts = [ours_cell(records, table, runs, row, of) for of in means[0].of]
    transfer = all(part.metric.startswith(f"{METRIC}-") for part in parts)
    metric = METRIC if transfer else parts[0].metric  # what `verify` looks at: every data set, or the first column
    blank = Cell("not run", tuple(runs), row.encoder, metric, about.group, detail="needs all of its parts")
    values = [part.value for part in parts if part.value is not None]
    if len(values) < len(parts):
        return blank
    level = RECORDED if any(part.level == RECORDED for part in parts) else ""
    return replace(blank, kind="mean", value=sum(values) / len(values), level=level, detail=f"mean of {len(values)} columns")


def rows_of(params: Params, wanted: Beside) -> dict[str, list[str]]:
    """The runs that stand beside each row of the paper, rows in the order in which the params first name them."""
    found: dict[str, list[str]] = {}
    for run in params.runs:
        if run in wanted.rows:
            found.setdefault(wanted.rows[run], []).append(run)
    return found


def label_of(params: Params, runs: Sequence[str]) -> str:
    """A row's name: the run's label, or the method's where several repeat it."""
    return params.runs[runs[0]].label if len(runs) == 1 else f"{method_name(params, runs[0])}, {len(runs)} seeds"


def row_tables(params: Params, records: Records, paper: Paper, table: PaperTable, wanted: Beside) -> list[Table]:
    """A table whose rows are encoders: those that runs stand beside, then those that none does."""
    placed = rows_of(params, wanted)
    triples: dict[str, list[tuple[Cell, Cell, Cell]]] = {}
    for row, runs in placed.items():
        triples[row] = []
        for column, about in table.columns.items():
            ours, theirs = ours_cell(records, table, runs, table.rows[row], column), paper_cell(paper, table, row, column)
            triples[row].append((ours, theirs, against(ours, theirs, about, unfit(params, records, ours, table.rows[row]))))
    blank = Table(f"paper-{table.id}", f"Beside the paper: {table.title}", "Run", (), (), notes=notes_of(table))
    labels = {row: label_of(params, runs) for row, runs in placed.items()}
    first = _side_by_side if len(table.columns) <= ACROSS else _stacked
    found = [first(table, triples, labels, placed, blank)]
    rest = [row for row in table.rows if row not in placed]
    if rest:
        rows = [Row(table.rows[row].label, tuple(paper_cell(paper, table, row, key) for key in table.columns)) for row in rest]
        columns = tuple(Column(THEIRS.capitalize(), about.head) for about in table.columns.values())
        title = f"{table.title}: the paper's rows that no run here stands beside"
        found.append(Table(f"paper-{table.id}-rest", title, "Row of the paper", columns, tuple(rows), main=False))
    return found


def _side_by_side(
    table: PaperTable,
    triples: dict[str, list[tuple[Cell, Cell, Cell]]],
    labels: dict[str, str],
    placed: dict[str, list[str]],
    blank: Table,
) -> Table:
    spans = [
        with_n(about.head[:1].upper() + about.head[1:], [cells[at][0] for cells in triples.values()])
        for at, about in enumerate(table.columns.values())
    ]
    columns = [Column(span, word) for span in spans for word in (OURS, THEIRS, AGAINST)]
    rows = [
        Row(labels[row], tuple(cell for triple in cells for cell in triple), placed[row][0] if len(placed[row]) == 1 else "")
        for row, cells in triples.items()
    ]
    return replace(blank, columns=tuple(columns), rows=tuple(rows))


def _stacked(
    table: PaperTable,
    triples: dict[str, list[tuple[Cell, Cell, Cell]]],
    labels: dict[str, str],
    placed: dict[str, list[str]],
    blank: Table,
) -> Table:
    """Three rows a run, where side by side would be too wide; sorting would tear them apart."""
    columns = tuple(Column("Accuracy, %", about.head) for about in table.columns.values())
    rows = [
        Row(f"{labels[row]}: {word}", tuple(triple[at] for triple in cells), placed[row][0] if at == 0 else "")
        for row, cells in triples.items()
        for at, word in enumerate((OURS, THEIRS, AGAINST))
    ]
    return replace(blank, columns=columns, rows=tuple(rows), sortable=False)


def notes_of(table: PaperTable) -> tuple[str, ...]:
    """What a reader must know of a published table: its own notes, marks, and the tolerances with their reasons."""
    marks = []
    values = [value for _, _, value in table.cells()]
    if any(value.corrected is not None for value in values):
        marks.append("* misprinted: the corrected number is shown, its provenance has both.")
    if any(value.source for value in values):
        marks.append("\N{DOUBLE DAGGER} printed by another paper of the same group and protocol, not by this one.")
    reasons: dict[str, list[str]] = {}
    for about in table.columns.values():
        if about.tolerance:
            reasons.setdefault(f"{about.tolerance.points} points: {about.tolerance.why}", []).append(about.head)
    limits = [f"{text.listing(heads)}, {reason}" for reason, heads in reasons.items()]
    tolerances = [f"Tolerances, fixed before any run: {'; '.join(limits)}."] if limits else []
    return (*table.notes, *marks, *tolerances)
