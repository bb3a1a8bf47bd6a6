"""Stage `report`: writes tables, figures and a page from the committed records."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.runtime.errors import printable
from isd_repro.runtime.files import write_atomic

if TYPE_CHECKING:
    from isd_repro.report.cells import Table
    from isd_repro.report.page import Report


def report(params: Params, layout: Layout, console: Console) -> None:
    """Write tables, cards and the files for DVC, and print the main tables on stdout, the path of the page last.

    Reads the records alone: no encoder, no features, no images. Remarks on odd records go to `console`.

    Raises:
        DataError: a record is damaged, or disagrees with another or with its own predictions.
        UserError: a package of the extra `report` is missing.
    """
    from isd_repro.report import cards, dvc_files, page

    assembled = _assemble(params, layout)
    rendered = {  # all of it before the first file is written: a refusal leaves what is there
        (layout.report, "*.svg"): page.render(assembled),
        (layout.cards, "*.md"): cards.render(params, assembled.records, layout),
        (layout.results, "plots/*"): dvc_files.render(assembled.records),
    }
    for (folder, pattern), files in rendered.items():
        for path in folder.glob(pattern):
            if path.relative_to(folder).as_posix() not in files:
                path.unlink()
        for name, content in files.items():
            write_atomic(folder / name, content)
    for note in assembled.footnotes:
        console.print(printable(note), style="dim", markup=False, highlight=False)
    _print(assembled, layout)


def show(params: Params, layout: Layout) -> None:
    """Print the main tables on stdout and write nothing; the path of the page, if it has been made, comes last.

    Raises:
        DataError: as `report`.
    """
    _print(_assemble(params, layout), layout)


def _assemble(params: Params, layout: Layout) -> Report:
    from isd_repro.report import page, run_records

    return page.assemble(params, run_records.load(params, layout), layout)


def _print(assembled: Report, layout: Layout) -> None:
    """Tables as a terminal shows them; in a pipe nothing is cut and nothing is coloured."""
    out = Console(file=sys.stdout, highlight=False)
    for block in assembled.blocks:
        for table in block.tables:
            if table.main:
                _print_table(out, table)
        for finding in block.findings:
            out.print(_safe(out, finding.plain), markup=False, soft_wrap=not out.is_terminal)
        if block.findings:
            out.print()
    if assembled.result:
        out.print(_safe(out, assembled.result), markup=False, soft_wrap=not out.is_terminal)
    path = layout.report / "index.html"
    if path.is_file():
        shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        out.print(shown, markup=False, soft_wrap=True)


def _print_table(out: Console, table: Table) -> None:
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table as Grid
    from rich.text import Text

    title = Text(_safe(out, table.title))
    grid = Grid(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column(Text(table.first), overflow="fold")
    for column in table.columns:
        grid.add_column(Text(_safe(out, f"{column.span}\n{column.head}")), justify="right", overflow="fold")
    for row in (*table.shown, *table.foot):
        styles = ["bold" if cell.best else "dim" if cell.value is None else "" for cell in row.cells]
        cells = [Text(_safe(out, cell.plain), style=style) for cell, style in zip(row.cells, styles, strict=True)]
        grid.add_row(Text(_safe(out, row.label)), *cells, end_section=bool(table.foot) and row is table.shown[-1])
    if not out.is_terminal:
        unbounded = out.options.update(width=10_000, max_width=10_000)
        out.width = max(out.width, Measurement.get(out, unbounded, grid).maximum)
    out.print(grid)


def _safe(out: Console, words: str) -> str:
    """Words in what the terminal's encoding can show, without commands to the terminal."""
    words = printable(words)
    try:
        words.encode(out.encoding)
    except UnicodeEncodeError:
        plain = words.replace("\N{PLUS-MINUS SIGN}", "+-").replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
        return plain.encode(out.encoding, "replace").decode(out.encoding)
    return words
