"""Whether the rendered files are those that the records give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isd_repro.report import cards, dvc_files, page
from isd_repro.report.run_records import Records
from isd_repro.report.stamp import STAMP, cause
from isd_repro.verify.findings import Place, Verification

CELLS = "cells.json"
_RENDER = "run `isd-repro report` again"


def check_rendered(state: Verification, records: Records) -> dict[Place, dict[str, Any]]:
    """Compare the report on the disk with a fresh one, byte by byte; the numbers that either shows, by address."""
    layout = state.layout
    report = page.assemble(state.params, records, layout, state.problems.append)
    damaged = {run for problem in state.problems for run in problem.runs}
    files = page.render(report)
    fresh = _cells(files[CELLS]) or {}
    path = layout.report / CELLS
    disk = _cells(path.read_bytes()) if path.is_file() else None
    if not layout.report.is_dir():
        state.notes.append(f"no report in {state.shown(layout.report)} yet: the numbers are those that `report` would render")
        return fresh
    for place in dict.fromkeys([*fresh, *disk]) if disk is not None else ():
        ours, theirs = (disk or {}).get(place, {}), fresh.get(place, {})
        keys = ("kind", "value", "correct", "n") if damaged else sorted({*ours, *theirs})
        wrong = [key for key in keys if ours.get(key) != theirs.get(key)]
        if wrong and not damaged & {*ours.get("runs", ()), *theirs.get("runs", ())}:
            pair = (json.dumps(cell.get(wrong[0])) for cell in (ours, theirs))
            where = f"{' / '.join(place)}: {wrong[0]}"
            state.cells[place] = state.problem(path, where, *pair, cause(layout.report, files, CELLS))
    if damaged:
        state.notes.append("other rendered files were not compared, because records or parameters failed their checks")
    else:
        _same_bytes(state, layout.report, {name: content for name, content in files.items() if name != CELLS or not state.cells})
        if layout.cards.is_dir():
            _same_bytes(state, layout.cards, cards.render(state.params, records, layout))
        if (layout.results / dvc_files.METRICS).is_file():
            _same_bytes(state, layout.results, dvc_files.render(records), others=False)
    return {**(disk or {}), **{place: cell for place, cell in fresh.items() if cell["value"] is not None or not disk}}


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
    names = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if others and path.is_file()}
    for path, inside in names.items():
        if inside.as_posix() not in files and inside.name != CELLS and not any(part.startswith(".") for part in inside.parts):
            state.problem(path, "file", "a file that no render writes", "none", f"remove it, or {_RENDER}")


def _cells(content: bytes) -> dict[Place, dict[str, Any]] | None:
    """The cells of a `cells.json` by their address; None where it is none."""
    found: dict[Place, dict[str, Any]] = {}
    try:
        for cell in json.loads(content)["cells"]:
            table, row, span, column = (str(cell[key]) for key in ("table", "row", "span", "column"))
            place, again = (table, row, span, column), 1
            while place in found:  # rows of one name
                again += 1
                place = (table, f"{row} ({again})", span, column)
            found[place] = cell
    except (ValueError, KeyError, TypeError):
        return None
    return found
