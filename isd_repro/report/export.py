"""All cells of a report, with our numbers and the paper's, as JSON and CSV with their provenance."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, count
from typing import Any

from isd_repro.report import run_details, text
from isd_repro.report.cells import Table

CELLS, FORMAT = "cells.json", 2  # the file that holds every cell of a page, and its form
Place = tuple[str, str, str, str]  # table, row, span, column: the address of a cell
PLAIN = (  # columns of the CSV
    *("table", "row", "span", "column", "kind", "runs", "encoder", "metric", "group", "value", "low", "high", "correct", "n"),
    *("deviation", "count", "verdict", "tolerance", "paper_printed", "paper_corrected"),
)


def flat(tables: Sequence[Table], parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cell as a flat mapping; numbers are rounded to 4 decimals, far below the width of any interval.

    `parts` are the facts of each run, as `run_details.run_facts` gives them.
    """
    for table in tables:
        for row in (*table.rows, *table.foot):
            for column, cell in zip(table.columns, row.cells, strict=True):
                runs, facts = list(dict.fromkeys(cell.runs)), asdict(cell)
                del facts["words"]
                facts |= {"table": table.id, "row": row.label, "span": column.span, "column": column.head, "runs": runs}
                for key in ("value", "low", "high", "deviation", "tolerance"):
                    facts[key] = None if facts[key] is None else round(facts[key], 4)
                yield facts | {
                    "verification": facts.pop("level") or None,
                    "verdict": cell.verdict or None,
                    "detail": cell.detail or None,
                    "records": [run_details.record_link(run, cell.part) for run in runs if cell.part in parts[run]["parts"]],
                    "commands": [run_details.command(run, cell.part) for run in (runs if len(runs) < 3 else ["RUN"])],
                }


def by_place(cells: Iterable[Mapping[str, Any]]) -> dict[Place, Mapping[str, Any]]:
    """Flat cells by their address; of rows with one name the second is `<name> (2)`."""
    found: dict[Place, Mapping[str, Any]] = {}
    for cell in cells:
        table, row, span, column = (str(cell[key]) for key in ("table", "row", "span", "column"))
        names = chain([row], (f"{row} ({again})" for again in count(2)))
        found[next(place for name in names if (place := (table, name, span, column)) not in found)] = cell
    return found


def as_csv(cells: Iterable[Mapping[str, Any]]) -> str:
    """Flat cells as CSV without provenance, one line per cell."""
    rows: list[Sequence[Any]] = [PLAIN]
    for cell in cells:
        paper = cell["paper"] or {}
        row = {**cell, "runs": " ".join(cell["runs"])}
        row |= {"paper_printed": paper.get("printed"), "paper_corrected": paper.get("corrected")}
        rows.append([text.csv_cell(row[key]) if isinstance(row[key], str) else row[key] for key in PLAIN])
    return table_csv(rows)


def table_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def as_json(tree: Mapping[str, Any]) -> str:
    """JSON with one line per entry of each list, so that diffs are readable and a thousand cells stay below a megabyte."""
    return "{\n" + ",\n".join(f"{_line(key)}:{_lines(value)}" for key, value in sorted(tree.items())) + "\n}\n"


def _lines(value: Any) -> str:
    return "[\n" + ",\n".join(map(_line, value)) + "\n]" if isinstance(value, list) and value else _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
