"""The templates for HTML, Markdown and LaTeX, and their filters for numbers and names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from isd_repro.report import run_details, text
from isd_repro.report.cells import Cell, Table
from isd_repro.runtime.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


def environment(kind: str) -> Environment:
    """The templates of one format: HTML and SVG are escaped automatically, and LaTeX templates have other delimiters.

    Raises:
        UserError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise UserError("the report needs jinja2, which is not installed", "pip install 'isd-repro[report]'") from error
    signs = {"block": ("<%", "%>"), "variable": ("<<", ">>"), "comment": ("<#", "#>")} if kind == "latex" else {}
    delimiters = {
        f"{what}_{end}_string": sign for what, pair in signs.items() for end, sign in zip(("start", "end"), pair, strict=True)
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=kind == "html",  # noqa: S701 - the filters `md` and `tex` escape Markdown and LaTeX
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **delimiters,  # type: ignore[arg-type]
    )
    environment.filters.update(
        tex=text.latex,
        texcell=_tex_cell,
        texlegend=_tex_legend,
        panels=panels,
        md=text.markdown,
        mdpart=text.markdown_part,
        count=text.count,
        duration=text.duration,
        decimal=text.decimal,
        linked=run_details.linked,
        unbroken=lambda words: re.sub(r"\b([pn]) ([=<]) ", "\\1\u00a0\\2\u00a0", words),
        listing=text.listing,
    )
    return environment


def template_text(name: str) -> str:
    """The unchanged text of a file in the templates' folder."""
    return (TEMPLATES / name).read_text("utf-8")


def data_uri(svg: str) -> str:
    """A chart as a `data:` URI, so that charts on one page do not affect each other."""
    return "data:image/svg+xml," + quote(svg, safe=" !$()*+,-./:;=?@[]_{}|~'")


def _tex_cell(cell: Cell) -> str:
    number = f"\\textbf{{{text.latex(cell.number)}}}" if cell.best else text.latex(cell.number)
    return f"{number} {{\\scriptsize {text.latex(cell.aside)}}}".strip() if cell.aside else number


def panels(table: Table, most: int = 10, wide: int = 6) -> list[Table]:
    """Split a table of more than `most` columns into several of at most `wide`, between shared headings, to fit on paper.

    A shared heading of more than `most` columns is split into parts of `most`.
    """
    if len(table.columns) <= most:
        return [replace(table, rows=table.shown)]
    cuts, at = [0], 0
    for width in (min(most, whole - start) for _, whole in table.spans for start in range(0, whole, most)):
        if at + width - cuts[-1] > wide and at > cuts[-1]:
            cuts.append(at)
        at += width
    parts = [range(start, end) for start, end in zip(cuts, [*cuts[1:], at], strict=True)]
    return [replace(table, rows=table.shown).only(part) for part in parts]


def _tex_legend(table: Table) -> str:
    """The end of a caption, which explains the scores of a table."""
    if not any(cell.kind in ("score", "external", "mean") for row in (*table.rows, *table.foot) for cell in row.cells):
        return ""
    return (
        r" Accuracy in percent $\pm$ half the 95\,\% Wilson interval over queries of one run; s.d.: standard deviation over n"
        " seeds or draws; bold: best, even within the intervals."
    )
