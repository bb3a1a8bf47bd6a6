"""The paper's table of ten draws: our gain beside its gain, draw by draw and on average, and what its own numbers say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from isd_repro.config.params import Beside, Params
from isd_repro.report import published, text
from isd_repro.report.beside import AGAINST, OURS, ROUNDING, THEIRS, notes_of, obstacle, paper_cell
from isd_repro.report.cells import Cell, Column, Row, Table, Verdict
from isd_repro.report.findings import Finding
from isd_repro.report.paper import Paper, PaperTable, Tolerance
from isd_repro.report.pivot import difference_cell, draw_cell
from isd_repro.report.pool import evidence, pool
from isd_repro.report.published import Gain
from isd_repro.report.records import RECORDED, Records
from isd_repro.report.tables import with_n


@dataclass(frozen=True)
class Group:
    """One group of queries: the paper's column, or what two of its columns imply, and our number."""

    head: str
    column: str  # of the paper; empty where implied
    metric: str
    group: str
    tolerance: Tolerance | None


def groups_of(table: PaperTable) -> list[Group]:
    """The groups that a table prints, then the one that it implies."""
    found = [
        Group(about.head, key, about.metric or "", about.group, about.mean_difference) for key, about in table.columns.items()
    ]
    if table.implied:
        rule = table.implied
        found.append(Group(rule.head, "", table.columns[rule.whole].metric or "", rule.group, rule.mean_difference))
    return found


def sides(params: Params, table: PaperTable, wanted: Beside) -> dict[str, tuple[list[str], list[str]]]:
    """Our runs of the two methods by draw, in the table's order; an empty list where no run stands there."""
    contest = table.contest
    if contest is None:
        return {}
    found: dict[str, tuple[list[str], list[str]]] = {draw: ([], []) for draw in table.draws}
    for run in params.runs:
        row = table.rows[wanted.rows[run]] if run in wanted.rows else None
        if row and row.draw and row.method in (contest.minuend, contest.subtrahend):
            found[row.draw][row.method == contest.subtrahend].append(run)
    return found


def draw_tables(params: Params, records: Records, paper: Paper, table: PaperTable, wanted: Beside) -> list[Table]:
    """Gains by draw with their mean and its verdict; then the levels, which have none."""
    gains = published.gains(table)
    contest = table.contest
    if contest is None:
        return []
    placed = sides(params, table, wanted)
    columns: list[Column] = []
    body: list[list[Cell]] = [[] for _ in placed]
    foot: list[Cell] = []
    for group, gain in zip(groups_of(table), gains, strict=True):
        key = ("student", group.metric, group.group)
        scores = [[draw_cell(records, side, key) for side in runs] for runs in placed.values()]
        head = with_n(group.head, [cell for both in scores for cell in both])
        columns += [Column(head, word) for word in (OURS, THEIRS, AGAINST)]
        ours = [difference_cell(records, first, second) for first, second in scores]
        theirs = _published_differences(paper, table, group, gain)
        for cells, our, their in zip(body, ours, theirs, strict=True):
            cells += [our, their, _plain_difference(our, their)]
        foot += _means(params, records, table, placed, ours, gain, group)
    rows = tuple(Row(draw, tuple(cells)) for draw, cells in zip(placed, body, strict=True))
    title = f"Beside the paper: gain of {contest.minuend} over {contest.subtrahend}, 1-NN, points"
    notes = (*notes_of(table), *_tolerances(table))
    first = Table(f"paper-{table.id}", title, "Draw", tuple(columns), rows, (Row("Mean", tuple(foot)),), notes)
    return [first, _levels(records, paper, table, placed, gains)]


def _published_differences(paper: Paper, table: PaperTable, group: Group, gain: Gain) -> list[Cell]:
    contest = table.contest
    found = []
    for at, draw in enumerate(table.draws):
        row = next((name for name, row in table.rows.items() if contest and (row.method, row.draw) == (contest.equals, draw)), "")
        if group.column and row:
            found.append(paper_cell(paper, table, row, group.column))
        else:
            value = gain.differences[at]
            detail = f"from the printed groups; rounding can move it by {gain.hidden:.2f}"
            found.append(Cell("computed", (), "student", group.metric, group.group, value, detail=detail))
    return [
        replace(cell, words=text.signed(cell.value) + cell.number[-1:] * cell.number.endswith("*"))
        if cell.value is not None
        else cell
        for cell in found
    ]


