"""Writes tuning.md: every trial of profile claim-2-tuning, and what the rules of PROTOCOL.md's block 1 choose when all are there.

    python reports/claim-2/tuning.py

A trial's score is the mean over classes of 1-NN top-1 in percent, student at the last epoch, validation images and dense queries.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from reports.scores import number, read, table

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "pipelines" / "claim-2-tuning" / "params.yaml"
METRIC = "1-NN-dense"
COMPARED, LATER = ("isd", "moco"), ("soft", "hard")  # the cells of Q1 and Q2 are tuned first
CELLS = COMPARED + LATER
RANGES = {"lr_at_tau_0.1": (0.015, 0.12), "tau_student": (0.05, 0.2)}  # log-uniform; the settings that may be left beyond
EDGE = 0.1  # share of a range, in logarithms
FACTORS = (1.5, 2.0)
FINALISTS = 3
DIVERGED: frozenset[str] = frozenset()  # runs that stopped because their loss was not finite; they have no record and count as 0

Points = Mapping[int, Mapping[str, str]]  # settings by point
Trials = Mapping[str, Mapping[int, float]]  # scores by cell and point


def points() -> Points:
    """The rows of points.csv."""
    with (HERE / "points.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["point"]): row for row in csv.DictReader(file)}


def trials() -> Trials:
    """The scores of all finished trials."""
    scores = {name: fmean(run.all.values()) for name, run in read(PROFILE, METRIC).items()} | dict.fromkeys(DIVERGED, 0.0)
    return {cell: {at: scores[f"{cell}-{at:02d}"] for at in points() if f"{cell}-{at:02d}" in scores} for cell in CELLS}


# --- the rules --------------------------------------------------------------------------------------------------------


def finalists(scores: Mapping[int, float]) -> list[int]:
    """The points of a cell with the highest scores, best first; a tie goes to the lower number."""
    return sorted(scores, key=lambda at: (-scores[at], at))[:FINALISTS]


def position(setting: str, value: float) -> float:
    """Where a value lies in its range: 0 at the lower end, 1 at the upper, in logarithms."""
    low, high = RANGES[setting]
    return math.log(value / low) / math.log(high / low)


class Beyond(NamedTuple):
    """A trial that is made if a compared cell's best point lies at the edge of a range."""

    cell: str
    point: int
    setting: str
    value: float


def beyond(settings: Points, best: Mapping[str, int]) -> list[Beyond]:
    """The trials beyond the box, from the best point of each cell: for each setting none, or two in every cell."""
    found = []
    for setting in RANGES:
        at = {cell: position(setting, float(settings[point][setting])) for cell, point in best.items()}
        if any(abs(at[cell] - 0.5) > 0.5 - EDGE for cell in COMPARED):
            for cell, point in best.items():
                value = float(settings[point][setting])
                found += [Beyond(cell, point, setting, value * by if at[cell] > 0.5 else value / by) for by in FACTORS]
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def render(settings: Points, scores: Trials) -> str:
    """The whole page; nothing is chosen for a pair of cells until all its trials are there."""
    names = [name for name in next(iter(settings.values())) if name != "point"]
    rows = [
        [str(at), *(number(scores[cell].get(at)) or "not run" for cell in CELLS), *(row[name] for name in names)]
        for at, row in settings.items()
    ]
    about = (
        "Written by `tuning.py` from the records; the rules are in [PROTOCOL.md](PROTOCOL.md), block 1. Mean over classes of 1-NN"
        " top-1 in percent, student after 50 epochs on set 9, validation images and dense queries. One training each."
    )
    parts = ["# The claim, second protocol: trials", about, table(["point", *CELLS, *names], rows)]
    chosen: dict[str, list[int]] = {}
    for cells in (COMPARED, LATER):
        finished, asked = sum(len(scores[cell]) for cell in cells), len(settings) * len(cells)
        if finished < asked:
            parts.append(f"Nothing is chosen for {' and '.join(cells)}: {finished} of {asked} trials are finished.")
            break
        chosen |= {cell: finalists(scores[cell]) for cell in cells}
    if chosen:
        rows = [[cell, *map(str, points)] for cell, points in chosen.items()]
        parts += ["## Finalists", table(["cell", "first", "second", "third"], rows)]
        parts += ["## Beyond the box", _beyond(beyond(settings, {cell: points[0] for cell, points in chosen.items()}))]
    return "\n\n".join(parts) + "\n"


def _beyond(found: Sequence[Beyond]) -> str:
    if not found:
        return "Neither isd nor moco has its best point in the outer tenth of the range of learning rate or of tau_student."
    rows = [[one.cell, str(one.point), one.setting, f"{one.value:.4g}"] for one in found]
    return table(["cell", "point", "setting", "value"], rows)


if __name__ == "__main__":
    (HERE / "tuning.md").write_text(render(points(), trials()), encoding="utf-8")
