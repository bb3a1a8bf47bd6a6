"""The cells of our numbers: a run's score, the mean over repetitions, the difference of two methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

from isd_repro.records import Score, balancedness
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Kind
from isd_repro.report.run_records import RECORDED, Key, Records, RunRecords


def score_cell(found: RunRecords, encoder: str, metric: str, group: str) -> Cell:
    """The cell with one number, or with the reason why there is none."""
    cell = Cell("none", (found.run,), encoder, metric, group)
    evaluation = found.evaluation(metric)
    known = found.own.values()
    encoders = {*(found.pretrain.encoders if found.pretrain else ()), *(key[0] for part in known for key in part.scores)}
    if encoders and encoder not in encoders:
        return replace(cell, detail=f"this method has no {encoder}")
    if evaluation is None:
        return replace(cell, kind="not run", detail=f"no {cell.part} record")
    if group not in evaluation.masks:
        return replace(cell, detail=f"the subset has no {group} queries")
    score = evaluation.scores.get((encoder, metric, group))
    if score is None:
        return replace(cell, kind="not run", detail=f"the {cell.part} record has no such score")
    return scored(cell, score, evaluation.levels[encoder, metric, group])


def scored(cell: Cell, score: Score, level: str, kind: Kind = "score") -> Cell:
    """The cell with a score and its Wilson interval; `level` states how far the score was verified."""
    low, high = score.interval
    return replace(cell, kind=kind, value=score.top1, correct=score.correct, n=score.n, low=low, high=high, level=level)


def balancedness_cell(found: RunRecords, encoder: str, metric: str) -> Cell:
    """The cell with one run's balancedness, which needs the prediction of every query, or with the reason why there is none."""
    score = score_cell(found, encoder, metric, "all")
    evaluation = found.evaluation(metric)
    if score.kind != "score" or evaluation is None:
        return score
    predicted = evaluation.predictions.get(f"{encoder}/{metric}")
    if predicted is None:
        return replace(Cell("none", score.runs, encoder, metric, "all"), detail="the record has no predictions")
    return Cell("statistic", score.runs, encoder, metric, "all", balancedness(predicted, evaluation.label), level=score.level)


def mark_best(cells: Sequence[Cell]) -> list[Cell]:
    """Mark the largest of the checked values, including ties; a single value is not marked."""
    values = [cell.value for cell in cells if cell.value is not None and cell.level != RECORDED]
    if len(values) < 2:
        return list(cells)
    return [replace(cell, best=cell.value == max(values) and cell.level != RECORDED) for cell in cells]


def with_n(head: str, cells: Sequence[Cell]) -> str:
    """A heading with the number of queries, if it is known and the same for all of our numbers."""
    sizes = {cell.n for cell in cells if cell.n is not None}
    return f"{head} (n = {text.count(*sizes)})" if len(sizes) == 1 else head


def mean_cell(cells: Sequence[Cell], what: str) -> Cell:
    """The mean of several cells of one kind with its standard deviation; cells without a number are left out and mentioned.

    Args:
        cells: one or more cells of the same encoder, metric and group; a single one is returned as it is.
        what: the repetitions in the plural, `seeds` or `draws`.
    """
    like, runs = cells[0], tuple(run for cell in cells for run in cell.runs)
    values = [cell.value for cell in cells if cell.value is not None]
    if len(cells) == 1 or not values:
        return replace(like, runs=runs)
    differences = all(cell.kind == "difference" for cell in cells if cell.value is not None)
    kind: Kind = "difference" if differences else "mean"
    runs = tuple(run for cell in cells if cell.value is not None for run in cell.runs)
    missing = f"; {len(cells) - len(values)} more not run" if len(values) < len(cells) else ""
    detail = f"mean of {len(values)} {what}{missing}"
    level = RECORDED if any(cell.level == RECORDED for cell in cells) else ""
    found = Cell(kind, runs, like.encoder, like.metric, like.group, fmean(values), detail=detail, level=level, count=len(values))
    if len(values) < 2:
        return found
    found = replace(found, deviation=stdev(values))
    if not differences:
        return found
    paired = intervals.paired(values)
    return replace(found, low=paired.low, high=paired.high, detail=f"{detail}; {paired.words}")


def method_cell(records: Records, runs: Sequence[str], key: Key) -> Cell:
    """A method's number on one subset: a run's score, or the mean over its seeds."""
    cells = [score_cell(records.runs[run], *key) for run in runs]
    return mean_cell(cells, "seeds") if cells else Cell("none", (), *key, detail="no such run")


def difference_cell(records: Records, first: Cell, second: Cell) -> Cell:
    """The difference between two methods' numbers in points, computed before rounding."""
    cell = Cell("difference", (*first.runs, *second.runs), first.encoder, first.metric, first.group)
    if first.value is None or second.value is None:
        kinds = {first.kind, second.kind}
        return replace(cell, kind="not run" if "not run" in kinds else "none", detail="needs both runs")
    sides = [text.listing(list(side.runs)) for side in (first, second)]
    detail = f"{sides[0]} {text.MINUS} {sides[1]},{' means over seeds,' if len(cell.runs) > 2 else ''} before rounding"
    if len(first.runs) < 2 and len(second.runs) < 2:
        found = [(side, records.runs[side.runs[0]].evaluation(side.metric)) for side in (first, second)]
        ours, theirs = (one.hits(side.encoder, side.metric, side.group) if one else None for side, one in found)
        if ours is not None and theirs is not None and len(ours) == len(theirs):
            only = [text.count(int(hits.sum())) for hits in (ours & ~theirs, theirs & ~ours)]
            detail += "; one training of each, so their variation is unknown; queries only the first classifies correctly:"
            detail += f" {only[0]}, only the second: {only[1]}"
    return replace(cell, value=first.value - second.value, detail=detail)
