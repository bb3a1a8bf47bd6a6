"""Comparison with the paper: our number, the paper's, and their difference with a verdict by a tolerance fixed beforehand.

Without a run, the cell of our number says `not run`. The verdict is `not comparable` if the run's protocol is not the paper's, if
its images or steps differ from the paper's or are not known to be the same, or if our number cannot be recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from isd_repro.config.params import ListFile, PaperRows, Params, Run
from isd_repro.data.lists import LIST_SHA256
from isd_repro.evaluations import kind_of
from isd_repro.report import paper_checks, text
from isd_repro.report.cells import Cell, Column, Printed, Row, Statement, Table, Verdict
from isd_repro.report.hypothesis import statistic_cells, statistic_columns
from isd_repro.report.paper import MeanCheck, Paper, PaperImages, PaperRow, PaperTable, Tolerance, Value
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
    if table.difference:
        return [*_draw_tables(params, records, paper, table, wanted), published_table(table)]
    return _row_tables(params, records, paper, table, wanted)


def findings(paper: Paper, table: PaperTable) -> list[Statement]:
    """Statements on a table's printed numbers that do not add up, and on disagreements between its sources."""
    wrong = [check for check in paper_checks.checks(paper) if check.table == table.id and check.outcome != "adds up"]
    disagreements = [item for item in paper.disagreements if table.id in item.tables]
    return [
        *(Statement("The paper's numbers", f"{check.sentence}.") for check in wrong),
        *(Statement("Sources disagree", f"{item.about}: {item.verdict}.") for item in disagreements),
    ]


# --- single cells -----------------------------------------------------------------------------------------------------


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
        return f"the identity of the images is not known: no one has compared manifest {manifest.sha256[:12]} with the originals"
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


# --- tables whose rows are encoders -----------------------------------------------------------------------------------


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
    columns = [
        Column("Accuracy, %", with_n(about.head, [one.cells[at] for one in rows]))
        for at, about in enumerate(table.columns.values())
    ]
    title, notes = f"Compared with the paper: {table.title}", _notes(table)
    found = [
        Table(
            f"paper-{table.id}",
            title,
            one_seed(params, list(wanted.rows), "Run"),
            tuple(columns),
            tuple(rows),
            notes=notes,
            sortable=False,
        )
    ]
    if rest := [name for name in table.rows if name not in placed]:
        heads = tuple(Column("Paper", about.head) for about in table.columns.values())
        others = [
            Row(table.rows[name].label, tuple(paper_cell(paper, table, name, key) for key in table.columns)) for name in rest
        ]
        title = f"{table.title}: rows of the paper without a run here"
        found.append(Table(f"paper-{table.id}-rest", title, "Row of the paper", heads, tuple(others), main=False))
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
    return replace(cell, kind="mean", value=math.fsum(values) / len(values), level=level, detail=f"mean of {len(values)} columns")


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


# --- tables of two methods over draws ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """Input of both tables of draws: our runs of the two methods by draw, and the paper's numbers."""

    params: Params
    records: Records
    paper: Paper
    table: PaperTable
    methods: tuple[str, str, str]  # first, second, and their printed difference
    runs: dict[str, tuple[list[str], list[str]]]  # by draw, of the first two
    gains: list[Gain]

    def row(self, method: int, draw: str) -> str:
        """The paper's row of a method on a draw."""
        wanted = (self.methods[method], draw)
        return next(name for name, row in self.table.rows.items() if (row.method, row.draw) == wanted)

    def ours(self, method: int, draw: str, gain: Gain) -> Cell:
        """Our number of a method on a draw."""
        return method_cell(self.records, self.runs[draw][method], ("student", gain.metric, gain.group))

    def theirs(self, method: int, draw: str, gain: Gain) -> Cell:
        """The paper's number, printed or implied."""
        if gain.column:
            return paper_cell(self.paper, self.table, self.row(method, draw), gain.column)
        if method == 2:
            value = gain.differences[list(self.runs).index(draw)]
            return _computed(gain, value, f"from the printed groups; rounding can move it by {gain.hidden:.2f}")
        rule = self.table.implied
        parts = [self.table.of_draw(self.methods[method], draw, key) for key in (rule.whole, rule.part)] if rule else []
        values = [part.value for part in parts if part]
        assert rule
        return _computed(gain, float(rule.of(*values)), "implied by the printed groups")


def _computed(gain: Gain, value: float, detail: str) -> Cell:
    return Cell("computed", (), "student", gain.metric, gain.group, value, detail=detail)


def _draw_tables(params: Params, records: Records, paper: Paper, table: PaperTable, wanted: PaperRows) -> list[Table]:
    """A table of differences by draw with their mean and its verdict, and a table of both methods' accuracies."""
    pair = table.difference
    if pair is None:
        return []
    runs: dict[str, tuple[list[str], list[str]]] = {draw: ([], []) for draw in table.draws}
    for run in params.runs:
        row = table.rows[wanted.rows[run]] if run in wanted.rows else None
        if row and row.draw and row.method in (pair.minuend, pair.subtrahend):
            runs[row.draw][row.method == pair.subtrahend].append(run)
    names = (pair.minuend, pair.subtrahend, pair.equals)
    every = _Draws(params, records, paper, table, names, runs, paper_checks.gains(table))
    return [_difference_table(every), _level_table(every)]


