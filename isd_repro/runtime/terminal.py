"""Tables on a terminal; in a pipe nothing is truncated or coloured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, JustifyMethod, OverflowMethod
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from isd_repro.runtime.errors import printable


def show_table(
    out: Console, heads: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", left: int = 1, *, fold: bool = False
) -> None:
    """Print cells below their heads; the first `left` columns are text, the others numbers.

    On a narrow terminal cells are truncated, or wrapped to several lines with `fold`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    overflow: OverflowMethod = "fold" if fold else "ellipsis"
    for at, head in enumerate(heads):
        justify: JustifyMethod = "left" if at < left else "right"
        table.add_column(Text(head), justify=justify, no_wrap=not fold, overflow=overflow)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    if not out.is_terminal:
        unbounded = out.options.update(width=10_000, max_width=10_000)
        out.width = max(out.width, Measurement.get(out, unbounded, table).maximum)
    if title:
        out.print(printable(title), style="bold", markup=False, soft_wrap=True)
    out.print(table)
