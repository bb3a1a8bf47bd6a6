"""All cells of a report, with our numbers and the paper's, as JSON and CSV with their provenance."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
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

    Args:
        tables: in the order of the page.
        parts: facts of each run, as `runs.run_facts` gives them.
    """
    for table in tables:
        for row in (*table.rows, *table.foot):
            for column, cell in zip(table.columns, row.cells, strict=True):
                numbers = {key: getattr(cell, key) for key in ("value", "low", "high", "deviation", "tolerance")}
                runs = list(dict.fromkeys(cell.runs))
                yield {
                    "table": table.id,
                    "row": row.label,
                    "span": column.span,
                    "column": column.head,
                    "kind": cell.kind,
                    "runs": runs,
                    "encoder": cell.encoder,
                    "metric": cell.metric,
                    "group": cell.group,
                    **{key: None if value is None else round(value, 4) for key, value in numbers.items()},
                    "correct": cell.correct,
                    "n": cell.n,
                    "count": cell.count,
                    "best": cell.best,
                    "verification": cell.level or None,
                    "verdict": cell.verdict or None,
                    "paper": asdict(cell.paper) if cell.paper else None,
                    "detail": cell.detail or None,
                    "records": [run_details.record_link(run, cell.part) for run in runs if cell.part in parts[run]["parts"]],
                    "commands": [run_details.command(run, cell.part) for run in (runs if len(runs) < 3 else ["RUN"])],
                }


def by_place(cells: Iterable[Mapping[str, Any]]) -> dict[Place, Mapping[str, Any]]:
    """Flat cells by their address; of rows with one name the second is `<name> (2)`."""
    found: dict[Place, Mapping[str, Any]] = {}
    for cell in cells:
        table, row, span, column = (str(cell[key]) for key in ("table", "row", "span", "column"))
        place, again = (table, row, span, column), 1
        while place in found:
            again += 1
            place = (table, f"{row} ({again})", span, column)
        found[place] = cell
    return found


def as_csv(cells: Iterable[Mapping[str, Any]]) -> str:
    """Flat cells as CSV without provenance, one line per cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(PLAIN)
    for cell in cells:
        paper = cell["paper"] or {}
        row = {**cell, "runs": " ".join(cell["runs"])}
        row |= {"paper_printed": paper.get("printed"), "paper_corrected": paper.get("corrected")}
        values = ["" if row[key] is None else row[key] for key in PLAIN]
        writer.writerow([text.csv_cell(value) if isinstance(value, str) else value for value in values])
    return stream.getvalue()


def as_json(tree: Mapping[str, Any]) -> str:
    """JSON with one line per entry of each list, so that diffs are readable and a thousand cells stay below a megabyte."""
    return "{\n" + ",\n".join(f"{_line(key)}:{_lines(value)}" for key, value in sorted(tree.items())) + "\n}\n"


def _lines(value: Any) -> str:
    return "[\n" + ",\n".join(map(_line, value)) + "\n]" if isinstance(value, list) and value else _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
