"""Are the files on disk those that the records give now? Compared byte for byte with a fresh render.

Every render leaves `render.json` beside its files: hashes of the report's code, the parameters, the records and the files.
It proves nothing, and nothing is believed because of it; it tells an edited file from one that the code, the parameters or
the records have left behind, so that a reader is told what to do.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from isd_repro.config.params import Params
from isd_repro.report.faults import Fault
from isd_repro.report.records import Records

STAMP = "render.json"
CELLS = "cells.json"
_SHOWN = 3  # places named in each file; a count says how many more there are
_AROUND = 40  # characters shown on both sides of a difference
_RENDER = "run `isd-repro report` again"
Place = tuple[str, str, str, str]  # table, row, span, column: a number's address


def stamped(params: Params, records: Records, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files and their `render.json`."""
    shown = params.model_dump(mode="json", include={"report", "evaluation", "subsets", "runs"})
    parts: dict[str, Any] = {
        f"{run}/{part}": record for run, found in records.runs.items() for part, record in found.records.items()
    }
    parts |= {f"{external.record.name}/external": external.record for external in records.externals}
    stamp = {
        "format": 1,
        "code": _code(),
        "params": _digest(_canonical(shown)),
        "records": {name: _digest(_canonical(record.model_dump(mode="json"))) for name, record in parts.items()},
        "files": {name: _digest(content) for name, content in files.items()},
    }
    return {**files, STAMP: json.dumps(stamp, indent=1, sort_keys=True).encode() + b"\n"}


