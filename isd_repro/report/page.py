"""Renders a profile's report: Markdown, LaTeX, one HTML page, JSON, CSV and SVG. Equal records give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.report import (
    costs,
    export,
    figures,
    hypothesis,
    learning_curves,
    numbers,
    overview,
    paper_comparison,
    run_details,
    text,
    trials,
)
from isd_repro.report import paper as papers
from isd_repro.report import tables as ours
from isd_repro.report.cells import Statement, Table
from isd_repro.report.figures import Figure
from isd_repro.report.repetitions import families, imbalances, rivals
from isd_repro.report.run_records import Records
from isd_repro.report.stamp import stamped
from isd_repro.report.templating import data_uri, environment, template_text
from isd_repro.runtime.files import sha256_file

DEVIATIONS = "../../../DEVIATIONS.md"  # from reports/<profile>/tables/


@dataclass(frozen=True)
class Block:
    """One section of the page: its tables, statements about them, and charts."""

    title: str
    tables: tuple[Table, ...] = ()
    findings: tuple[Statement, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Report:
    """The content of a profile's report, independent of format."""

    params: Params
    records: Records
    folder: str  # where commands are run, relative to the repository
    result: str  # one sentence; empty where nothing has been scored
    overview: tuple[tuple[str, str], ...]  # what a reader wants to know in a minute
    blocks: tuple[Block, ...]
    footnotes: tuple[str, ...]
    runs: dict[str, dict[str, Any]]
    sources: tuple[tuple[str, str], ...]  # of published numbers
    tally: tuple[int, int]  # numbers that were recomputed, and that are recorded only

    @property
    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [table for block in self.blocks for table in block.tables]

    @property
    def figures(self) -> list[Figure]:
        """All charts, in order."""
        return [figure for block in self.blocks for figure in block.figures]


def assemble(params: Params, records: Records, layout: Layout) -> Report:
    """Compute every table, sentence and figure of a profile from its verified records.

    Raises:
        ConfigError: `report.paper` names a table or row that does not exist.
    """
    blocks = [*_paper(params, records), *_hypothesis(params, records)]
    tried = params.report.trials  # trials are compared with nothing, and there are too many for charts
    for subsets in families(params):
        if len(subsets) > 1:
            name = f"{subsets[0]} to {subsets[-1]}"
            tables = [*ours.draw_tables(params, records, subsets), *hypothesis.family_tables(params, records, subsets)]
        else:
            name = subsets[0]
            tables = [*ours.subset_tables(params, records, name)]
            if not tried and (differences := ours.difference_table(params, records, name)):
                tables.append(differences)
        chart = None if tried else figures.scores(params, records, subsets)
        blocks.append(Block(name, tuple(tables), figures=(chart,) if chart else ()))
        if not tried:
            pair = rivals(params, subsets)
            gains = figures.class_gains(params, records, subsets, *pair) if pair else None
            answers = figures.confusions(params, records, subsets, *pair) if pair else None
            blocks += _charts("By class", gains, figures.class_accuracy(params, records, subsets), answers)
    for series in imbalances(params):
        blocks += _charts("Accuracy against imbalance", figures.by_imbalance(params, records, series))
    if tried:
        blocks.append(Block("Trials", tuple(trials.trial_tables(params, records, tried))))
    blocks += [Block(title, tuple(tables)) for title, tables in ours.exploratory_tables(params, records)]
    blocks += [Block(table.title, (table,)) for table in ours.own_tables(params, records)]
    every = [table for block in blocks for table in block.tables]
    blocks += [*_trajectories(params, records), *_charts("Training loss", figures.losses(params, records))]
    runs = {name: run_details.run_facts(params, found) for name, found in records.runs.items()}
    tally = numbers.tally(export.flat([table for block in blocks for table in block.tables], runs), records)
    return Report(
        params=params,
        records=records,
        folder=run_details.working_folder(layout),
        result=overview.result(params, records),
        overview=tuple(overview.facts(params, records, every, tally)),
        blocks=tuple(blocks),
        footnotes=tuple(overview.footnotes(params, records, tally[1])),
        runs=runs,
        tally=tally,
        sources=_sources(params),
    )