def _plain_difference(ours: Cell, theirs: Cell) -> Cell:
    cell = Cell("against", ours.runs, ours.encoder, ours.metric, ours.group, paper=theirs.paper)
    if ours.value is None or theirs.value is None:
        return replace(cell, detail="needs our number")
    return replace(cell, value=ours.value - theirs.value, detail="a single draw has no verdict, their mean has")


def _means(
    params: Params,
    records: Records,
    table: PaperTable,
    placed: dict[str, tuple[list[str], list[str]]],
    ours: Sequence[Cell],
    gain: Gain,
    group: Group,
) -> list[Cell]:
    """Our mean gain, the paper's, and the verdict, which needs every draw."""
    done = [cell for cell in ours if cell.value is not None]
    mine = pool(list(ours), "draws") if len(ours) > 1 else ours[0]
    said = f"computed from the {'printed groups' if gain.implied else 'printed levels, as corrected'}; {evidence(gain.paired)}"
    paired = gain.paired
    theirs = Cell(
        "computed", (), "student", group.metric, group.group, paired.mean, low=paired.low, high=paired.high, detail=said
    )
    theirs = replace(theirs, deviation=paired.deviation, count=paired.n, words=text.signed(paired.mean, 2))
    cell = Cell("against", mine.runs, "student", group.metric, group.group)
    if group.tolerance is None:
        return [mine, theirs, cell]
    points = float(group.tolerance.points)
    cell = replace(cell, tolerance=points)
    if not done:
        return [mine, theirs, replace(cell, detail="needs our number")]
    why = f"{len(done)} of {len(ours)} draws have been run" if len(done) < len(ours) else ""
    why = why or ("nothing checks our number" if any(one.level == RECORDED for one in (*ours, mine)) else "")
    for draw, both in placed.items():
        row = next(row for row in table.rows.values() if row.draw == draw)
        why = why or next(filter(None, (obstacle(params, records, run, row) for side in both for run in side)), "")
    if why or mine.value is None:
        return [mine, theirs, replace(cell, verdict="not comparable", detail=why)]
    difference = mine.value - paired.mean
    verdict: Verdict = "within" if abs(difference) <= points + ROUNDING else "outside"
    detail = f"{OURS} {mine.value:+.2f}, paper {paired.mean:+.2f}; tolerance {points} points: {group.tolerance.why}"
    return [mine, theirs, replace(cell, value=difference, verdict=verdict, detail=detail)]


def _levels(
    records: Records, paper: Paper, table: PaperTable, placed: dict[str, tuple[list[str], list[str]]], gains: Sequence[Gain]
) -> Table:
    """Both methods' accuracy, ours and the paper's, without a verdict."""
    contest = table.contest
    names = (contest.minuend, contest.subtrahend) if contest else ("", "")
    columns: list[Column] = []
    body: list[list[Cell]] = [[] for _ in placed]
    foot: list[Cell] = []
    for group, gain in zip(groups_of(table), gains, strict=True):
        for at, (name, mean) in enumerate(zip(names, (gain.first, gain.second), strict=True)):
            columns += [Column(group.head, f"{name}, {OURS}"), Column(group.head, f"{name}, {THEIRS}")]
            ours = [draw_cell(records, runs[at], ("student", group.metric, group.group)) for runs in placed.values()]
            for cells, our, draw in zip(body, ours, placed, strict=True):
                cells += [our, _level(paper, table, name, draw, group)]
            foot += [pool(ours, "draws") if len(ours) > 1 else ours[0]]
            foot.append(
                Cell("computed", (), "student", group.metric, group.group, mean, detail="mean of the column, as corrected")
            )
    rows = tuple(Row(draw, tuple(cells)) for draw, cells in zip(placed, body, strict=True))
    reasons = dict.fromkeys(about.not_comparable for about in table.columns.values() if about.not_comparable)
    title = f"{table.title}: levels, not comparable"
    notes = tuple(f"Not comparable: {reason}." for reason in reasons)
    return Table(f"paper-{table.id}-levels", title, "Draw", tuple(columns), rows, (Row("Mean", tuple(foot)),), notes, main=False)


