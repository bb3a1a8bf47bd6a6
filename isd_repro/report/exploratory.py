"""Runs that were decided after a result: they enter no mean over draws and no verdict, and stand in tables of their own."""

from __future__ import annotations

from dataclasses import replace

from isd_repro.config.params import Params
from isd_repro.report import text
from isd_repro.report.cells import Table
from isd_repro.report.findings import Finding
from isd_repro.report.pivot import compare, contest, families, methods
from isd_repro.report.records import Records
from isd_repro.report.tables import groups_of, head, runs_of, score_cell, subset_tables


def blocks(params: Params, records: Records) -> list[tuple[str, tuple[Table, ...], tuple[Finding, ...]]]:
    """Title, tables and sentences for each subset that has such runs; the tables have all its runs, row by row."""
    found = []
    for subset in dict.fromkeys(params.runs[run].data.subset for run in params.report.exploratory):
        title = "runs decided after the result"
        every = subset_tables(params, records, subset)
        tables = [replace(table, title=f"{table.title}, with {title}", main=False) for table in every]
        said = _against_the_draws(params, records, subset)
        found.append((f"{title.capitalize()}, {subset}", tuple(tables), tuple(said)))
    return found


def _against_the_draws(params: Params, records: Records, subset: str) -> list[Finding]:
    """Each such run less every method of the draws that it can be compared with, on the queries of each group."""
    draws = next((found for found in families(params) if subset in found), [subset])
    subject, others = contest(params, draws)
    metric = f"{params.evaluation.knn.k[0]}-NN"
    rivals = {name: runs[subset] for name, runs in methods(params, draws).items() if name in {subject, *others}}
    found = []
    for run in runs_of(params, subset):
        if run not in params.report.exploratory:
            continue
        for name, seeds in rivals.items():
            parts = []
            for group in groups_of(params, records, subset):
                ours, theirs = (score_cell(records.runs[one], "student", metric, group) for one in (run, seeds[0]))
                if ours.value is not None and theirs.value is not None:
                    paired = compare(records, ours, theirs)
                    parts.append(f"{text.signed(ours.value - theirs.value)} points on {group} queries{paired and f' ({paired})'}")
            if parts:
                lead = f"{params.runs[run].label} against {name} ({head(metric)}, student), exploratory"
                found.append(Finding(lead, f"{text.listing(parts)}."))
    return found