def _charts(title: str, *drawn: Figure | None) -> list[Block]:
    """A section of the charts that there are; none if there are none."""
    found = tuple(filter(None, drawn))
    return [Block(title, figures=found)] if found else []


def _hypothesis(params: Params, records: Records) -> Iterator[Block]:
    """The section with the profile's stated comparison over its draws."""
    if wanted := params.report.hypothesis:
        groups = ("rare", "all", "large") if wanted.group == "rare" else (wanted.group,)
        keys = [(wanted.encoder, f"{wanted.k}-NN", group) for group in groups]
        pairs = [done for key in keys if (done := hypothesis.compared(params, records, wanted, key))]
        drawn = figures.differences(pairs, wanted.first, wanted.second, wanted.contradicted_below) if pairs else None
        table, said = hypothesis.hypothesis_table(params, records, wanted), hypothesis.finding(params, records, wanted)
        yield Block("The hypothesis", (table,) if table else (), (said,), (drawn,) if drawn else ())


def _trajectories(params: Params, records: Records) -> Iterator[Block]:
    """One section for each subset with snapshots, or with runs that are compared with the paper's figure."""
    kept = learning_curves.of_runs(records)
    for subset in params.subsets:
        paper = learning_curves.references(params, records, subset)
        figure = figures.trajectories(params, kept, subset, paper)
        table = learning_curves.curve_table(params, records, kept, subset, paper)
        if figure and table:
            yield Block(table.title, (table,), figures=(figure,))


def _paper(params: Params, records: Records) -> Iterator[Block]:
    """One section for each table of the paper that runs are compared with."""
    for wanted in params.report.paper:
        paper = papers.load()
        table = paper_comparison.resolve(params, paper, wanted)
        if not table.curve:  # drawn with our own curve
            tables = paper_comparison.comparison_tables(params, records, paper, table, wanted)
            yield Block(table.title, tuple(tables), tuple(paper_comparison.findings(paper, table)))


def _sources(params: Params) -> tuple[tuple[str, str], ...]:
    """The sources of the published numbers on the page: (table, source)."""
    if not params.report.paper:
        return ()
    paper = papers.load()
    said = [("Published numbers and tolerances", f"paper.yaml of this package, sha256 {sha256_file(papers.FILE)}")]
    for table in (paper.table(wanted.table) for wanted in params.report.paper):
        source = paper.sources[table.source]
        read = f"{table.version}; read from {source.title}: {source.where}; confidence {table.confidence}"
        said.append((table.title, read))
    return tuple(said)


def render(report: Report) -> dict[str, bytes]:
    """Every file of the report by name.

    Raises:
        UserError: jinja2 or matplotlib is not installed.
    """
    drawn = {figure.name: figure.svg() for figure in report.figures}
    spent = costs.of_profile(report.params, report.records)
    known = {
        "report": report,
        "params": report.params,
        "deviations": DEVIATIONS,
        "seconds": math.fsum(cost.seconds for cost in spent),
        "spent": costs.table(spent),
        "style": template_text("style.css"),
        "script": template_text("script.js"),
        "facts": run_details,
        "flatten": text.flatten,
        "picture": lambda figure: data_uri(drawn[figure.name]),
    }
    templates = {"table.md": "markdown", "table.tex": "latex", "index.html": "html"}
    files = {name: environment(kind).get_template(f"{name}.jinja").render(known) for name, kind in templates.items()}
    files |= {f"{name}.svg": content for name, content in drawn.items()}
    tree = cells(report)
    files |= {export.CELLS: export.as_json(tree), "cells.csv": export.as_csv(tree["cells"])}
    encoded = {name: content.encode("utf-8") for name, content in sorted(files.items())}
    return stamped(report.params, report.records, encoded)


def cells(report: Report) -> dict[str, Any]:
    """The content of `cells.json`."""
    return {
        "format": export.FORMAT,
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
