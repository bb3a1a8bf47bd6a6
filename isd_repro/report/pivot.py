"""Repeated draws of one kind of subset (D1..D10) as the paper prints them: a row a draw, a column a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isd_repro.config.params import ListFile, Params
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Kind, Row, Table
from isd_repro.report.pool import method_name, pool, repetitions
from isd_repro.report.records import Key, Records
from isd_repro.report.tables import (
    ENCODERS,
    group_head,
    groups_of,
    head,
    mark_best,
    metrics_of,
    protocols,
    rule_text,
    runs_of,
    score_cell,
)

_DRAW = {"seed", "list", "large_classes", "halving", "part"}  # keys of a rule that tell draws of one kind apart


def drawn(params: Params, subset: str) -> list[str]:
    """Runs of a subset that count as a method's run on that draw: all but those that were decided after a result."""
    return [run for run in runs_of(params, subset) if run not in params.report.exploratory]


def peer(params: Params, run: str | None, subset: str) -> str | None:
    """The run that plays the part of `run` on a subset: itself, or the one of the same name there."""
    if run is None or params.runs[run].data.subset == subset:
        return run
    return next((other for other in drawn(params, subset) if method_name(params, other) == method_name(params, run)), None)


def families(params: Params) -> list[list[str]]:
    """Subsets that have runs, draws of one kind together; a list of one is a subset with tables of its own.

    Draws are put together only where each method names one run a subset, or several that differ in their seed alone, and appears
    on two or more of them.
    """
    kinds: dict[str, list[str]] = {}
    for subset, config in params.subsets.items():
        if drawn(params, subset):
            rule = config.rule.model_dump(mode="json", exclude=_DRAW)
            kind = (config.source.dataset, sorted(rule.items()), config.search_per_class, config.query_per_class)
            kinds.setdefault(repr(kind), []).append(subset)
    found = []
    for subsets in kinds.values():
        alike = [repetitions(params, drawn(params, subset)) for subset in subsets]
        names = [[method_name(params, seeds[0]) for seeds in of_one] for of_one in alike]
        distinct = all(len(set(of_one)) == len(of_one) for of_one in names)
        repeated = all(sum(name in of_one for of_one in names) > 1 for of_all in names for name in of_all)
        found += [subsets] if len(subsets) > 1 and distinct and repeated else [[subset] for subset in subsets]
    return found


