"""Comparison with the paper: our number, the paper's, and their difference with a verdict by a tolerance fixed beforehand.

Without a run, the cell of our number says `not run`. The verdict is `not comparable` if the run's protocol is not the paper's, if
its images or steps differ from the paper's or are not known to be the same, or if our number cannot be recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from isd_repro.config.params import ListFile, PaperRows, Params, Run
from isd_repro.data.lists import LIST_SHA256
from isd_repro.evaluations import kind_of
from isd_repro.report import paper_checks, text
from isd_repro.report.cells import Cell, Column, Printed, Row, Statement, Table, Verdict, by_columns
from isd_repro.report.hypothesis import statistic_cells, statistic_columns
from isd_repro.report.paper import DifferenceCheck, MeanCheck, Paper, PaperImages, PaperRow, PaperTable, Tolerance, Value
from isd_repro.report.paper_checks import Gain
from isd_repro.report.repetitions import method_name
from isd_repro.report.run_details import changes
from isd_repro.report.run_records import RECORDED, Records, RunRecords
from isd_repro.report.scores import difference_cell, mean_cell, method_cell, with_n
from isd_repro.report.tables import one_seed
from isd_repro.runtime.errors import ConfigError

OURS, THEIRS, DIFFERENCE = "ours", "paper", "diff"
ROUNDING = 1e-9  # a difference of exactly the tolerance is within


def resolve(params: Params, paper: Paper, wanted: PaperRows) -> PaperTable:
    """The paper's table with which runs are compared, after checking that it has every run's row.

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
            raise ConfigError(message, "only runs with the paper's protocol are compared with its numbers; remove the row")
    return table


def comparison_tables(params: Params, records: Records, paper: Paper, table: PaperTable, wanted: PaperRows) -> list[Table]:
    """A table of the paper with our numbers, followed by the paper's rows without our runs and by its own statistics."""
    if pair := table.difference:
        return [*_draw_tables(params, records, paper, table, wanted, pair), _published_table(table, pair)]
    return _row_tables(params, records, paper, table, wanted)


def findings(paper: Paper, table: PaperTable) -> list[Statement]:
    """Statements on a table's printed numbers that do not add up, and on disagreements between its sources."""
    wrong = [check for check in paper_checks.checks(paper) if check.table == table.id and check.outcome != "adds up"]
    disagreements = [item for item in paper.disagreements if table.id in item.tables]
    return [
        *(Statement("The paper's numbers", f"{check.sentence}.") for check in wrong),
        *(Statement("Sources disagree", f"{item.about}: {item.verdict}.") for item in disagreements),
    ]


def paper_cell(paper: Paper, table: PaperTable, row: str, column: str) -> Cell:
    """The paper's numbers, with misprints corrected."""
    value, about = table.value(row, column), table.columns[column]
    cell = Cell("none", (), table.rows[row].encoder, about.metric or "", about.group)
    if value is None:
        return replace(cell, detail="the paper prints no number here")
    return replace(cell, kind="paper", value=float(value.value), paper=_printed(paper, table, row, column, value))


def _printed(paper: Paper, table: PaperTable, row: str, column: str, value: Value) -> Printed:
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


