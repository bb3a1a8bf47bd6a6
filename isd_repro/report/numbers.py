"""The numbers of a report: which cells count as numbers, and how far each can be checked from records only.

The page states how many there are, and `verify` gives a verdict for each; both use this module to count them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from isd_repro.evaluations import kind_of
from isd_repro.report.problems import Key
from isd_repro.report.run_records import RECOMPUTED, RECORDED, Records, RunRecords


def runs_of(cell: Mapping[str, Any]) -> tuple[str, ...]:
    """The runs (or the evaluated checkpoint) behind a flat cell with a number of ours; empty for other cells."""
    if cell["value"] is None or cell["kind"] in ("paper", "computed"):
        return ()
    return (cell["row"],) if cell["kind"] == "external" else tuple(dict.fromkeys(cell["runs"]))


def found_of(cell: Mapping[str, Any], records: Records) -> list[RunRecords]:
    """The existing records behind such a cell."""
    if cell["kind"] == "external":
        return [one.found for one in records.externals if one.label == cell["row"]]
    return [records.runs[run] for run in runs_of(cell) if run in records.runs]


def scores_of(found: RunRecords, key: Key) -> Iterator[tuple[str, str]]:
    """Level and metric of the scores behind a number: one, or one for each data set if the number is their mean."""
    encoder, metric, group = key
    if (own := found.evaluation(metric)) is not None:
        if key in own.levels:
            yield own.levels[key], metric
        return
    for kind, targets in found.targets.items():
        for name, one in targets.sets.items() if kind == kind_of(metric) else ():
            for (other, base, of), level in one.levels.items():
                if (other, of) == (encoder, group) and metric in (base, f"{base}-{name}"):
                    yield level, f"{base}-{name}"


def is_early_snapshot(cell: Mapping[str, Any], found: RunRecords) -> bool:
    """Whether a cell is the score of a snapshot other than the last one, which is the run's encoder."""
    return cell["kind"] == "snapshot" and any(int(cell["column"]) != one.points[-1].epoch for one in found.curves.values())


def level_of(cell: Mapping[str, Any], found: RunRecords) -> str:
    """How far the records of one run confirm the scores behind a cell; "" if there are no scores."""
    if is_early_snapshot(cell, found):
        return RECORDED
    levels = [level for level, _ in scores_of(found, (cell["encoder"], cell["metric"], cell["group"]))]
    return (RECORDED if RECORDED in levels else RECOMPUTED) if levels else ""


def tally(cells: Iterable[Mapping[str, Any]], records: Records) -> tuple[int, int]:
    """The number of cells recomputed from stored predictions, and the number of cells that are recorded only."""
    counts = {RECOMPUTED: 0, RECORDED: 0}
    for cell in cells:
        levels = {level_of(cell, found) for found in found_of(cell, records)} - {""}
        if runs_of(cell) and levels:
            counts[RECORDED if RECORDED in levels else RECOMPUTED] += 1
    return counts[RECOMPUTED], counts[RECORDED]
