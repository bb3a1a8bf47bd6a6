"""Renders a profile's report: Markdown, LaTeX, one HTML page, JSON, CSV and SVG. Equal records give equal bytes."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import CurveRecord
from isd_repro.report import (
    costs,
    export,
    figures,
    hypothesis,
    learning_curves,
    overview,
    paper_comparison,
    run_details,
    text,
    trials,
)
from isd_repro.report import paper as papers
from isd_repro.report import tables as ours
from isd_repro.report.cells import Cell, Finding, Table
from isd_repro.report.faults import Sink, refuse
from isd_repro.report.figures import Figure
from isd_repro.report.footnotes import footnotes, verified
from isd_repro.report.records import Records
from isd_repro.report.rendered import stamped
from isd_repro.report.repetitions import families, rivals
from isd_repro.runtime.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
DEVIATIONS = "../../../DEVIATIONS.md"  # from reports/<profile>/tables/
READING = (
    "Top-1 accuracy in percent \N{PLUS-MINUS SIGN} half the 95 % Wilson interval, which covers the choice of queries and not"
    " of the seed. Means over seeds or draws carry their standard deviation (s.d.) and number (n) instead. Bold marks the best"
    " value of a column, or of a row's methods where rows are subsets, even where the difference lies within the intervals. Where"
    " two runs are compared, the queries that each alone answers rightly are counted, and p is of McNemar's exact test on them;"
    " where two methods are compared over draws, the interval is a bootstrap's of the mean difference and p is of a sign-flip"
    " permutation test. No p is corrected for the number of comparisons."
)
READING_PAPER = (
    " Beside the paper, diff is ours less the paper's before rounding, and the verdict says whether it is within or"
    " outside a tolerance that was fixed with its reason before any run; 'not comparable' withholds the verdict and says why."
)


@dataclass(frozen=True)
class Block:
    """One section of the page: its tables, what they show, and its charts."""

    title: str
    tables: tuple[Table, ...]
    findings: tuple[Finding, ...]
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that a profile's report says, in no format yet."""

    params: Params
    records: Records
    folder: str  # where commands are run, relative to the repository
    result: str  # one sentence; empty where nothing has been scored
    overview: tuple[tuple[str, str], ...]  # what a reader wants to know in a minute
    blocks: tuple[Block, ...]
    footnotes: tuple[str, ...]
    runs: dict[str, dict[str, Any]]
    sources: tuple[tuple[str, str], ...]  # of published numbers

    @property
    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [table for block in self.blocks for table in block.tables]

    @property
    def figures(self) -> list[Figure]:
        """All charts, in order."""
        return [figure for block in self.blocks for figure in block.figures]


def assemble(params: Params, records: Records, layout: Layout, sink: Sink = refuse) -> Report:
    """Compute every table, sentence and figure of a profile from its verified records.

    Raises:
        ConfigError: `report.paper` names what the paper does not have.
        DataError: a record of snapshots disagrees with its run's other records; unless `sink` takes it.
    """
    blocks = [*_beside(params, records), *_asked(params, records)]
    for subsets in families(params):
        if len(subsets) > 1:
            name = f"{subsets[0]} to {subsets[-1]}"
            tables = [*ours.draw_tables(params, records, subsets), *hypothesis.family_tables(params, records, subsets)]
        else:
            name, differences = subsets[0], ours.difference_table(params, records, subsets[0])
            tables = [*ours.subset_tables(params, records, subsets[0]), *([differences] if differences else [])]
        blocks.append(Block(name, tuple(tables), (), _present(figures.scores(params, records, subsets))))
        pair = rivals(params, subsets)
        if gains := figures.class_gains(params, records, subsets, *pair) if pair else None:
            blocks.append(Block("Gains by class", (), (), (gains,)))
    if tried := params.report.trials:
        blocks.append(Block("Trials", tuple(trials.trial_tables(params, records, tried)), ()))
    blocks += [Block(title, tuple(tables), ()) for title, tables in ours.exploratory_tables(params, records)]
    asked = [*ours.few_label_tables(params, records), *ours.target_tables(params, records)]
    blocks += [Block(table.title, (table,), ()) for table in asked]
    every = [table for block in blocks for table in block.tables]
    blocks += _trajectories(params, records, learning_curves.load(params, layout, records, sink))
    if curves := figures.losses(params, records):
        blocks.append(Block("Training loss", (), (), (curves,)))
    return Report(
        params=params,
        records=records,
        folder=run_details.working_folder(layout),
        result=overview.result(params, records),
        overview=tuple(overview.facts(params, records, every)),
        blocks=tuple(blocks),
        footnotes=tuple(footnotes(params, records)),
        runs={name: run_details.run_facts(params, found) for name, found in records.runs.items()},
        sources=_sources(params),
    )


