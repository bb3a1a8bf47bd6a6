"""Teacher and student over training: scores by epoch, compared with the paper's figure.

Records of curves contain scores without predictions, so their numbers are "recorded only", except for the last point, which is
the run's exported encoder and must agree with the run's other records. The paper's curves are shown only with runs of its
protocol: `report.paper` names the runs, each with one of the two rows of its method, and both encoders are shown. The paper's
values were read off a figure, so there are no differences and no verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from isd_repro.config.fields import GROUPS
from isd_repro.config.params import Params
from isd_repro.records import CurveRecord, Score
from isd_repro.report import paper as papers
from isd_repro.report import paper_comparison
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.run_records import RECORDED, Records
from isd_repro.report.scores import scored
from isd_repro.report.tables import ENCODERS, first_metric

_NOTE = (
    "Encoders saved during training, n = {n} queries (rare and large are subsets of these). Their predictions are not stored, so"
    " these numbers are recorded only (\N{DAGGER}); a run's last epoch is its exported encoder, whose scores are recomputed. One"
    " run each; 95 % intervals (Wilson) are \N{PLUS-MINUS SIGN} {low:.1f} to {high:.1f} points."
)


@dataclass(frozen=True)
class Reference:
    """A curve of the paper: the run of ours that it is shown with, the row's name, and the paper's cell for each epoch."""

    run: str
    encoder: str
    label: str
    points: dict[int, Cell]


def of_runs(records: Records) -> dict[str, CurveRecord]:
    """The records of scores over training, by run."""
    return {name: next(iter(run.curves.values())) for name, run in records.runs.items() if run.curves}


def names_of(params: Params, found: Mapping[str, CurveRecord], subset: str, paper: Sequence[Reference]) -> list[str]:
    """Runs of a subset that have snapshots or are compared with the paper, in the order of the parameters."""
    beside = {one.run for one in paper}
    return [name for name, run in params.runs.items() if run.data.subset == subset and (name in found or name in beside)]


def by_epoch(record: CurveRecord, metric: str, group: str) -> dict[str, list[tuple[int, Score]]]:
    """(epoch, score) by encoder; encoders without such a score are left out."""
    found: dict[str, list[tuple[int, Score]]] = {encoder: [] for encoder in ENCODERS}
    for point in record.points:
        for score in point.scores:
            if (score.metric, score.group) == (metric, group):
                found[score.encoder].append((point.epoch, score))
    return {encoder: points for encoder, points in found.items() if points}


def references(params: Params, records: Records, subset: str) -> list[Reference]:
    """The paper's curves with which runs of a subset are compared; curves of other protocols are left out.

    Raises:
        ConfigError: `report.paper` names a table or row that does not exist, or runs on other images than the paper's.
    """
    found = []
    for wanted in params.report.paper:
        paper = papers.load()
        if not paper.table(wanted.table).curve:
            continue
        table = paper_comparison.resolve(params, paper, wanted)
        for run, named in wanted.rows.items():
            about = table.rows[named]
            if params.runs[run].data.subset != subset or paper_comparison.obstacle(params, records, run, about):
                continue
            for key, row in table.rows.items():
                if (row.method, row.arch) == (about.method, about.arch):
                    cells = {
                        column.epoch or 0: paper_comparison.paper_cell(paper, table, key, name)
                        for name, column in table.columns.items()
                    }
                    points = {epoch: cell for epoch, cell in cells.items() if cell.value is not None}
                    found.append(Reference(run, row.encoder, f"{row.method}, ResNet-{(row.arch or '')[6:]}", points))
    return found


def curve_table(
    params: Params, records: Records, found: Mapping[str, CurveRecord], subset: str, paper: Sequence[Reference]
) -> Table | None:
    """First nearest-neighbour score of every run of a subset by epoch, grouped by run, with the paper's rows below ours."""
    metric = first_metric(params)
    names = names_of(params, found, subset, paper)
    ours = {point.epoch for name in names if name in found for point in found[name].points}
    epochs = sorted(ours.union(*(one.points for one in paper)))
    rows = []
    for name in names:
        label = params.runs[name].label
        for encoder in ENCODERS:
            for group in GROUPS if name in found else ("all",):
                points = dict(by_epoch(found[name], metric, group).get(encoder, [])) if name in found else {}
                if points or name not in found:
                    cells = tuple(_cell(records, name, (encoder, metric, group), points, epoch) for epoch in epochs)
                    rows.append(Row(f"{label}, {encoder}, {group}", cells, name))
            for one in paper:
                if (one.run, one.encoder) == (name, encoder):
                    cells = tuple(one.points.get(epoch, Cell("none", (), encoder, metric, "all")) for epoch in epochs)
                    rows.append(Row(f"The paper's {one.label}, {encoder}", cells))
    if not rows:
        return None
    sizes = {score.n for name in names if name in found for point in found[name].points for score in point.scores}
    halves = [(cell.high - cell.low) / 2 for row in rows for cell in row.cells if cell.low is not None and cell.high is not None]
    notes = [_NOTE.format(n=f"{max(sizes):,}", low=min(halves), high=max(halves))] if halves else []
    notes += ["The paper's figure was digitised to about 0.15 points; there is no verdict."] if paper else []
    title = f"Teacher and student over training: {subset}, {metric}"
    columns = tuple(Column("Epoch", str(epoch)) for epoch in epochs)
    return Table(f"trajectory-{subset}", title, "Run, encoder, queries", columns, tuple(rows), notes=tuple(notes), sortable=False)


def _cell(records: Records, run: str, key: tuple[str, str, str], points: Mapping[int, Score], epoch: int) -> Cell:
    score = points.get(epoch)
    cell = Cell("none" if points else "not run", (run,), *key, detail="no snapshot at this epoch")
    if score is None:
        return cell
    own = records.runs[run].evaluation(key[1])
    level = own.levels.get(key, RECORDED) if own and epoch == max(points) else RECORDED
    return scored(replace(cell, detail=""), score, level, "snapshot")
