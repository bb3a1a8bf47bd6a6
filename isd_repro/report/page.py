"""Renders a profile's report: Markdown, LaTeX, one HTML page, JSON, CSV and SVG. Equal records give equal bytes."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isd_repro.config import Layout
from isd_repro.errors import UserError
from isd_repro.params import Params
from isd_repro.report import figures, findings, pivot, runs, text
from isd_repro.report.findings import Finding
from isd_repro.report.records import Records
from isd_repro.report.tables import Cell, Row, Table, subset_tables

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
DEVIATIONS = "../../../DEVIATIONS.md"  # from reports/<profile>/tables/
READING = (
    "Top-1 accuracy in percent \N{PLUS-MINUS SIGN} half the 95 % Wilson interval, which covers the choice of queries and not"
    " of the seed: one run behind each number. Bold marks the best value of a column, or of a row's methods where rows are"
    " subsets, even where the difference lies within the intervals. Where two runs are compared, the queries that each alone"
    " answers rightly are counted, and p is of McNemar's exact test on them, not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Block:
    """One subset, or one family of repeated draws: its tables, what they show, and its figure."""

    title: str
    tables: tuple[Table, ...]
    findings: tuple[Finding, ...]
    dots: figures.Dots | None


@dataclass(frozen=True)
class Report:
    """Everything that a profile's report says, in no format yet."""

    params: Params
    records: Records
    folder: str  # where commands are run, relative to the repository
    blocks: tuple[Block, ...]
    curves: figures.Curves | None
    footnotes: tuple[str, ...]
    runs: dict[str, dict[str, Any]]

    @property
    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [table for block in self.blocks for table in block.tables]


def assemble(params: Params, records: Records, layout: Layout) -> Report:
    """Compute every table, sentence and figure of a profile from its verified records."""
    blocks = []
    for subsets in pivot.families(params):
        if len(subsets) > 1:
            tables = pivot.pivot_tables(params, records, subsets)
            said = findings.pivot_findings(params, subsets, tables)
            dots = figures.pivot_dots(params, records, subsets)
            blocks.append(Block(f"{subsets[0]} to {subsets[-1]}", tuple(tables), tuple(said), dots))
        else:
            tables = subset_tables(params, records, subsets[0])
            said = findings.subset_findings(params, records, subsets[0])
            blocks.append(Block(subsets[0], tuple(tables), tuple(said), figures.subset_dots(params, records, subsets[0])))
    return Report(
        params=params,
        records=records,
        folder=runs.working_folder(layout),
        blocks=tuple(blocks),
        curves=figures.loss_curves(params, records),
        footnotes=tuple(findings.footnotes(params, records)),
        runs={name: runs.run_facts(params, found) for name, found in records.runs.items()},
    )


def render(report: Report) -> dict[str, bytes]:
    """Every file of the report by name.

    Raises:
        UserError: jinja2 is not installed.
    """
    markup, plain, tex = _environment("html"), _environment("markdown"), _environment("latex")
    files = {"table.md": _fill(plain, "table.md.jinja", report), "table.tex": _fill(tex, "table.tex.jinja", report)}
    files["index.html"] = _fill(markup, "page.html.jinja", report)
    css = _template_text("figure.css")
    if report.curves:
        files["loss-curves.svg"] = markup.get_template("curves.svg.jinja").render(f=report.curves, css=css)
    for block in report.blocks:
        if block.dots:
            files[_dots_name(block)] = markup.get_template("dots.svg.jinja").render(f=block.dots, css=css)
    files["cells.json"] = json.dumps(_cells_json(report), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    files["cells.csv"] = _cells_csv(report)
    return {name: content.encode("utf-8") for name, content in sorted(files.items())}


def _dots_name(block: Block) -> str:
    return f"scores-{block.title.replace(' ', '-')}.svg"


def _environment(kind: str) -> Environment:
    """Templates of one format: HTML and SVG escape by themselves, LaTeX has delimiters of its own."""
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
        md=text.markdown,
        mdpart=text.markdown_part,
        px=lambda value: f"{value:.1f}".removesuffix(".0"),
        count=text.count,
        duration=text.duration,
        one_decimal=text.one_decimal,
        linked=runs.linked,
        unbroken=lambda words: re.sub(r"\b([pn]) ([=<]) ", "\\1\u00a0\\2\u00a0", words),
        listing=text.listing,
    )
    return environment


def _tex_cell(cell: Cell) -> str:
    number = text.latex(cell.number)
    shown = f"\\textbf{{{number}}}" if cell.best else number
    return f"{shown} {{\\scriptsize$\\pm$ {cell.half}}}" if cell.half else shown


def _fill(environment: Environment, name: str, report: Report) -> str:
    done = [name for name, found in report.records.runs.items() if found.parts]
    recomputed, recorded = findings.verified(report.records)
    return environment.get_template(name).render(
        report=report,
        params=report.params,
        reading=READING,
        deviations=DEVIATIONS,
        done=done,
        seconds=runs.total_seconds(report.records),
        recomputed=recomputed,
        recorded=recorded,
        style=_template_text("style.css") + _template_text("figure.css"),
        script=_template_text("script.js"),
        cell_facts=lambda cell: runs.cell_facts(report.records, cell),
        part_rows=runs.part_rows,
        image_rows=runs.image_rows,
        flatten=text.flatten,
        command=runs.command,
        record_link=runs.record_link,
        dots_name=_dots_name,
    )


def _template_text(name: str) -> str:
    return (TEMPLATES / name).read_text("utf-8")


def _rows(report: Report) -> Iterator[tuple[Table, Row]]:
    for table in report.tables:
        for row in (*table.rows, *table.foot):
            yield table, row


def _cells(report: Report) -> Iterator[dict[str, Any]]:
    """Every cell as a flat mapping; numbers are rounded to 4 decimals, far below what an interval leaves open."""
    for table, row in _rows(report):
        for column, cell in zip(table.columns, row.cells, strict=True):
            numbers = {"value": cell.value, "low": cell.low, "high": cell.high}
            yield {
                "table": table.id,
                "row": row.label,
                "span": column.span,
                "column": column.head,
                "kind": cell.kind,
                "runs": list(cell.runs),
                "encoder": cell.encoder,
                "metric": cell.metric,
                "group": cell.group,
                **{key: None if value is None else round(value, 4) for key, value in numbers.items()},
                "correct": cell.correct,
                "n": cell.n,
                "best": cell.best,
                "verification": cell.level or None,
                "detail": cell.detail or None,
                "records": [runs.record_link(run, cell.part) for run in cell.runs if cell.part in report.runs[run]["parts"]],
                "commands": [runs.command(run, cell.part) for run in cell.runs],
            }


def _cells_json(report: Report) -> dict[str, Any]:
    return {
        "format": 1,
        "profile": report.params.profile,
        "title": report.params.report.title,
        "working_folder": report.folder,
        "cells": list(_cells(report)),
        "findings": [finding.plain for block in report.blocks for finding in block.findings],
        "footnotes": list(report.footnotes),
        "runs": report.runs,
    }


def _cells_csv(report: Report) -> str:
    keys = [
        "table",
        "row",
        "span",
        "column",
        "kind",
        "runs",
        "encoder",
        "metric",
        "group",
        "value",
        "low",
        "high",
        "correct",
        "n",
    ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    for cell in _cells(report):
        writer.writerow([" ".join(cell[key]) if key == "runs" else "" if cell[key] is None else cell[key] for key in keys])
    return stream.getvalue()