def _asked(params: Params, records: Records) -> list[Block]:
    """What the profile exists to say: a comparison over its draws."""
    blocks = []
    if wanted := params.report.hypothesis:
        table, said = hypothesis.hypothesis_table(params, records, wanted), hypothesis.finding(params, records, wanted)
        groups = ("rare", "all", "large") if wanted.group == "rare" else (wanted.group,)
        keys = [(wanted.encoder, f"{wanted.k}-NN", group) for group in groups]
        pairs = [done for key in keys if (done := hypothesis.compared(params, records, wanted, key))]
        drawn = figures.differences(pairs, wanted.first, wanted.second, wanted.contradicted_below) if pairs else None
        blocks.append(Block("The hypothesis", (table,) if table else (), (said,), _present(drawn)))
    return blocks


def _trajectories(params: Params, records: Records, kept: Mapping[str, CurveRecord]) -> list[Block]:
    """One block for each subset with snapshots, or with runs beside the paper's figure of them."""
    blocks = []
    for subset in params.subsets:
        paper = learning_curves.references(params, records, subset)
        figure = figures.trajectories(params, kept, subset, paper)
        table = learning_curves.curve_table(params, records, kept, subset, paper)
        if figure and table:
            blocks.append(Block(table.title, (table,), (), (figure,)))
    return blocks


def _beside(params: Params, records: Records) -> list[Block]:
    """One block for each table of the paper that runs stand beside."""
    blocks = []
    for wanted in params.report.paper:
        paper = papers.load()
        table = paper_comparison.resolve(params, paper, wanted)
        if not table.curve:  # drawn with our own curve
            tables = paper_comparison.comparison_tables(params, records, paper, table, wanted)
            blocks.append(Block(table.title, tuple(tables), tuple(paper_comparison.findings(paper, table))))
    return blocks


def _sources(params: Params) -> tuple[tuple[str, str], ...]:
    """Where the published numbers on the page were read: (table, source)."""
    if not params.report.paper:
        return ()
    paper = papers.load()
    tables = [paper.table(wanted.table) for wanted in params.report.paper]
    read = [(table, paper.sources[table.source]) for table in tables]
    return tuple(
        (table.title, f"{table.version}; read from {source.title}: {source.where}; confidence {table.confidence}")
        for table, source in read
    )


def render(report: Report) -> dict[str, bytes]:
    """Every file of the report by name.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    drawn = {figure.name: figure.svg() for figure in report.figures}
    templates = {"table.md": "markdown", "table.tex": "latex", "index.html": "html"}
    files = {name: _fill(environment(kind), f"{name}.jinja", report, drawn) for name, kind in templates.items()}
    files |= {f"{figure.name}.svg": drawn[figure.name] for figure in report.figures}
    files["cells.json"] = export.as_json(_cells_json(report))
    files["cells.csv"] = export.as_csv(report.tables, report.runs)
    encoded = {name: content.encode("utf-8") for name, content in sorted(files.items())}
    return stamped(report.params, report.records, encoded)


def _present(figure: Figure | None) -> tuple[Figure, ...]:
    return (figure,) if figure else ()


def environment(kind: str) -> Environment:
    """Templates of one format: HTML and SVG escape by themselves, LaTeX has delimiters of its own.

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
        panels=_panels,
        md=text.markdown,
        mdpart=text.markdown_part,
        count=text.count,
        duration=text.duration,
        one_decimal=text.one_decimal,
        linked=run_details.linked,
        unbroken=lambda words: re.sub(r"\b([pn]) ([=<]) ", "\\1\u00a0\\2\u00a0", words),
        listing=text.listing,
    )
    return environment