def _difference_table(every: _Draws) -> Table:
    first, second, _ = every.methods
    columns: list[Column] = []
    body: dict[str, list[Cell]] = {draw: [] for draw in every.runs}
    foot: list[Cell] = []
    for gain in every.gains:
        scores = {draw: [every.ours(method, draw, gain) for method in (0, 1)] for draw in every.runs}
        ours = [difference_cell(every.records, *both) for both in scores.values()]
        columns += [
            Column(with_n(gain.head, [cell for both in scores.values() for cell in both]), word)
            for word in (OURS, THEIRS, DIFFERENCE)
        ]
        for (draw, cells), our in zip(body.items(), ours, strict=True):
            theirs = every.theirs(2, draw, gain)
            theirs = replace(theirs, words=text.signed(theirs.value or 0.0) + "*" * theirs.number.endswith("*"))
            cells += [our, theirs, _without_verdict(our, theirs)]
        foot += _mean_cells(every, gain, ours)
    rows = tuple(Row(draw, tuple(cells)) for draw, cells in body.items())
    title = f"Compared with the paper: {first} {text.MINUS} {second}, 1-NN, points"
    return Table(f"paper-{every.table.id}", title, "Draw", tuple(columns), rows, (Row("Mean", tuple(foot)),), _notes(every.table))


def _without_verdict(ours: Cell, theirs: Cell) -> Cell:
    cell = Cell("against", ours.runs, ours.encoder, ours.metric, ours.group, paper=theirs.paper)
    if ours.value is None or theirs.value is None:
        return replace(cell, detail="needs our number")
    return replace(cell, value=ours.value - theirs.value, detail="only the mean over draws has a verdict, not a single draw")


def _mean_cells(every: _Draws, gain: Gain, ours: Sequence[Cell]) -> list[Cell]:
    """Our mean difference, the paper's, and the verdict, which needs every draw."""
    mine, paired = mean_cell(ours, "draws"), gain.paired
    detail = f"computed from the printed {'levels' if gain.column else 'groups'}, misprints corrected; {paired.words}"
    theirs = _computed(gain, paired.mean, detail)
    theirs = replace(theirs, low=paired.low, high=paired.high, deviation=paired.deviation, count=paired.n)
    theirs = replace(theirs, words=text.signed(paired.mean, 2))
    done = sum(cell.value is not None for cell in ours)
    why = f"{done} of {len(ours)} draws have been run" if done < len(ours) else ""
    images = every.paper.images[every.table.images]
    for draw, both in every.runs.items():
        row = every.table.rows[every.row(0, draw)]
        scores = [replace(every.ours(method, draw, gain), runs=tuple(runs)) for method, runs in enumerate(both)]
        why = why or _unfit(every.params, every.records, scores, (row, row), images)
    return [mine, theirs, judged(mine, theirs, gain.tolerance, why)]


def _level_table(every: _Draws) -> Table:
    """Both methods' accuracy, ours and the paper's, without a verdict."""
    columns: list[Column] = []
    body: dict[str, list[Cell]] = {draw: [] for draw in every.runs}
    foot: list[Cell] = []
    for gain in every.gains:
        for method, mean in enumerate((gain.first, gain.second)):
            columns += [Column(gain.head, f"{every.methods[method]}, {word}") for word in (OURS, THEIRS)]
            ours = [every.ours(method, draw, gain) for draw in every.runs]
            for (draw, cells), our in zip(body.items(), ours, strict=True):
                cells += [our, every.theirs(method, draw, gain)]
            foot += [mean_cell(ours, "draws"), _computed(gain, mean, "mean of the column, misprints corrected")]
    rows = tuple(Row(draw, tuple(cells)) for draw, cells in body.items())
    reasons = dict.fromkeys(about.not_comparable for about in every.table.columns.values() if about.not_comparable)
    notes = tuple(f"Not comparable: {reason}." for reason in reasons)
    title = f"{every.table.title}: levels, not comparable"
    return Table(
        f"paper-{every.table.id}-levels", title, "Draw", tuple(columns), rows, (Row("Mean", tuple(foot)),), notes, main=False
    )


def published_table(table: PaperTable) -> Table:
    """Our statistics of the published table: means, difference, interval and test by group."""
    pair, rows = table.difference, []
    for gain in paper_checks.gains(table):
        blank = _computed(gain, 0.0, f"computed from {table.title}, misprints corrected")
        interval = None if gain.paired.low is None or gain.paired.high is None else (gain.paired.low, gain.paired.high)
        rows.append(Row(gain.head, statistic_cells(blank, (gain.first, gain.second), gain.paired, [interval])))
    notes = ["Computed from the printed numbers, misprints corrected; the paper prints neither means nor tests."]
    if rule := table.implied:
        rest, gain = rule.classes - rule.part_classes, paper_checks.gains(table)[-1]
        notes.append(
            f"{rule.head}: not printed, computed as ({rule.classes} {rule.whole} {text.MINUS} {rule.part_classes} {rule.part}) /"
            f" {rest}. Rounding of the printed numbers can move one draw's difference by up to {gain.hidden:.2f} points and gives"
            f" the mean a standard deviation of {gain.hidden_mean:.2f}. It assumes {rule.assumes}."
        )
    names = (pair.minuend, pair.subtrahend) if pair else ("", "")
    columns = statistic_columns(*names, (f"95 % bootstrap, {len(table.draws)} draws",))
    title = f"The published table, recomputed: {table.title}"
    return Table(f"published-{table.id}", title, "Queries", columns, tuple(rows), notes=tuple(notes))
