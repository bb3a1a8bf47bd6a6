"""Draws softness.svg: 1-NN accuracy of rare and of large classes against the softness of the target.

Usage: python reports/neighbours/softness.py

Each dot is a seed, each line the mean over seeds. SCE's dial is the weight of the hard target, `lam`; ISD's is the temperature of
the teacher over that of the student: the higher, the softer the target. Scores are those of metrics.json, which `isd-repro
report` writes from the records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from isd_repro.config import reader
from isd_repro.config.params import Run
from isd_repro.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "pipelines" / "neighbours" / "params.yaml"
DIALS: dict[str, tuple[str, Callable[[Run], float]]] = {  # prefix of the runs: title of the panel, and the value of a run
    "sce": ("SCE: weight of the hard target", lambda run: run.method.lam),
    "isd": ("ISD: temperature of the teacher over the student's", lambda run: run.method.tau_teacher / run.method.tau_student),
}
GROUPS = {"rare": "#d06a2a", "large": "#2f7fc1"}
METRIC = "student/1-NN"
Metrics = Mapping[str, Mapping[str, float]]


def points(runs: Mapping[str, Run], metrics: Metrics, prefix: str, group: str) -> dict[float, list[float]]:
    """The accuracies of all seeds in percent, by the value of the dial."""
    found: dict[float, list[float]] = {}
    for name, run in runs.items():
        if name.partition("-")[0] == prefix and name in metrics:
            found.setdefault(round(DIALS[prefix][1](run), 3), []).append(metrics[name][f"{METRIC}/{group}"])
    return dict(sorted(found.items()))


def draw(runs: Mapping[str, Run], metrics: Metrics) -> Figure:
    """A panel for each dial, a line for each group of classes."""
    figure, axes = figures.canvas(len(DIALS), 300, left=44, gap=44)
    for ax, (prefix, (title, _)) in zip(axes, DIALS.items(), strict=True):
        for group, colour in GROUPS.items():
            found = points(runs, metrics, prefix, group)
            ax.plot(list(found), [fmean(values) for values in found.values()], color=colour, label=f"{group} classes")
            for at, values in found.items():
                ax.scatter([at] * len(values), values, s=12, color=colour, alpha=0.55, lw=0)
        ax.set_title(title)
        ax.set_ylabel("1-NN accuracy, percent")
        ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    runs = reader.load(PROFILE)[0].runs
    metrics = json.loads((HERE / "metrics.json").read_text("utf-8"))
    title = "1-NN accuracy of rare and large classes by softness of the target"
    (HERE / "softness.svg").write_text(figures.svg(lambda: draw(runs, metrics), title), encoding="utf-8")
