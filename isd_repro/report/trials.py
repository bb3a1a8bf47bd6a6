"""Trials of settings: the one chosen for each method, and a lower bound for the interval of the planned comparison."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from statistics import stdev

from isd_repro.config.params import Params, Trials
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.hypothesis import by_class
from isd_repro.report.repetitions import method_name, repetitions
from isd_repro.report.run_records import Records
from isd_repro.report.scores import method_cell

_TRIAL = re.compile(r",? trial \d+$")


def chosen(params: Params, records: Records, asked: Trials) -> dict[str, Cell]:
    """The best trial of each method whose trials have all been scored; the first of equals.

    Runs that differ only in their seed are one trial, whose score is the mean over seeds. Trials whose names differ only in the
    number of the trial (`ISD, trial 1`) belong to one method.
    """
    references = {params.report.reference, params.report.pixels}
    trials: dict[str, list[Cell]] = {}
    unfinished = set()
    for seeds in repetitions(params, [name for name in params.runs if name not in references]):
        method = _TRIAL.sub("", method_name(params, seeds[0]))
        cell = method_cell(records, seeds, ("student", f"{asked.k}-NN", asked.group))
        trials.setdefault(method, []).append(cell)
        if cell.value is None or len(cell.runs) < len(seeds):
            unfinished.add(method)
    best = {method: max(cells, key=lambda cell: cell.value or 0.0) for method, cells in trials.items()}
    return {method: cell for method, cell in best.items() if method not in unfinished}


def trial_tables(params: Params, records: Records, asked: Trials) -> list[Table]:
    """Tables of the chosen trial of each method, and of the precision that the trials predict for the later comparison."""
    best = chosen(params, records, asked)
    rows = tuple(Row(method_name(params, cell.runs[0]), (cell,), cell.runs[0]) for cell in best.values())
    columns = (Column(f"{asked.group.capitalize()} queries", f"{asked.k}-NN, student"),)
    note = "Optimistic, because each trial was chosen by this number."
    taken = [Table("trials-taken", "Trials taken", "Method", columns, rows, notes=(note,), sortable=False)] if rows else []
    by_score = sorted(best.values(), key=lambda cell: cell.value or 0.0)
    by_name = {params.runs[cell.runs[0]].method.name: cell for cell in by_score}  # the best of each
    return [*taken, *_precision(records, asked, by_name)]


def _precision(records: Records, asked: Trials, best: dict[str, Cell]) -> list[Table]:
    """Half-width of Student's interval over n draws if they differed only by their classes: t(n - 1) s / sqrt(classes n)."""
    plan = asked.power
    if plan is None or plan.first not in best or plan.second not in best:
        return []
    key = ("student", f"{asked.k}-NN", plan.group)
    ours, theirs = (by_class(records, best[name].runs, key) for name in (plan.first, plan.second))
    differences = [ours[name] - theirs[name] for name in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return []
    deviation = stdev(differences)
    halves = [intervals.student_quantile(n - 1) * deviation / math.sqrt(plan.classes * n) for n in plan.draws]
    blank = Cell("statistic", (*best[plan.first].runs, *best[plan.second].runs), *key, detail=f"over {len(differences)} classes")
    cells = [replace(blank, value=value, words=text.decimal(value, 2)) for value in (deviation, *halves)]
    columns = [Column("Over classes", "s.d."), *(Column("Smallest half-width of the interval", f"{n} draws") for n in plan.draws)]
    note = (
        f"Difference between the chosen trials over {len(differences)} {plan.group} classes, points; with {plan.classes} such"
        " classes per draw. Variation between trainings and classes that several draws share are not included."
    )
    row = Row(f"{plan.first} {text.MINUS} {plan.second}", tuple(cells))
    return [Table("expected-precision", "Expected precision", "Pair", tuple(columns), (row,), notes=(note,), sortable=False)]
