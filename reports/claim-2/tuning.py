"""Writes what the records of profile claim-2-tuning say by the rules of PROTOCOL.md's block 1.

    python reports/claim-2/tuning.py

tuning.md shows all trials. As soon as the trials that a rule asks for are finished, three files say what follows from it, and
make_profiles.py makes the runs of them: beyond.csv has the trials beyond the box, finalists.csv the trials that are run again,
settings.csv the settings that are chosen. A trial's score is the mean over classes of 1-NN top-1 in percent, student at the last
epoch, validation images and dense queries.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from reports import protocols
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
SETS = (9, 10)  # a finalist is trained on both
DIVERGED: frozenset[str] = frozenset()  # runs that stopped because their loss was not finite; they have no record and count as 0

Settings = Mapping[str, str]
Scores = Mapping[str, float]  # by run


def points() -> dict[int, Settings]:
    """The rows of points.csv by their number; a point is the same trial in every cell."""
    with (HERE / "points.csv").open(newline="", encoding="utf-8") as file:
        return {int(row.pop("point")): row for row in csv.DictReader(file)}


def scores() -> dict[str, float]:
    """The score of every finished run."""
    return {name: fmean(run.all.values()) for name, run in read(PROFILE, METRIC).items()} | dict.fromkeys(DIVERGED, 0.0)


def trial(cell: str, at: int) -> str:
    """The run of a cell's trial: a point, or beyond the box, where numbers go on."""
    return f"{cell}-{at:02d}"


def final(cell: str, at: int, number: int) -> str:
    """The run of a finalist on a set."""
    return f"{cell}-{at:02d}-final-{number}"


# --- the rules --------------------------------------------------------------------------------------------------------


def position(setting: str, value: float) -> float:
    """Where a value lies in its range: 0 at the lower end, 1 at the upper, in logarithms."""
    low, high = RANGES[setting]
    return math.log(value / low) / math.log(high / low)


def best(found: Mapping[int, float], count: int = 1) -> list[int]:
    """The trials with the highest scores, best first; a tie goes to the lower number."""
    return sorted(found, key=lambda at: (-found[at], at))[:count]


def beyond(box: Mapping[int, Settings], tops: Mapping[str, int]) -> dict[str, dict[int, Settings]]:
    """Trials beyond the box of each cell, from its best point: two for each setting that a compared cell has at its edge."""
    found: dict[str, dict[int, Settings]] = {cell: {} for cell in tops}
    for setting in RANGES:
        at = {cell: position(setting, float(box[point][setting])) for cell, point in tops.items()}
        if any(abs(at[cell] - 0.5) > 0.5 - EDGE for cell in COMPARED):
            for cell, point in tops.items():
                value = float(box[point][setting])
                for by in FACTORS:
                    changed = {setting: f"{value * by if at[cell] > 0.5 else value / by:.4g}"}
                    found[cell][len(box) + len(found[cell]) + 1] = {**box[point], **changed}
    return found


@dataclass
class Choice:
    """What the rules give for each cell, as far as its runs are finished.

    Attributes:
        beyond: trials beyond the box; a cell is missing until all points of its pair of cells are finished.
        finalists: the three best trials, best first; a cell is missing until its trials beyond the box are finished, too.
        chosen: the finalist with the highest mean over both sets.
        open: what is waited for.
    """

    beyond: dict[str, dict[int, Settings]] = field(default_factory=dict)
    finalists: dict[str, list[int]] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)


def choose(box: Mapping[int, Settings], found: Scores) -> Choice:
    """Apply the rules to the runs that are finished."""
    choice = Choice()
    tops: dict[str, int] = {}
    for cells in (COMPARED, LATER):
        asked = [trial(cell, at) for cell in cells for at in box]
        if missing := [name for name in asked if name not in found]:
            finished = len(asked) - len(missing)
            choice.open.append(f"Nothing is chosen for {' and '.join(cells)}: {finished} of {len(asked)} trials are finished.")
            break
        tops |= {cell: best({at: found[trial(cell, at)] for at in box})[0] for cell in cells}
        further = beyond(box, tops)
        for cell in cells:
            choice.beyond[cell] = further[cell]
            _choose_in(cell, [*box, *further[cell]], found, choice)
    return choice


def _choose_in(cell: str, trials: Sequence[int], found: Scores, choice: Choice) -> None:
    if missing := [trial(cell, at) for at in trials if trial(cell, at) not in found]:
        choice.open.append(f"{cell} has no finalists yet: {', '.join(missing)} not run.")
        return
    choice.finalists[cell] = best({at: found[trial(cell, at)] for at in trials}, FINALISTS)
    names = {at: [final(cell, at, number) for number in SETS] for at in choice.finalists[cell]}
    if missing := [name for both in names.values() for name in both if name not in found]:
        choice.open.append(f"{cell} has no settings yet: {', '.join(missing)} not run.")
        return
    choice.chosen[cell] = best({at: fmean(found[name] for name in both) for at, both in names.items()})[0]


# --- the files --------------------------------------------------------------------------------------------------------


def files(box: Mapping[int, Settings], found: Scores) -> dict[str, str]:
    """Every file by its name; a file without rows is not written."""
    choice = choose(box, found)
    trials = {cell: {**box, **further} for cell, further in choice.beyond.items()}
    rows = {
        "beyond.csv": [(cell, at) for cell, further in choice.beyond.items() for at in further],
        "finalists.csv": [(cell, at) for cell, three in choice.finalists.items() for at in three],
        "settings.csv": list(choice.chosen.items()),
    }
    tables = {
        name: protocols.table([{"cell": cell, "trial": at, **trials[cell][at]} for cell, at in each])
        for name, each in rows.items()
        if each
    }
    return {"tuning.md": page(box, found, choice), **tables}


def page(box: Mapping[int, Settings], found: Scores, choice: Choice) -> str:
    """tuning.md."""
    shown = {name: number(value) for name, value in found.items()}
    names = list(next(iter(box.values())))
    about = (
        "Written by `tuning.py` from the records; the rules are in [PROTOCOL.md](PROTOCOL.md), block 1. Mean over classes of 1-NN"
        " top-1 in percent, student, validation images and dense queries. One training behind each number: 50 epochs on set 9 for"
        " a trial, 100 for a finalist."
    )
    rows = [[str(at), *(shown.get(trial(cell, at), "not run") for cell in CELLS), *row.values()] for at, row in box.items()]
    parts = ["# The claim, second protocol: trials", about, table(["point", *CELLS, *names], rows)]
    if further := [(cell, at, row) for cell, all_ in choice.beyond.items() for at, row in all_.items()]:
        rows = [[cell, str(at), shown.get(trial(cell, at), "not run"), *row.values()] for cell, at, row in further]
        parts += ["## Beyond the box", table(["cell", "trial", "score", *names], rows)]
    if choice.finalists:
        rows = [
            [
                cell,
                str(at),
                *(shown.get(final(cell, at, of), "not run") for of in SETS),
                "yes" if choice.chosen.get(cell) == at else "",
            ]
            for cell, three in choice.finalists.items()
            for at in three
        ]
        parts += ["## Finalists", table(["cell", "trial", "set 9", "set 10", "chosen"], rows)]
    return "\n\n".join([*parts, *choice.open]) + "\n"


if __name__ == "__main__":
    for name, text in files(points(), scores()).items():
        (HERE / name).write_text(text, encoding="utf-8")
