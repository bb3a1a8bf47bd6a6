"""Stage `report`: writes tables, figures and a page from the committed records."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.report import text
from isd_repro.runtime.errors import UserError, printable
from isd_repro.runtime.files import write_atomic

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from isd_repro.report.cells import Row, Table
    from isd_repro.report.page import Report


def report(params: Params, layout: Layout, console: Console) -> None:
    """Write tables, cards and the files for DVC, and print the URL of the page on standard output.

    Only the records are read, no encoders, features or images. Remarks on irregular records go to `console`.

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
    Console(file=sys.stdout, highlight=False).print((layout.report / "index.html").resolve().as_uri(), soft_wrap=True)


def show(params: Params, layout: Layout, *, metric: str = "", wide: bool = False) -> None:
    """Print the result on standard output without writing files; the URL of the page, if it has been rendered, comes last.

    The table shows the score `metric` for each group of queries, by default the first one; with `wide`, every column of every
    main table is printed, with one row per seed.

    Raises:
        DataError: as for `report`.
        UserError: no table has the metric.
    """
    assembled, out = _assemble(params, layout), Console(file=sys.stdout, highlight=False)
    mains = [[table for table in block.tables if table.main] for block in assembled.blocks]
    every = [table for tables in mains for table in tables]
    known = sorted({name for table in every for at in range(len(table.columns)) for name in _metrics(table, at)})
    if metric and metric not in known:
        raise UserError(f"--metric {metric}: no table of profile {params.profile!r} has it", f"choose from {', '.join(known)}")
    for block, tables in zip(assembled.blocks, mains, strict=True):
        for table in tables if wide and not metric else _narrowed(tables, metric)[: None if wide else 1]:
            _print_table(out, table, wide=wide)
        for finding in block.findings:
            out.print(_safe(out, finding.plain), markup=False, soft_wrap=not out.is_terminal)
        if block.findings:
            out.print()
    if assembled.result:
        out.print(_safe(out, assembled.result), markup=False, soft_wrap=not out.is_terminal)
    path = layout.report / "index.html"
    if path.is_file():
        out.print(path.resolve().as_uri(), markup=False, soft_wrap=True)


def _assemble(params: Params, layout: Layout) -> Report:
    from isd_repro.report import page, run_records

    return page.assemble(params, run_records.load(params, layout), layout)


def _metrics(table: Table, at: int) -> set[str]:
    """The scores that a column shows; several if the rows are scores."""
    return {row.cells[at].metric for row in table.rows if row.cells[at].metric}


def _narrowed(tables: list[Table], metric: str) -> list[Table]:
    """The tables with only the columns of the score `metric`; by default that of a table's first column."""
    found = []
    for table in tables:
        shown = [_metrics(table, at) for at in range(len(table.columns))]
        wanted = {metric} if metric else next(filter(None, shown), set())
        keep = [at for at, metrics in enumerate(shown) if len(metrics) != 1 or metrics == wanted]
        if wanted <= set().union(*shown):
            found.append(table.only(keep))
    return found


def _print_table(out: Console, table: Table, *, wide: bool) -> None:
    """Print a table on a terminal; unless `wide`, the last columns are left out if the terminal is too narrow for them.

    Numbers are never wrapped. In a pipe nothing is truncated or coloured.
    """
    from rich.measure import Measurement

    unbounded = out.options.update(width=10_000, max_width=10_000)
    count = len(table.columns)
    grid = _grid(out, table, count, seeds=wide)
    while out.is_terminal and not wide and count > 1 and Measurement.get(out, unbounded, grid).maximum > out.width:
        count -= 1
        grid = _grid(out, table, count, seeds=wide)
    if not out.is_terminal:
        out.width = max(out.width, Measurement.get(out, unbounded, grid).maximum)
    out.print(grid)
    if not wide and any(cell.deviation is not None for row, _ in table.groups for cell in row.cells):
        out.print("(): standard deviation over seeds. ±: 95 % interval over queries.", style="dim")
    if count < len(table.columns):
        left = len(table.columns) - count
        out.print(f"{left} more column{'s' if left > 1 else ''}: isd-repro show --wide", style="dim")
    out.print()


def _grid(out: Console, table: Table, count: int, *, seeds: bool) -> RichTable:
    """The first `count` columns of a table; a row for each seed, or one for all of them."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    title = Text(_safe(out, table.title))
    grid = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column(Text(table.first), overflow="fold")
    rows, foot = (table.shown, table.foot) if seeds else (tuple(row for row, _ in table.groups), table.last)
    for at, column in enumerate(table.columns[:count]):
        widest = max((len(_cell_text(row, at, seeds=seeds)) for row in (*rows, *foot)), default=0)
        head = Text(_safe(out, f"{column.span}\n{column.head}"))
        grid.add_column(head, justify="right", overflow="fold", min_width=widest)
    for row in (*rows, *foot):
        cells = [
            Text(_safe(out, _cell_text(row, at, seeds=seeds)), style="bold" if cell.best else "dim" if cell.value is None else "")
            for at, cell in enumerate(row.cells[:count])
        ]
        grid.add_row(Text(_safe(out, row.label)), *cells, end_section=bool(foot) and row is rows[-1])
    return grid


def _cell_text(row: Row, at: int, *, seeds: bool) -> str:
    """The text of a cell; `80.0 (1.5)`, mean and standard deviation, if the row's name states the number of seeds."""
    cell = row.cells[at]
    if seeds or cell.deviation is None or not row.label.endswith(f", {cell.count} seeds"):
        return cell.plain
    return f"{cell.number} ({text.decimal(cell.deviation)})"


def _safe(out: Console, words: str) -> str:
    """Text in characters that the terminal can show, without control characters."""
    words = printable(words)
    try:
        words.encode(out.encoding)
    except UnicodeEncodeError:
        plain = words.replace("\N{PLUS-MINUS SIGN}", "+-").replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
        return plain.encode(out.encoding, "replace").decode(out.encoding)
    return words