def _canonical(tree: object) -> bytes:
    return json.dumps(tree, sort_keys=True, allow_nan=False).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def _code() -> str:
    """Sha256 over the report's modules and templates."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compare(folder: Path, files: Mapping[str, bytes]) -> list[Fault]:
    """Every file of a fresh render that is missing, or is not the same on disk, and every file that no render makes."""
    faults = []
    for name, content in files.items():
        path = folder / name
        if name == STAMP:
            continue
        if not path.is_file():
            faults.append(Fault(path, "file", "none", f"{len(content)} bytes", _RENDER))
        elif path.read_bytes() != content:
            faults += _differences(path, path.read_bytes(), content, cause(folder, files, name))
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and inside.as_posix() not in files and not any(part.startswith(".") for part in inside.parts):
            faults.append(Fault(path, "file", "a file that no render makes", "none", f"remove it, or {_RENDER}"))
    return faults


def cause(folder: Path, files: Mapping[str, bytes], name: str) -> str:
    """Why a file is probably not as rendered now, and what to do."""
    then, now = _stamp((folder / STAMP).read_bytes() if (folder / STAMP).is_file() else b""), _stamp(files[STAMP])
    if then.get("files", {}).get(name) is None:
        return f"it was rendered by an older version of the code, or edited: {_RENDER} and look at what git says has changed"
    if then["files"][name] != _digest((folder / name).read_bytes()):
        return f"it was edited after it was rendered: restore it from git, or {_RENDER}"
    if then.get("code") != now["code"]:
        return f"it was rendered by another version of the code: {_RENDER}"
    changed = [key for key in now["records"] if then.get("records", {}).get(key) != now["records"][key]]
    if changed:
        return f"records have changed since it was rendered ({', '.join(changed)}): {_RENDER}"
    if then.get("params") != now["params"]:
        return f"the parameters have changed since it was rendered: restore them, or {_RENDER}"
    return f"it was rendered with other versions of the packages: {_RENDER}"


def _stamp(content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) and isinstance(tree.get("files"), dict) else {}


def _differences(path: Path, found: bytes, expected: bytes, hint: str) -> list[Fault]:
    """The first places where two versions of a text file differ, each as a fault."""
    ours, theirs = (content.decode("utf-8", "replace").splitlines() for content in (found, expected))
    if len(ours) != len(theirs) or ours == theirs:
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        pairs = [(at, ours[at] if at < len(ours) else "", theirs[at] if at < len(theirs) else "")]
        more = f"; {len(ours)} lines here, {len(theirs)} in a fresh render"
    else:
        pairs = [(at, a, b) for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        more = f"; {len(pairs) - _SHOWN} more lines differ" if len(pairs) > _SHOWN else ""
    faults = []
    for at, a, b in pairs[:_SHOWN]:
        found_here, expected_here = _excerpt(a, b)
        faults.append(Fault(path, _place(path.suffix, theirs, at, a, b), found_here, expected_here, f"{hint}{more}"))
    return faults


def _excerpt(found: str, expected: str) -> tuple[str, str]:
    """Two lines cut down to where they differ, with a little on both sides."""
    start = next((at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    tail = 0
    while tail < min(len(found), len(expected)) - start and found[-1 - tail] == expected[-1 - tail]:
        tail += 1
    cut = max(0, start - _AROUND)

    def part(line: str) -> str:
        end = min(len(line), len(line) - tail + _AROUND)
        return ("\N{HORIZONTAL ELLIPSIS}" if cut else "") + line[cut:end] + ("\N{HORIZONTAL ELLIPSIS}" if end < len(line) else "")

    return part(found) or "nothing", part(expected) or "nothing"


def _place(suffix: str, lines: list[str], at: int, found: str, expected: str) -> str:
    """A line's number and, where it is a row of a table, the row's name and the column."""
    ours, theirs = _split(suffix, found), _split(suffix, expected)
    if len(theirs) < 2 or len(ours) != len(theirs):
        return f"line {at + 1}"
    column = next(place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    row, head = " ".join(theirs[:1]), f"column {column + 1}"
    if suffix == ".csv":
        row, head = " / ".join(theirs[:4]), _split(suffix, lines[0])[column]
    elif suffix == ".md":
        top = next((number for number in range(at, 0, -1) if not lines[number - 1].startswith("|")), 0)
        heads = _split(suffix, lines[top])
        head = heads[column] if len(heads) == len(theirs) else head
    return f"line {at + 1}, {row}, {head}"


def _split(suffix: str, line: str) -> list[str]:
    """A line's cells; one where it is no row of a table."""
    if suffix == ".csv":
        return next(csv.reader(io.StringIO(line)), [])
    if suffix == ".md" and line.startswith("|"):
        return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    if suffix == ".tex" and line.rstrip().endswith(r"\\"):
        return [cell.strip() for cell in re.split(r"(?<!\\)&", line)]
    return [line]


# --- numbers ------------------------------------------------------------------------------------------------------------


def cells_of(content: bytes) -> dict[Place, dict[str, Any]] | None:
    """The cells of a `cells.json` by their address; None where it is none."""
    try:
        found: dict[Place, dict[str, Any]] = {}
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


def name_of(place: Place) -> str:
    """A cell's address as a reader is told it."""
    table, row, span, column = place
    return f"{table} / {row} / {span} / {column}"


def cell_faults(
    path: Path, disk: Mapping[Place, dict[str, Any]], fresh: Mapping[Place, dict[str, Any]], hint: str, damaged: set[str]
) -> Iterator[tuple[Place, Fault]]:
    """Cells whose content is not what the records give; those of runs with damaged records are left out."""
    keys = ("kind", "value", "correct", "n") if damaged else None
    for place in dict.fromkeys([*fresh, *disk]):
        ours, theirs = disk.get(place), fresh.get(place)
        runs = {*(ours or {}).get("runs", ()), *(theirs or {}).get("runs", ())}
        if runs & damaged:
            continue
        if ours is None or theirs is None:
            found, expected = ("none", "this cell") if ours is None else ("a cell", "none: the records give no such cell")
            yield place, Fault(path, name_of(place), found, expected, hint)
            continue
        for key in keys or sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                yield place, Fault(path, f"{name_of(place)}: {key}", json.dumps(ours.get(key)), json.dumps(theirs.get(key)), hint)
