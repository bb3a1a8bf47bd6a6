"""Writes confirmation.md: what the records of profile claim-2 say to Q1 and Q2, by the rules of PROTOCOL.md's block 2.

    python reports/claim-2/confirm.py            # counts the complete sets, and reads scores only if all ten are complete
    python reports/claim-2/confirm.py --final    # no set is added any more: reads those that are complete

A run of cell `isd` on set 3 is called `isd-unbalanced-3` or `isd-balanced-3`. Scores are those of gate.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
from scipy import optimize, stats

from reports.scores import Run, number, read, table

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "pipelines" / "claim-2" / "params.yaml"
METRIC = "1-NN-dense"
SETS, LEAST_SETS = 10, 6
LEVEL = 0.05  # of both tests together, by Holm's correction
BOUNDS = {"Q1": 1.0, "Q2": 0.5}  # points; contradicted if the interval's upper end is below
NAMES = [f"{cell}-{kind}" for cell in ("isd", "moco") for kind in ("unbalanced", "balanced")]
ASKED = {
    "Q1": "ISD less MoCo v2, unbalanced",
    "Q2": "the same, unbalanced less balanced",
    "loss": "MoCo v2, balanced less unbalanced",
}

# Outcomes without a verdict: encoder, metric, group of classes. All but the last ask validation images and dense queries.
SECONDARY: dict[str, tuple[Literal["student", "teacher"], str, str]] = {
    "20-NN": ("student", "20-NN-dense", "rare"),
    "teacher": ("teacher", METRIC, "rare"),
    "large classes": ("student", METRIC, "large"),
    "all classes": ("student", METRIC, "all"),
    "validation images alone": ("student", "1-NN", "rare"),
}

Verdict = Literal["supported", "contradicted", "undecided", "not testable", "no verdict"]
ByClass = Mapping[str, float]  # percent, or points
Set = Mapping[str, Run]  # a set's runs by cell and kind: `isd-unbalanced`


def complete(runs: Mapping[str, Run], names: Sequence[str]) -> dict[int, Set]:
    """The sets that have all of these runs, by number."""
    found = {at: {name: runs[f"{name}-{at}"] for name in names if f"{name}-{at}" in runs} for at in range(1, SETS + 1)}
    return {at: one for at, one in found.items() if len(one) == len(names)}


# --- the rules --------------------------------------------------------------------------------------------------------


def contrasts(one: Set, group: str = "rare") -> dict[str, dict[str, float]]:
    """The three differences of `ASKED` on each class of a set that is in the group, in points."""
    isd, moco, even_isd, even_moco = (
        getattr(one[name], group) for name in ("isd-unbalanced", "moco-unbalanced", "isd-balanced", "moco-balanced")
    )
    return {
        "Q1": {cls: isd[cls] - moco[cls] for cls in isd},
        "Q2": {cls: (isd[cls] - moco[cls]) - (even_isd[cls] - even_moco[cls]) for cls in isd},
        "loss": {cls: even_moco[cls] - moco[cls] for cls in isd},
    }


def effects(one: Set) -> dict[str, float]:
    """Main effects of loss and networks and their interaction on a set's rare classes, in points (block 3)."""
    isd, soft, hard, moco = (fmean(one[f"{cell}-unbalanced"].rare.values()) for cell in ("isd", "soft", "hard", "moco"))
    return {
        "loss: KL divergence less InfoNCE": (isd + soft - hard - moco) / 2,
        "networks: ISD's less MoCo v2's": (isd + hard - soft - moco) / 2,
        "interaction": (isd - soft) - (hard - moco),
    }


@dataclass(frozen=True)
class Mean:
    """A mean over sets, with Student's 95 % interval and the p of the two-sided t test against 0."""

    value: float
    low: float
    high: float
    p: float


def mean_over_sets(values: Sequence[float]) -> Mean:
    """Of one value a set, at least two."""
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return Mean(fmean(values), float(low), float(high), float(test.pvalue))


def verdicts(means: Mapping[str, Mean], sets: int) -> dict[str, Verdict]:
    """By the interval of each question; support also needs Holm's correction over both."""
    if sets < LEAST_SETS:
        return dict.fromkeys(BOUNDS, "no verdict")
    smaller, larger = sorted(BOUNDS, key=lambda question: means[question].p)
    rejected = {smaller: means[smaller].p <= LEVEL / 2}
    rejected[larger] = rejected[smaller] and means[larger].p <= LEVEL
    said: dict[str, Verdict] = {}
    for question, bound in BOUNDS.items():
        mean = means[question]
        if mean.low > 0:
            said[question] = "supported" if rejected[question] else "undecided"
        else:
            said[question] = "contradicted" if mean.high < bound else "undecided"
    if means["loss"].low <= 0 <= means["loss"].high:
        said["Q2"] = "not testable"
    return said


@dataclass(frozen=True)
class Mixed:
    """A mixed model of the differences by set and class: its mean with standard error, and its standard deviations, in points."""

    mean: float
    error: float
    of_sets: float
    of_classes: float
    residual: float


