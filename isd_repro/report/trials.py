"""A profile of trials: which one of each method is taken, and how narrow an interval its spread foretells."""

from __future__ import annotations

import math
from statistics import stdev

from isd_repro.config.params import Params, Trials
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell
from isd_repro.report.findings import Finding
from isd_repro.report.hypothesis import by_class
from isd_repro.report.records import Records
from isd_repro.report.tables import score_cell


def chosen(params: Params, records: Records, asked: Trials) -> dict[str, Cell]:
    """The best trial of each method whose trials have all been scored; the first of equals. Methods by `method.name`."""
    aside = {params.report.reference, params.report.pixels}
    trials: dict[str, list[Cell]] = {}
    for name, run in params.runs.items():
        if name not in aside:
            cell = score_cell(records.runs[name], "student", f"{asked.k}-NN", asked.group)
            trials.setdefault(run.method.name, []).append(cell)
    return {
        method: max(cells, key=lambda cell: cell.value or 0.0)
        for method, cells in trials.items()
        if all(cell.value is not None for cell in cells)
    }


def trial_findings(params: Params, records: Records, asked: Trials) -> list[Finding]:
    """What is taken, one sentence a method, and what the trials say of the comparison to come."""
    best = chosen(params, records, asked)
    found = [
        Finding(
            f"Taken, {method}",
            f"{params.runs[cell.runs[0]].label} ({cell.runs[0]}), {text.decimal(cell.value or 0.0, 2)} on {asked.group} queries"
            f" ({asked.k}-NN, student); optimistic, since it was chosen by this number.",
        )
        for method, cell in best.items()
    ]
    return [*found, *_power(records, asked, best)]


def _power(records: Records, asked: Trials, best: dict[str, Cell]) -> list[Finding]:
    """Half-width of Student's interval over n draws if classes alone made them differ: t(n - 1) s / sqrt(classes n)."""
    plan = asked.power
    if plan is None or plan.first not in best or plan.second not in best:
        return []
    key = ("student", f"{asked.k}-NN", plan.group)
    ours, theirs = (by_class(records, best[name].runs, key) for name in (plan.first, plan.second))
    differences = [ours[name] - theirs[name] for name in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return []
    spread = stdev(differences)
    widths = [
        f"{text.decimal(intervals.student_quantile(n - 1) * spread / math.sqrt(plan.classes * n), 2)} points with {n} draws"
        for n in plan.draws
    ]
    return [
        Finding(
            "Expected precision",
            f"over the {len(differences)} {plan.group} classes here the difference between the trials taken of {plan.first} and"
            f" {plan.second} has a standard deviation of {text.decimal(spread, 2)} points, so the interval over draws of"
            f" {plan.classes} such classes is to be at least \N{PLUS-MINUS SIGN} {text.listing(widths)}. It leaves out the spread"
            " between trainings, and classes that draws share.",
        )
    ]
