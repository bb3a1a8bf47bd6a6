"""A verdict for every number of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from isd_repro.evaluations import kind_of
from isd_repro.report.learning_curves import LAST
from isd_repro.report.problems import Key, Problem
from isd_repro.report.run_records import RECORDED, Records, RunRecords
from isd_repro.verify.findings import Place, Verdict, Verification

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
    """A verdict for every cell that has a number of ours and is asked for, never better than what was done for it."""
    wanted, numbers = set(state.options.runs), []
    externals = {external.label: external.found for external in records.externals}
    for place, cell in cells.items():
        brought = cell["kind"] == "external"
        found = [externals[cell["row"]]] if brought and cell["row"] in externals else []
        runs = tuple(one.run for one in found) or ((cell["row"],) if brought else tuple(dict.fromkeys(cell["runs"])))
        if cell["value"] is None or not runs or cell["kind"] in ("paper", "computed") or (wanted and not wanted & set(runs)):
            continue
        each = [_verdict(state, one, cell) for one in found or [records.runs[run] for run in runs if run in records.runs]]
        verdict, reason = min(each, key=lambda one: _ORDER.index(one[0]), default=(Verdict.FAILED, f"no records of {runs[0]}"))
        if place in state.cells:
            verdict, reason = Verdict.FAILED, f"{state.cells[place].file}: {state.cells[place].key}"
        numbers.append(Number(place, cell, runs, verdict, reason))
    return numbers


def _verdict(state: Verification, found: RunRecords, cell: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Verdict of one score of a run or an evaluated checkpoint, and why it failed."""
    key: Key = (cell["encoder"], cell["metric"], cell["group"])
    snapshot = cell["kind"] == "snapshot"
    for problem in state.problems:
        if found.run in problem.runs and _concerns(problem, found, key, snapshot=snapshot):
            return Verdict.FAILED, f"{problem.file}: {problem.key}"
    epoch = int(cell["column"]) if snapshot else 0
    if snapshot and any(epoch != curve.points[-1].epoch for curve in found.curves.values()):  # the last one is the run's encoder
        return (Verdict.RE_EVALUATED if (found.run, epoch) in state.snapshots else Verdict.RECORDED), ""
    scores = list(_scores(found, key))
    if not scores:
        return Verdict.FAILED, f"no record of {found.run} has {' '.join(key)}"
    if all((found.run, key[0], metric) in state.repeated for _, metric in scores):
        return Verdict.RE_EVALUATED, ""
    return (Verdict.RECORDED if any(level == RECORDED for level, _ in scores) else Verdict.RECOMPUTED), ""


def _scores(found: RunRecords, key: Key) -> Iterator[tuple[str, str]]:
    """Level and metric of the scores behind a number: one, or one for each data set where it is their mean."""
    encoder, metric, group = key
    if (own := found.evaluation(metric)) is not None:
        if key in own.levels:
            yield own.levels[key], metric
        return
    for kind, targets in found.targets.items():
        for name, one in targets.sets.items() if kind == kind_of(metric) else ():
            for (other, base, of), level in one.levels.items():
                if (other, of) == (encoder, group) and metric in (base, f"{base}-{name}"):
                    yield level, f"{base}-{name}"


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
