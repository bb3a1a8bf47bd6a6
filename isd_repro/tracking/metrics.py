"""`metrics.jsonl`, the file behind every curve.

Every row is one line of JSON, written with one unbuffered call, so a killed run leaves every finished row and at most one
incomplete line, which readers drop. A value that is not finite is written as null, and the row's `not_finite` states what it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError

AXES = ("epoch", "step")  # what a row is a row of; its other keys are values

Row = dict[str, Any]
_NOT_FINITE = "not_finite"
_ANEW = "delete the file and run its stage again"


def read_metrics(path: Path) -> list[Row]:
    """Rows of a `metrics.jsonl`; of several rows with the same epoch (and step), the last one is kept, in the place of the first.

    Raises:
        DataError: the file is missing, or a line before the last is not a JSON object.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for row in _rows(path):
        rows[key_of(row)] = row
    return list(rows.values())


def truncate_metrics(path: Path, keep: Callable[[Row], bool]) -> None:
    """Drop every row for which `keep` is false, atomically; a resumed run drops the rows that are later than its checkpoint."""
    if not path.is_file():
        return
    try:
        kept = "".join(line(row) for row in _rows(path) if keep(row))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a row has no epoch or step ({error})", _ANEW) from error
    files.write_atomic(path, kept.encode())


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the `pretrain` stage of this run")
    *complete, _torn = path.read_text("utf-8", errors="replace").split("\n")
    rows = []
    for number, text in enumerate(complete, start=1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error})", _ANEW) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object, found {type(row).__name__}", _ANEW)
        rows.append(row)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """One row in the form in which the file holds it."""
    lost = {key: value for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    clean: Row = {key: None if key in lost else value for key, value in row.items()}
    if lost:
        clean[_NOT_FINITE] = ", ".join(f"{key}={value}" for key, value in lost.items())
    return json.dumps(clean, allow_nan=False) + "\n"


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a row: its epoch and step."""
    return tuple(row.get(axis) for axis in AXES)


def finite(row: Mapping[str, Any]) -> Row:
    """The values of a row that are finite numbers or text, whether the row was just measured or read from the file."""
    kept = {key: value for key, value in row.items() if value is not None and key != _NOT_FINITE}
    return {key: value for key, value in kept.items() if not isinstance(value, float) or math.isfinite(value)}


def open_for_append(path: Path) -> FileIO:
    """Open a file for appending rows after its last complete line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("ab", buffering=0)