def mixed_model(by_set: Sequence[ByClass]) -> Mixed:
    """The mean with crossed random effects of set and class, by restricted maximum likelihood (Patterson and Thompson 1971)."""
    y = np.array([value for one in by_set for value in one.values()])
    labels = [(at, cls) for at, one in enumerate(by_set) for cls in one]
    same = [np.equal.outer(column, column).astype(float) for column in map(np.array, zip(*labels, strict=True))]

    def fit(ratios: np.ndarray) -> tuple[float, float, float, float]:
        """The criterion, mean, residual variance and variance of the mean, for variances relative to the residual one."""
        covariance = np.eye(len(y)) + sum(ratio * block for ratio, block in zip(ratios, same, strict=True))
        ones, weighted = np.linalg.solve(covariance, np.stack([np.ones(len(y)), y], 1)).T
        information = ones.sum()
        mean = weighted.sum() / information
        residual = (y - mean) @ (weighted - mean * ones) / (len(y) - 1)
        criterion = np.linalg.slogdet(covariance)[1] + np.log(information) + (len(y) - 1) * np.log(residual)
        return float(criterion), float(mean), float(residual), float(residual / information)

    best = optimize.minimize(lambda ratios: fit(ratios)[0], [0.5, 0.5], method="L-BFGS-B", bounds=[(0, None)] * 2)
    _, mean, residual, variance = fit(best.x)
    deviation = residual**0.5
    return Mixed(mean, variance**0.5, *(float(ratio) ** 0.5 * deviation for ratio in best.x), deviation)


# --- the page ---------------------------------------------------------------------------------------------------------


def render(runs: Mapping[str, Run], others: Mapping[str, Mapping[str, Run]], *, final: bool) -> str:
    """The whole page; no score is read before all sets are complete, unless it is `final`.

    Args:
        runs: scores by run, of student and `METRIC`.
        others: the same of each outcome of `SECONDARY`.
        final: no set is added any more.
    """
    sets = complete(runs, NAMES)
    about = (
        "Written by `confirm.py` from the records; the rules are in [PROTOCOL.md](PROTOCOL.md), block 2. Mean over a set's rare"
        " classes of 1-NN top-1 in percent, student at the last epoch, validation images and dense queries. One training each."
    )
    parts = ["# The claim, second protocol: confirmation", about]
    if len(sets) < (2 if final else SETS):
        return "\n\n".join([*parts, f"Nothing is read: {len(sets)} of {SETS} sets are complete."]) + "\n"
    parts += [*_outcomes(sets), "## Other outcomes, without a verdict", _secondary(others)]
    cells = complete(runs, [f"{cell}-unbalanced" for cell in ("isd", "soft", "hard", "moco")])
    if len(cells) > 1:
        by_set = [effects(one) for one in cells.values()]
        rows = [[name, *interval(mean_over_sets([one[name] for one in by_set]))] for name in by_set[0]]
        parts += [f"## Loss and networks ({len(cells)} sets, no verdict)", table(["effect", "mean", "95 %, low", "high"], rows)]
    return "\n\n".join(parts) + "\n"


def _outcomes(sets: Mapping[int, Set]) -> list[str]:
    found = {at: contrasts(one) for at, one in sets.items()}
    by_set = {asked: [fmean(one[asked].values()) for one in found.values()] for asked in ASKED}
    means = {asked: mean_over_sets(values) for asked, values in by_set.items()}
    said = {**verdicts(means, len(sets)), "loss": ""}
    scores, outcomes, models = [], [], []
    for at, (number_of_set, one) in enumerate(sets.items()):
        levels = [number(fmean(one[name].rare.values())) for name in NAMES]
        scores.append([str(number_of_set), *levels, *(signed(values[at]) for values in by_set.values())])
    for asked, words in ASKED.items():
        outcomes.append([f"{asked}: {words}", *interval(means[asked]), f"{means[asked].p:.3f}", said[asked]])
        model = mixed_model([one[asked] for one in found.values()])
        models.append([asked, signed(model.mean), *map(number, (model.error, model.of_sets, model.of_classes, model.residual))])
    return [
        table(["set", *NAMES, *ASKED], scores),
        f"## Outcomes ({len(sets)} of {SETS} sets)",
        table(["question", "mean", "95 %, low", "high", "p", "verdict"], outcomes),
        table(["mixed model", "mean", "standard error", "s.d. of sets", "of classes", "residual"], models),
    ]


def _secondary(others: Mapping[str, Mapping[str, Run]]) -> str:
    rows = []
    for name, runs in others.items():
        group, sets = SECONDARY[name][2], complete(runs, NAMES).values()
        found = [contrasts(one, group) for one in sets]
        levels = [number(fmean(fmean(getattr(one[run], group).values()) for one in sets)) for run in NAMES]
        means = [interval(mean_over_sets([fmean(one[asked].values()) for one in found])) for asked in ASKED]
        rows.append([name, *levels, *(f"{mean} ({low} to {high})" for mean, low, high in means)])
    return table(["outcome", *NAMES, *ASKED], rows)


def interval(mean: Mean) -> list[str]:
    """Mean and interval in points."""
    return [signed(value) for value in (mean.value, mean.low, mean.high)]


def signed(value: float) -> str:
    """Points with sign and two decimals."""
    return f"{value:+.2f}"


if __name__ == "__main__":
    others = {name: read(PROFILE, metric, encoder) for name, (encoder, metric, _) in SECONDARY.items()}
    page = render(read(PROFILE, METRIC), others, final="--final" in sys.argv[1:])
    (HERE / "confirmation.md").write_text(page, encoding="utf-8")
