"""A verdict for every number of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isd_repro.evaluations import kind_of
from isd_repro.report import numbers
from isd_repro.report.learning_curves import LAST
from isd_repro.report.problems import Key, Problem
from isd_repro.report.run_records import RECORDED, Records, RunRecords
from isd_repro.verify.findings import Place, Verdict, Verification

NOT_RUN = "no record of the run has this score"
_ORDER = list(Verdict)


@dataclass(frozen=True)
class Number:
    """One number of a rendered report: its cell, the runs or the evaluated checkpoint that it comes from, and its verdict."""

    place: Place
    cell: Mapping[str, Any]
    runs: tuple[str, ...]
    verdict: Verdict
    reason: str = ""  # of a failure: the file and key

    def as_json(self) -> dict[str, Any]:
        """A flat mapping."""
        said = {key: self.cell[key] for key in ("kind", "encoder", "metric", "group", "value")}
        where = dict(zip(("table", "row", "span", "column"), self.place, strict=True))
        return {**where, **said, "runs": list(self.runs), "verdict": str(self.verdict), "reason": self.reason or None}


def numbers_of(state: Verification, records: Records, cells: Mapping[Place, Mapping[str, Any]]) -> list[Number]:
    """A verdict for every cell that has a number of ours and is asked for, never better than what was done for it.

    Repetitions that have not been run are behind no number; a mean has the verdict of those that were.
    """
    wanted, found_numbers = set(state.options.runs), []
    for place, cell in cells.items():
        runs, found = numbers.runs_of(cell), numbers.found_of(cell, records)
        runs = tuple(one.run for one in found) if cell["kind"] == "external" and found else runs
        if not runs or (wanted and not wanted & set(runs)):
            continue
        each = [_verdict(state, one, cell) for one in found]
        made = [one for one in each if one[1] != NOT_RUN] if len(each) > 1 else each
        verdict, reason = min(made, key=lambda one: _ORDER.index(one[0]), default=(Verdict.FAILED, f"{NOT_RUN}: {runs[0]}"))
        if place in state.cells:
            verdict, reason = Verdict.FAILED, f"{state.cells[place].file}: {state.cells[place].key}"
        found_numbers.append(Number(place, cell, runs, verdict, reason))
    return found_numbers


def _verdict(state: Verification, found: RunRecords, cell: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Verdict of one score of a run or an evaluated checkpoint, and why it failed."""
    key: Key = (cell["encoder"], cell["metric"], cell["group"])
    snapshot = cell["kind"] == "snapshot"
    for problem in state.problems:
        if found.run in problem.runs and _concerns(problem, found, key, snapshot=snapshot):
            return Verdict.FAILED, f"{problem.file}: {problem.key}"
    if numbers.is_early_snapshot(cell, found):
        return (Verdict.RE_EVALUATED if (found.run, int(cell["column"])) in state.snapshots else Verdict.RECORDED), ""
    scores = list(numbers.scores_of(found, key))
    if not scores:
        return Verdict.FAILED, NOT_RUN
    if all((found.run, key[0], metric) in state.repeated for _, metric in scores):
        return Verdict.RE_EVALUATED, ""
    return (Verdict.RECORDED if numbers.level_of(cell, found) == RECORDED else Verdict.RECOMPUTED), ""


def _concerns(problem: Problem, found: RunRecords, key: Key, *, snapshot: bool) -> bool:
    """A problem of one evaluation's record says nothing of another's numbers; one of a data set's is the mean's over all."""
    encoder, metric, _ = key
    part, kind = problem.file.stem, kind_of(metric)
    if part in found.curves:  # its last point and the run's own scores are one encoder's: which of the two is right?
        return snapshot or (problem.key == LAST and metric in {score.metric for score in found.curves[part].points[-1].scores})
    if problem.score is not None and problem.score != key:
        return problem.score[0] == encoder and problem.score[1].startswith(f"{metric}-") and kind in found.targets
    known = found.evaluations.keys()
    return part not in known or kind not in known or part == kind
