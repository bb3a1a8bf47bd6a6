"""Whether the rendered files are those that the records give, and a verdict for every number of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isd_repro.evaluations import kind_of
from isd_repro.report import cards, dvc_files, numbers, page
from isd_repro.report.consistency import LAST
from isd_repro.report.export import CELLS, Place, by_place
from isd_repro.report.problems import Key, Problem
from isd_repro.report.run_records import RECORDED, Records, RunRecords
from isd_repro.report.stamp import STAMP, cause
from isd_repro.verify.findings import Verdict, Verification

NOT_RUN = "no record of the run has this score"
_RENDER = "run `isd-repro report` again"
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


# --- files ------------------------------------------------------------------------------------------------------------


def check_rendered(state: Verification, records: Records) -> list[Number]:
    """Compare the report on the disk with a fresh one, byte by byte; a verdict for every number that either shows."""
    layout, edited = state.layout, dict[Place, Problem]()
    report = page.assemble(state.params, records, layout)
    damaged = {run for problem in state.problems for run in problem.runs}
    files = page.render(report)
    fresh = by_place(json.loads(files[CELLS])["cells"])
    if not layout.report.is_dir():
        state.notes.append(f"no report in {state.shown(layout.report)} yet: the numbers are those that `report` would render")
        return judged(state, records, fresh, {})
    path = layout.report / CELLS
    disk = _cells(path)
    for place in dict.fromkeys([*fresh, *disk]) if disk else ():
        ours, theirs = disk.get(place, {}), fresh.get(place, {})
        keys = ("kind", "value", "correct", "n") if damaged else sorted({*ours, *theirs})
        wrong = [key for key in keys if ours.get(key) != theirs.get(key)]
        if wrong and not damaged & {*ours.get("runs", ()), *theirs.get("runs", ())}:
            pair = (json.dumps(cell.get(wrong[0])) for cell in (ours, theirs))
            where = f"{' / '.join(place)}: {wrong[0]}"
            edited[place] = state.problem(path, where, *pair, cause(layout.report, files, CELLS))
    if damaged:
        state.notes.append("other rendered files were not compared, because records or parameters failed their checks")
    else:
        _same_bytes(state, layout.report, {name: content for name, content in files.items() if name != CELLS or not edited})
        if layout.cards.is_dir():
            _same_bytes(state, layout.cards, cards.render(state.params, records, layout))
        if (layout.results / dvc_files.METRICS).is_file():
            _same_bytes(state, layout.results, dvc_files.render(records), others=False)
    cells = {**disk, **{place: cell for place, cell in fresh.items() if cell["value"] is not None or not disk}}
    return judged(state, records, cells, edited)


def _same_bytes(state: Verification, folder: Path, files: Mapping[str, bytes], others: bool = True) -> None:
    """Every file of a fresh render is on the disk, and unless `others` is false no other file beside them."""
    for name in (name for name in files if name != STAMP):
        path = folder / name
        if not path.is_file():
            state.problem(path, "file", "none", f"{len(files[name])} bytes", _RENDER)
        elif (found := path.read_bytes()) != files[name]:
            ours, theirs = (content.decode("utf-8", "replace").splitlines() for content in (found, files[name]))
            at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            pair = (lines[at][:200] if at < len(lines) else "nothing" for lines in (ours, theirs))
            state.problem(path, f"line {at + 1}", *pair, cause(folder, {**files, STAMP: files.get(STAMP, b"")}, name))
    for path in sorted(folder.rglob("*")) if others else ():
        inside = path.relative_to(folder)
        known = inside.as_posix() in files or inside.name == CELLS or any(part.startswith(".") for part in inside.parts)
        if path.is_file() and not known:
            state.problem(path, "file", "a file that no render writes", "none", f"remove it, or {_RENDER}")


def _cells(path: Path) -> dict[Place, Mapping[str, Any]]:
    """The cells of a `cells.json` by their address; none where it is none."""
    try:
        return by_place(json.loads(path.read_bytes())["cells"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def judged(
    state: Verification, records: Records, cells: Mapping[Place, Mapping[str, Any]], edited: Mapping[Place, Problem]
) -> list[Number]:
    """A verdict for every cell that has a number of ours and is asked for, never better than what was done for it.

    Repetitions that have not been run are behind no number; a mean has the verdict of those that were. `edited` are the problems
    of single cells.
    """
    wanted, judged_cells = set(state.options.runs), []
    for place, cell in cells.items():
        runs, found = numbers.runs_of(cell), numbers.found_of(cell, records)
        runs = tuple(one.run for one in found) if cell["kind"] == "external" and found else runs
        if not runs or (wanted and not wanted & set(runs)):
            continue
        each = [_verdict(state, one, cell) for one in found]
        made = [one for one in each if one[1] != NOT_RUN] if len(each) > 1 else each
        verdict, reason = min(made, key=lambda one: _ORDER.index(one[0]), default=(Verdict.FAILED, f"{NOT_RUN}: {runs[0]}"))
        if place in edited:
            verdict, reason = Verdict.FAILED, f"{edited[place].file}: {edited[place].key}"
        judged_cells.append(Number(place, cell, runs, verdict, reason))
    return judged_cells


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