def _tex_cell(cell: Cell) -> str:
    number = text.latex(cell.number)
    shown = f"\\textbf{{{number}}}" if cell.best else number
    return f"{shown} {{\\scriptsize {text.latex(cell.aside)}}}".strip() if cell.aside else shown


def _panels(table: Table, most: int = 10, wide: int = 6) -> list[Table]:
    """A table of more than `most` columns as several of at most `wide`, cut between shared heads; paper has an edge.

    A shared head of more than `most` columns is cut into parts of `most`.
    """
    if len(table.columns) <= most:
        return [table]
    cuts, at = [0], 0
    for width in (min(most, whole - start) for _, whole in table.spans for start in range(0, whole, most)):
        if at + width - cuts[-1] > wide and at > cuts[-1]:
            cuts.append(at)
        at += width
    parts = [slice(start, end) for start, end in zip(cuts, [*cuts[1:], at], strict=True)]
    return [
        replace(
            table,
            columns=table.columns[part],
            rows=tuple(replace(row, cells=row.cells[part]) for row in table.shown),
            foot=tuple(replace(row, cells=row.cells[part]) for row in table.foot),
        )
        for part in parts
    ]


def _tex_legend(table: Table) -> str:
    """The end of a caption: what the numbers of this table are."""
    cells = [cell for row in (*table.rows, *table.foot) for cell in row.cells]
    kinds = {cell.kind for cell in cells}
    said = []
    if kinds & {"score", "external"}:
        what = "Top-1 or top-5, as headed," if any(cell.metric.endswith("top5") for cell in cells) else "Top-1 accuracy"
        said.append(rf"{what} in percent $\pm$ half the 95\,\% Wilson interval over queries of one run")
    if any(cell.count for cell in cells):
        said.append("s.d.: standard deviation over n seeds or draws")
    if "against" in kinds:
        said.append("diff: ours less the paper's, with a verdict by a tolerance fixed beforehand")
    if any(cell.best for cell in cells):
        pivot = not table.rows[0].run and not said[0].startswith("diff")
        said.append(f"bold: best {'method of a row' if pivot else 'of a column'}, even within the intervals")
    words = "; ".join(said)
    return f" {words[:1].upper()}{words[1:]}." if words else ""


def _fill(environment: Environment, name: str, report: Report, drawn: Mapping[str, str]) -> str:
    recomputed, recorded = verified(report.records)
    return environment.get_template(name).render(
        report=report,
        params=report.params,
        reading=READING + READING_PAPER * bool(report.params.report.paper),
        deviations=DEVIATIONS,
        done=[name for name, found in report.records.runs.items() if found.parts],
        seconds=run_details.total_seconds(report.records),
        recomputed=recomputed,
        recorded=recorded,
        spent=costs.table(costs.of_profile(report.params, report.records)),
        style=template_text("style.css"),
        script=template_text("script.js"),
        cell_facts=lambda cell: run_details.cell_facts(report.records, cell, report.folder),
        part_rows=run_details.part_rows,
        image_rows=run_details.image_rows,
        flatten=text.flatten,
        command=run_details.command,
        record_link=run_details.record_link,
        picture=lambda figure: data_uri(drawn[figure.name]),
    )


def data_uri(svg: str) -> str:
    """A chart as the address of an image, which no other chart on the page can disturb."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def template_text(name: str) -> str:
    """A file of the templates' folder as it stands."""
    return (TEMPLATES / name).read_text("utf-8")


def _cells_json(report: Report) -> dict[str, Any]:
    return {
        "format": 2,
        "profile": report.params.profile,
        "title": report.params.report.title,
        "working_folder": report.folder,
        "result": report.result,
        "at_a_glance": [list(fact) for fact in report.overview],
        "cells": list(export.flat(report.tables, report.runs)),
        "findings": [finding.plain for block in report.blocks for finding in block.findings],
        "footnotes": list(report.footnotes),
        "runs": report.runs,
    }