def methods(params: Params, subsets: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Each method's runs by subset, one a seed, methods in the order in which the params first name them.

    Runs of one subset that share a name and differ in more than their seed are told apart by their own names.
    """
    found: dict[str, dict[str, list[str]]] = {}
    order = list(params.runs)
    groups = [seeds for subset in subsets for seeds in repetitions(params, drawn(params, subset))]
    for seeds in sorted(groups, key=lambda seeds: order.index(seeds[0])):
        subset, name = params.runs[seeds[0]].data.subset, method_name(params, seeds[0])
        taken = subset in found.get(name, {})
        found.setdefault(seeds[0] if taken else name, {})[subset] = seeds
    return found


def contest(params: Params, subsets: Sequence[str]) -> tuple[str | None, list[str]]:
    """The method under test (the first with method `isd`, else the first) and those it is compared with; references stay out.

    Where the report states a hypothesis, methods that learn from labels are references, too.
    """
    aside = {method_name(params, run) for run in (params.report.reference, params.report.pixels) if run}
    if params.report.hypothesis:
        aside |= {method_name(params, name) for name, run in params.runs.items() if run.method.name == "supervised"}
    trained = {name: runs for name, runs in methods(params, subsets).items() if name not in aside}
    of_isd = [name for name, runs in trained.items() if params.runs[next(iter(runs.values()))[0]].method.name == "isd"]
    subject = next(iter(of_isd or trained), None)
    return subject, [name for name in trained if name != subject]


def pivot_tables(params: Params, records: Records, subsets: Sequence[str]) -> list[Table]:
    """One table per encoder and metric."""
    found = [records.runs[run] for subset in subsets for run in drawn(params, subset)]
    dataset = params.subsets[subsets[0]].source.dataset
    lists = [rule.list for rule in (params.subsets[subset].rule for subset in subsets) if isinstance(rule, ListFile)]
    images = f"the authors' lists {text.listing(lists)}" if lists else rule_text(params, subsets[0])
    notes = (f"Training images of each draw: {images}.", *protocols(params, found))
    tables: list[Table] = []
    for encoder in ENCODERS:
        for metric in metrics_of(params, found, encoder):
            title = f"{subsets[0]} to {subsets[-1]}, {head(metric)}, {encoder}: {dataset}"
            blank = Table(f"{subsets[0]}-{subsets[-1]}-{encoder}-{metric}", title, "Subset", (), (), notes=notes)
            tables.append(_table(params, records, subsets, (encoder, metric), replace(blank, main=not tables)))
    return tables


def _table(params: Params, records: Records, subsets: Sequence[str], key: tuple[str, str], blank: Table) -> Table:
    by_method = methods(params, subsets)
    subject, others = contest(params, subsets)
    groups = list(dict.fromkeys(group for subset in subsets for group in groups_of(params, records, subset)))
    found = [records.runs[run] for runs in by_method.values() for seeds in runs.values() for run in seeds]
    columns: list[Column] = []
    body: list[list[Cell]] = [[] for _ in subsets]
    for group in groups:
        span = group_head(found, group)
        columns += [Column(span, name) for name in by_method]
        columns += [Column(span, difference_head(subject, other, others)) for other in others]
        for subset, row in zip(subsets, body, strict=True):
            scores = {name: draw_cell(records, runs.get(subset, ()), (*key, group)) for name, runs in by_method.items()}
            differences = [difference_cell(records, scores[subject], scores[other]) for other in others] if subject else []
            row.extend([*mark_best(list(scores.values())), *differences])
    rows = tuple(Row(subset, tuple(cells)) for subset, cells in zip(subsets, body, strict=True))
    foot = _mean_row(rows, len(by_method), len(by_method) + len(others))
    return replace(blank, columns=tuple(columns), rows=rows, foot=(foot,))


def draw_cell(records: Records, runs: Sequence[str], key: Key) -> Cell:
    """A method's number on one draw: a run's score, or the mean over its seeds."""
    return (
        pool([score_cell(records.runs[run], *key) for run in runs], "seeds")
        if runs
        else Cell("none", (), *key, detail="no such run")
    )


def _mean_row(rows: Sequence[Row], scores: int, width: int) -> Row:
    """Means over the draws that lack nothing, so that all columns speak of the same draws.

    A row is blocks of `width` cells, one a group, of which the first `scores` are methods and the others differences. A
    column without a number in any row (a method not run yet, the teacher of one that has none) is left out of account.
    """
    columns = [[row.cells[at] for row in rows] for at in range(len(rows[0].cells))]
    needed = [column for column in columns if any(cell.value is not None for cell in column)]
    complete = [at for at in range(len(rows)) if needed and all(column[at].value is not None for column in needed)]
    cells = [_mean([column[at] for at in complete], column) for column in columns]
    for start in range(0, len(cells), width):
        cells[start : start + scores] = mark_best(cells[start : start + scores])
    return Row("Mean" if len(complete) == len(rows) else f"Mean ({len(complete)} of {len(rows)})", tuple(cells))


def _mean(members: Sequence[Cell], column: Sequence[Cell]) -> Cell:
    like, runs = column[0], tuple(run for cell in members for run in cell.runs)
    if all(cell.value is None for cell in members):
        kind: Kind = "not run" if any(cell.kind == "not run" for cell in column) else "none"
        return Cell(kind, runs, like.encoder, like.metric, like.group, detail="no draw has every number")
    if len(members) > 1:
        return pool(members, "draws")
    kind = "difference" if members[0].kind == "difference" else "mean"
    return Cell(kind, runs, like.encoder, like.metric, like.group, members[0].value, detail="of one draw", count=1)


def difference_head(subject: str | None, other: str, others: Sequence[str]) -> str:
    """`Diff`, the paper's word, where only one is possible."""
    return "Diff" if len(others) == 1 else f"{subject} {text.MINUS} {other}"


def difference_cell(records: Records, subject: Cell, other: Cell) -> Cell:
    """Points by which the subject's score exceeds the other's, taken before rounding."""
    key = (subject.encoder, subject.metric, subject.group)
    cell = Cell("difference", (*subject.runs, *other.runs), *key)
    if subject.value is None or other.value is None:
        kinds = {subject.kind, other.kind}
        return replace(cell, kind="not run" if "not run" in kinds else "none", detail="needs both runs")
    paired = compare(records, subject, other)
    sides = [text.listing(list(side.runs)) for side in (subject, other)]
    over_seeds = " means over seeds," if len(subject.runs) > 1 or len(other.runs) > 1 else ""
    detail = f"{sides[0]} {text.MINUS} {sides[1]},{over_seeds} before rounding"
    return replace(cell, value=subject.value - other.value, detail=f"{detail}; {paired}" if paired else detail)


def discordant(records: Records, subject: Cell, other: Cell) -> tuple[int, int] | None:
    """Queries that only the subject, and that only the other, answers rightly.

    None where predictions are not stored, or where one side is a mean over seeds.
    """
    if len(subject.runs) > 1 or len(other.runs) > 1:
        return None
    hits = []
    for cell in (subject, other):
        evaluation = records.runs[cell.runs[0]].evaluation(cell.metric)
        hits.append(evaluation.hits(cell.encoder, cell.metric, cell.group) if evaluation else None)
    ours, theirs = hits
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum())


def compare(records: Records, subject: Cell, other: Cell) -> str:
    """The paired exact test of two runs on the same queries, in words; empty where predictions are not stored."""
    pair = discordant(records, subject, other)
    if pair is None:
        return ""
    return f"alone right on {text.count(pair[0])} against {text.count(pair[1])}, {text.p_value(intervals.sign_test(*pair))}"