def other_images(found: RunRecords, config: Run, images: PaperImages) -> str:
    """The reason why a run's images or steps are not the paper's, or are not known to be; otherwise ""."""
    manifest, record = found.manifest, found.pretrain
    if manifest is None or record is None:
        return "there is no record of the training"
    steps = config.optim.epochs * (manifest.train // config.optim.batch_size)
    for name, ours, theirs in (
        ("classes", len(manifest.classes), images.classes),
        ("training images", manifest.train, images.train),
        ("queries", manifest.query, images.query),
    ):
        if theirs is not None and ours != theirs:
            return f"{name}: {text.count(ours)} here, {text.count(theirs)} in the paper"
    if record.steps != steps:
        return f"steps: {text.count(record.steps)} were made, {text.count(steps)} belong to the paper's epochs"
    listed = str(manifest.rule.get("list", ""))
    if listed and manifest.rule.get("sha256") != LIST_SHA256.get(listed):
        return f"the list is not known to be the published {listed}: its sha256 is {manifest.rule.get('sha256', 'not recorded')}"
    if manifest.sha256 not in images.manifests:
        return f"the identity of the images is unknown: manifest {manifest.sha256[:12]} has not been compared with the originals"
    return ""


def obstacle(params: Params, records: Records, run: str, row: PaperRow) -> str:
    """The reason why a run does not follow the protocol of the paper's row, by its parameters or record; otherwise ""."""
    config, found = params.runs[run], records.runs[run]
    rule = params.subsets[config.data.subset].rule
    for name, ours, theirs in (
        ("network", config.backbone.arch, row.arch),
        ("epochs", config.optim.epochs, row.epochs),
        ("batch", config.optim.batch_size, row.batch),
        ("list", rule.list if isinstance(rule, ListFile) else "another draw", row.draw),
    ):
        if theirs is not None and ours != theirs:
            return f"{name}: {ours} here, {theirs} in the paper"
    if row.draw is None and rule.name != "all":
        return f"images: a subset drawn by {rule.name!r} here, the whole data set in the paper"
    if found.pretrain and (changed := changes(config, found.pretrain.config)):
        return f"{run} was made with parameters that differ from the profile's: {'; '.join(changed)}"
    return ""


def _unfit(params: Params, records: Records, cells: Iterable[Cell], rows: Iterable[PaperRow], images: PaperImages) -> str:
    """The reason why our number cannot be compared with the paper's, or ""."""
    for cell, row in zip(cells, rows, strict=True):
        if cell.level == RECORDED:
            return "our number cannot be recomputed"
        for run in cell.runs:
            evaluation = records.runs[run].evaluation(cell.metric)
            if cell.metric.startswith("linear") and evaluation and evaluation.record.protocol != "paper":
                return f"linear protocol {evaluation.record.protocol!r}, not the paper's"
            if why := obstacle(params, records, run, row) or other_images(records.runs[run], params.runs[run], images):
                return why
    return ""


def judged(ours: Cell, theirs: Cell, tolerance: Tolerance | None, why_not: str) -> Cell:
    """Our number minus the paper's, with a verdict if there is a tolerance and no reason against a comparison."""
    cell = Cell("against", ours.runs, ours.encoder, ours.metric, ours.group, paper=theirs.paper)
    if theirs.value is None:
        return replace(cell, kind="none", detail=theirs.detail)
    if tolerance:
        cell = replace(cell, tolerance=float(tolerance.points))
    if ours.value is None:
        return replace(cell, detail="needs our number")
    if tolerance is None or why_not:
        return replace(cell, verdict="not comparable", detail=why_not)
    difference = ours.value - theirs.value
    verdict: Verdict = "within" if abs(difference) <= float(tolerance.points) + ROUNDING else "outside"
    numbers = f"{OURS} {text.decimal(ours.value, 2)}, paper {text.decimal(theirs.value, 2)}"
    detail = f"{numbers}; tolerance {tolerance.points} points: {tolerance.why}"
    return replace(cell, value=difference, verdict=verdict, detail=detail)


def _row_tables(params: Params, records: Records, paper: Paper, table: PaperTable, wanted: PaperRows) -> list[Table]:
    """Three rows for each compared row of the paper (ours, the paper's, the difference), then its other rows."""
    placed: dict[str, list[str]] = {}
    for run in params.runs:
        if run in wanted.rows:
            placed.setdefault(wanted.rows[run], []).append(run)
    rows: list[Row] = []
    for name, runs in placed.items():
        row, triples = table.rows[name], []
        for column, about in table.columns.items():
            ours, theirs = _our_cell(records, table, runs, row, column), paper_cell(paper, table, name, column)
            why = about.not_comparable or _unfit(params, records, [ours], [row], paper.images[table.images])
            triples.append((ours, theirs, judged(ours, theirs, about.tolerance, why)))
        label = params.runs[runs[0]].label if len(runs) == 1 else f"{method_name(params, runs[0])}, {len(runs)} seeds"
        for word, cells in zip((OURS, THEIRS, DIFFERENCE), zip(*triples, strict=True), strict=True):
            rows.append(Row(f"{label}: {word}", cells, runs[0] if word == OURS and len(runs) == 1 else ""))
    heads = [with_n(about.head, [row.cells[at] for row in rows]) for at, about in enumerate(table.columns.values())]
    columns, first = tuple(Column("Accuracy, %", head) for head in heads), one_seed(params, list(wanted.rows), "Run")
    title = f"Compared with the paper: {table.title}"
    found = [Table(f"paper-{table.id}", title, first, columns, tuple(rows), notes=_notes(table), sortable=False)]
    if rest := {name: row for name, row in table.rows.items() if name not in placed}:
        columns = tuple(Column("Paper", about.head) for about in table.columns.values())
        others = [
            Row(row.label, tuple(paper_cell(paper, table, name, key) for key in table.columns)) for name, row in rest.items()
        ]
        title = f"{table.title}: rows of the paper without a run here"
        found.append(Table(f"paper-{table.id}-rest", title, "Row of the paper", columns, tuple(others), main=False))
    return found


def _our_cell(records: Records, table: PaperTable, runs: Sequence[str], row: PaperRow, column: str) -> Cell:
    """Our number for a number of the paper: one run's, the mean of repetitions, or the mean of the same columns."""
    about = table.columns[column]
    if about.metric:
        return method_cell(records, runs, (row.encoder, about.metric, about.group))
    means = [check for check in table.checks if isinstance(check, MeanCheck) and check.equals == column]
    if not means:
        return Cell("none", tuple(runs), detail="no stage measures this")
    parts = [_our_cell(records, table, runs, row, of) for of in means[0].of]
    kind = kind_of(parts[0].metric)
    metric = kind if kind == kind_of(kind) else parts[0].metric  # what `verify` looks at: every data set, or the first column
    cell = Cell("not run", tuple(runs), row.encoder, metric, about.group, detail="needs all of its parts")
    values = [part.value for part in parts if part.value is not None]
    if len(values) < len(parts):
        return cell
    level = RECORDED if any(part.level == RECORDED for part in parts) else ""
    return replace(cell, kind="mean", value=fmean(values), level=level, detail=f"mean of {len(values)} columns")


def _notes(table: PaperTable) -> tuple[str, ...]:
    """Notes for readers of a published table: its own notes, the marks, and the tolerances with their reasons."""
    marks = []
    values = [value for _, _, value in table.cells()]
    if any(value.corrected is not None for value in values):
        marks.append("* misprinted: the corrected number is shown; its provenance gives both.")
    if any(value.source for value in values):
        marks.append("\N{DOUBLE DAGGER} printed by another paper of the same group and protocol, not by this one.")
    heads: dict[str, list[str]] = {}
    single = [(about.head, about.tolerance) for about in table.columns.values()]
    for head, tolerance in single + [(f"{gain.head}, mean difference", gain.tolerance) for gain in paper_checks.gains(table)]:
        if tolerance:
            heads.setdefault(f"{tolerance.points} points: {tolerance.why}", []).append(head)
    limits = "; ".join(f"{text.listing(named)}, {reason}" for reason, named in heads.items())
    return (*table.notes, *marks, *([f"Tolerances, fixed before any run: {limits}."] if limits else []))


def _computed(gain: Gain, value: float, detail: str) -> Cell:
    return Cell("computed", (), "student", gain.metric, gain.group, value, detail=detail)


def _draw_tables(
    params: Params, records: Records, paper: Paper, table: PaperTable, wanted: PaperRows, pair: DifferenceCheck
) -> list[Table]:
    """A table of differences by draw with their mean and its verdict, and a table of both methods' accuracies."""
    names = (pair.minuend, pair.subtrahend)
    rows = {(row.method, row.draw): name for name, row in table.rows.items()}
    runs = {
        (name, of): [run for run in params.runs if wanted.rows.get(run) == rows[name, of]] for name in names for of in table.draws
    }
    differences: list[tuple[Column, list[Cell]]] = []
    levels: list[tuple[Column, list[Cell]]] = []
    for gain in paper_checks.gains(table):
        ours = {key: method_cell(records, of, ("student", gain.metric, gain.group)) for key, of in runs.items()}
        theirs = {(name, of): _theirs(paper, table, gain, name, of) for name in (*names, pair.equals) for of in table.draws}
        for name, level in zip(names, (gain.first, gain.second), strict=True):
            mine, printed = ([of_all[name, of] for of in table.draws] for of_all in (ours, theirs))
            printed.append(_computed(gain, level, "mean of the column, misprints corrected"))
            levels.append((Column(gain.head, f"{name}, {OURS}"), [*mine, mean_cell(mine, "draws")]))
            levels.append((Column(gain.head, f"{name}, {THEIRS}"), printed))
        mine = [difference_cell(records, *(ours[name, of] for name in names)) for of in table.draws]
        printed = [_signed(theirs[pair.equals, of]) for of in table.draws]
        both = [_without_verdict(*cells) for cells in zip(mine, printed, strict=True)]
        images, why = paper.images[table.images], ""
        if missing := sum(cell.value is None for cell in mine):
            why = f"{len(mine) - missing} of {len(mine)} draws have been run"
        for of in table.draws:
            cells, row = [replace(ours[name, of], runs=tuple(runs[name, of])) for name in names], table.rows[rows[names[0], of]]
            why = why or _unfit(params, records, cells, (row, row), images)
        mean = mean_cell(mine, "draws")
        detail = f"computed from the printed {'levels' if gain.column else 'groups'}, misprints corrected; {gain.paired.words}"
        published = replace(_computed(gain, gain.paired.mean, detail), words=text.signed(gain.paired.mean, 2))
        published = replace(published, deviation=gain.paired.deviation, count=gain.paired.n)
        published = replace(published, low=gain.paired.low, high=gain.paired.high)
        columns = ([*mine, mean], [*printed, published], [*both, judged(mean, published, gain.tolerance, why)])
        head = with_n(gain.head, list(ours.values()))
        differences += [(Column(head, word), cells) for word, cells in zip((OURS, THEIRS, DIFFERENCE), columns, strict=True)]
    labels, reasons = [*table.draws, "Mean"], dict.fromkeys(about.not_comparable for about in table.columns.values())
    title = f"Compared with the paper: {names[0]} {text.MINUS} {names[1]}, 1-NN, points"
    first = Table(f"paper-{table.id}", title, "Draw", notes=_notes(table))
    notes = tuple(f"Not comparable: {reason}." for reason in reasons if reason)
    second = Table(f"paper-{table.id}-levels", f"{table.title}: levels, not comparable", "Draw", notes=notes, main=False)
    return [by_columns(first, labels, differences, foot=1), by_columns(second, labels, levels, foot=1)]


def _theirs(paper: Paper, table: PaperTable, gain: Gain, method: str, draw: str) -> Cell:
    """The paper's number of a method on a draw, or of the difference of two: printed, or implied by printed groups."""
    if gain.column:
        row = next(name for name, row in table.rows.items() if (row.method, row.draw) == (method, draw))
        return paper_cell(paper, table, row, gain.column)
    rule = table.implied
    assert rule
    if table.difference and method == table.difference.equals:
        value = gain.differences[table.draws.index(draw)]
        return _computed(gain, value, f"from the printed groups; rounding can move it by {gain.hidden:.2f}")
    parts = [table.of_draw(method, draw, key) for key in (rule.whole, rule.part)]
    return _computed(gain, float(rule.of(*(part.value for part in parts if part))), "implied by the printed groups")


def _signed(theirs: Cell) -> Cell:
    return replace(theirs, words=text.signed(theirs.value or 0.0) + "*" * theirs.number.endswith("*"))


def _without_verdict(ours: Cell, theirs: Cell) -> Cell:
    cell = Cell("against", ours.runs, ours.encoder, ours.metric, ours.group, paper=theirs.paper)
    if ours.value is None or theirs.value is None:
        return replace(cell, detail="needs our number")
    return replace(cell, value=ours.value - theirs.value, detail="only the mean over draws has a verdict, not a single draw")


def _published_table(table: PaperTable, pair: DifferenceCheck) -> Table:
    """Our statistics of the published table: means, difference, interval and test by group."""
    rows = []
    for gain in paper_checks.gains(table):
        blank = _computed(gain, 0.0, f"computed from {table.title}, misprints corrected")
        rows.append(Row(gain.head, tuple(statistic_cells(blank, (gain.first, gain.second), gain.paired, [gain.paired.interval]))))
    notes = ["Computed from the printed numbers, misprints corrected; the paper prints neither means nor tests."]
    if rule := table.implied:
        rest, gain = rule.classes - rule.part_classes, paper_checks.gains(table)[-1]
        notes.append(
            f"{rule.head}: not printed, computed as ({rule.classes} {rule.whole} {text.MINUS} {rule.part_classes} {rule.part}) /"
            f" {rest}. Rounding of the printed numbers can move one draw's difference by up to {gain.hidden:.2f} points and gives"
            f" the mean a standard deviation of {gain.hidden_mean:.2f}. It assumes {rule.assumes}."
        )
    columns = statistic_columns(pair.minuend, pair.subtrahend, (f"95 % bootstrap, {len(table.draws)} draws",))
    title = f"The published table, recomputed: {table.title}"
    return Table(f"published-{table.id}", title, "Queries", columns, tuple(rows), notes=tuple(notes))