def _level(paper: Paper, table: PaperTable, method: str, draw: str, group: Group) -> Cell:
    if group.column:
        row = next(name for name, row in table.rows.items() if (row.method, row.draw) == (method, draw))
        return paper_cell(paper, table, row, group.column)
    rule = table.implied
    whole, part = (table.of_draw(method, draw, key) for key in (rule.whole, rule.part)) if rule else (None, None)
    blank = Cell("none", (), "student", group.metric, group.group)
    if rule is None or whole is None or part is None:
        return blank
    return replace(blank, kind="computed", value=float(rule.of(whole.value, part.value)), detail="implied by the printed groups")


def _tolerances(table: PaperTable) -> list[str]:
    limits = [
        f"{group.head}, {group.tolerance.points} points: {group.tolerance.why}" for group in groups_of(table) if group.tolerance
    ]
    return [f"Tolerances of the mean gain, fixed before any run: {'; '.join(limits)}."] if limits else []


def published_table(table: PaperTable) -> Table:
    """The published table under our statistics: means, gain, spread, interval and test by group."""
    contest = table.contest
    heads = [contest.subtrahend, contest.minuend] if contest else []
    columns = [Column("Mean", name) for name in heads]
    columns += [Column("Gain", word) for word in ("mean", "s.d.", "low", "high")]
    columns += [Column("Draws", "ahead"), Column("Draws", "behind"), Column("Sign-flip test", "p")]
    rows = []
    for gain in published.gains(table):
        paired = gain.paired
        numbers = [
            (gain.second, text.decimal(gain.second, 2)),
            (gain.first, text.decimal(gain.first, 2)),
            (paired.mean, text.signed(paired.mean, 2)),
            (paired.deviation, "" if paired.deviation is None else text.decimal(paired.deviation, 2)),
            *((value, "" if value is None else text.signed(value, 2)) for value in (paired.low, paired.high)),
            (paired.above, str(paired.above)),
            (paired.below, str(paired.below)),
            (paired.p, f"{paired.p:.3f}"),
        ]
        blank = Cell("computed", (), "student", "1-NN", gain.group, detail=f"computed from {table.title}, as corrected")
        rows.append(Row(gain.head, tuple(replace(blank, value=value, words=words) for value, words in numbers)))
    note = (
        "Computed from the printed numbers, misprints corrected; the paper prints neither means nor tests. Low and high: 95 %"
        f" bootstrap interval of the mean over {len(table.draws)} draws."
    )
    return Table(
        f"published-{table.id}",
        f"The published table, recomputed: {table.title}",
        "Queries",
        tuple(columns),
        tuple(rows),
        notes=(note,),
    )


def published_findings(table: PaperTable) -> list[Finding]:
    """The same in sentences, each implied group with its rule, its rounding error and its assumption."""
    contest = table.contest
    found = []
    for gain in published.gains(table):
        paired = gain.paired
        spread = "" if paired.deviation is None else f" (standard deviation {paired.deviation:.2f})"
        body = f"{text.signed(paired.mean, 2)} points on average over {paired.n} draws{spread}; {evidence(paired)}"
        if gain.implied and table.implied:
            rule = table.implied
            rest = rule.classes - rule.part_classes
            body += (
                f". Not printed: computed as ({rule.classes} {rule.whole} {text.MINUS} {rule.part_classes} {rule.part}) / {rest}."
                f" Rounding of the printed numbers can move one draw's difference by up to {gain.hidden:.2f} points and gives the"
                f" mean a standard deviation of {gain.hidden_mean:.2f}. It assumes {rule.assumes}"
            )
        lead = f"Published {contest.minuend} against {contest.subtrahend}, {gain.head.lower()}" if contest else gain.head
        found.append(Finding(lead, f"{body}."))
    return found
