"""Writes gate.md: what the records of profile claim-2-gate say to the four questions of PROTOCOL.md's block 0.

    python reports/claim-2/gate.py

Scores are those of the student at the last epoch, 1-NN over the validation images and the dense queries, in percent: for a
class, the share of its queries that are answered correctly; for a group of classes, the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from scipy import stats

from reports.scores import Run, Runs, number, read, table

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "pipelines" / "claim-2-gate" / "params.yaml"
METRIC = "1-NN-dense"
TWINS = ("moco-unbalanced-9", "isd-unbalanced-9", "moco-balanced-10")  # each has a twin in float32
# The other two questions compare runs in float32 alone: balanced with unbalanced, two seeds of each set.
PAIRS = {number: [f"{number}{seed}-float32" for seed in ("", "-again")] for number in (9, 10)}
BANKS = ("moco-unbalanced-9", "isd-unbalanced-9")  # each has a float32 twin with a large bank
LEAST_STD, LEAST_MEAN = 0.9, -1.5  # of bf16: share of the twin's embedding std, and points on average
LEAST_POSITIVE = 3  # of the four differences of runs
LEAST_KEPT = 0.75  # of what training adds to the untrained network, with the strided stem
NO_RUN = "not run"


# --- the rules --------------------------------------------------------------------------------------------------------


def precision(pairs: Sequence[tuple[Run, Run]]) -> str:
    """The precision of all later runs, from each bf16 run and its twin in float32."""
    kept = all((one.embedding_std or 0.0) >= LEAST_STD * (twin.embedding_std or 0.0) for one, twin in pairs)
    mean = fmean(fmean(one.all.values()) - fmean(twin.all.values()) for one, twin in pairs)
    return "bf16" if kept and mean > LEAST_MEAN else "float32"


@dataclass(frozen=True)
class Imbalance:
    """Balanced less unbalanced on rare classes, in points.

    Attributes:
        differences: of each pair of runs, mean over its rare classes.
        classes: how many (set, class) there are.
        mean: over these, the seeds of each averaged.
        low, high: Student's 95 % interval of that mean.
    """

    differences: tuple[float, ...]
    classes: int
    mean: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """Whether the imbalance matters enough to go on."""
        return self.low > 0 and sum(value > 0 for value in self.differences) >= LEAST_POSITIVE


def imbalance(sets: Sequence[Sequence[tuple[Run, Run]]]) -> Imbalance:
    """Of each set the (balanced, unbalanced) pairs of its seeds."""
    by_pair = [[{name: one.rare[name] - other.rare[name] for name in one.rare} for one, other in pairs] for pairs in sets]
    values = [fmean(pair[name] for pair in pairs) for pairs in by_pair for name in pairs[0]]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    differences = tuple(fmean(pair.values()) for pairs in by_pair for pair in pairs)
    return Imbalance(differences, len(values), fmean(values), float(low), float(high))


def kept(strided: Run, strided_start: Run, plain: Run, plain_start: Run) -> float:
    """The share of what training adds to the untrained network, all classes, that the strided stem keeps."""
    gain, other = (
        fmean(run.all.values()) - fmean(start.all.values()) for run, start in ((strided, strided_start), (plain, plain_start))
    )
    return gain / other


def strided_is_taken(shares: Sequence[float], balanced: Run, unbalanced: Run) -> bool:
    """Whether the strided stem is used: every share is large enough, and the imbalance costs rare classes something."""
    return min(shares) >= LEAST_KEPT and fmean(balanced.rare.values()) > fmean(unbalanced.rare.values())


# --- the page ---------------------------------------------------------------------------------------------------------


def render(runs: Runs) -> str:
    """The whole page; a question whose runs are not all there stays open."""
    scores = [
        [name, *(number(fmean(group.values())) for group in (run.all, run.rare, run.large)), number(run.embedding_std)]
        for name, run in runs.items()
    ]
    about = (
        "Written by `gate.py` from the records; the rules are in [PROTOCOL.md](PROTOCOL.md), block 0. Mean over classes of 1-NN"
        " top-1 in percent, student at the last epoch, validation images and dense queries. One training behind each number."
    )
    parts = [
        "# The claim, second protocol: the gate",
        about,
        table(["run", "all classes", "rare", "large", "embedding std"], scores),
        *("## Precision", *_precision(runs)),
        *("## Imbalance", *_imbalance(runs)),
        *("## Bank", *_bank(runs)),
        *("## Stem", *_stem(runs)),
    ]
    return "\n\n".join(parts) + "\n"


def _precision(runs: Runs) -> list[str]:
    twins = [(name, f"{name}-float32") for name in TWINS]
    rows = [[one, *compared(runs, one, other, "all")] for one, other in twins]
    pairs = [(runs[one], runs[other]) for one, other in twins if one in runs and other in runs]
    said = f"Not decided: {len(pairs)} of {len(twins)} pairs are complete."
    if len(pairs) == len(twins):
        said = f"By the rule: {precision(pairs)}. Later runs use float32 all the same (PROTOCOL.md, additions)."
    return [table(["run, all classes", "bf16", "float32", "difference"], rows), said]


def _imbalance(runs: Runs) -> list[str]:
    names = [[(f"moco-balanced-{key}", f"moco-unbalanced-{key}") for key in keys] for keys in PAIRS.values()]
    flat = [pair for pairs in names for pair in pairs]
    labels = [key.removesuffix("-float32") for keys in PAIRS.values() for key in keys]
    rows = [[label, *compared(runs, *pair, "rare")] for label, pair in zip(labels, flat, strict=True)]
    shown = table(["rare classes, MoCo v2, set and seed", "balanced", "unbalanced", "difference"], rows)
    complete = sum(one in runs and other in runs for one, other in flat)
    if complete < len(flat):
        return [shown, f"Not decided: {complete} of {len(flat)} pairs are complete."]
    found = imbalance([[(runs[one], runs[other]) for one, other in pairs] for pairs in names])
    said = (
        f"Mean over {found.classes} classes {found.mean:+.2f} points, 95 % t interval {found.low:+.2f} to {found.high:+.2f};"
        f" {sum(value > 0 for value in found.differences)} of {len(flat)} differences of runs are positive."
        f" Decided: the gate is {'passed' if found.passed else 'not passed'}."
    )
    return [shown, said]


def _bank(runs: Runs) -> list[str]:
    twins = [(name, group) for name in BANKS for group in ("all", "rare")]
    rows = [[f"{name}, {group}", *compared(runs, f"{name}-bank-float32", f"{name}-float32", group)] for name, group in twins]
    return [table(["run and classes", "K/N = 9.6", "K/N = 0.3", "difference"], rows), "A first look, which decides nothing."]


def _stem(runs: Runs) -> list[str]:
    names = ("moco-unbalanced-9", "isd-unbalanced-9", "moco-balanced-9")
    rows = [[name, *compared(runs, f"{name}-strided", f"{name}-float32", "all")] for name in names]
    rows.insert(0, ["untrained-9", *compared(runs, "untrained-9-strided", "untrained-9", "all")])
    shown = table(["run, all classes", "stem of stride 2", "stride 1", "difference"], rows)
    wanted = [f"{name}-strided" for name in ("untrained-9", *names)]
    if missing := [name for name in wanted if name not in runs]:
        return [shown, f"Not decided: {', '.join(missing)} not run."]
    start, plain_start = runs["untrained-9-strided"], runs["untrained-9"]
    shares = [kept(runs[f"{name}-strided"], start, runs[f"{name}-float32"], plain_start) for name in names[:2]]
    balanced, unbalanced = runs["moco-balanced-9-strided"], runs["moco-unbalanced-9-strided"]
    loss = fmean(balanced.rare.values()) - fmean(unbalanced.rare.values())
    said = (
        f"The stem of stride 2 keeps {shares[0]:.0%} of what training adds with MoCo v2 and {shares[1]:.0%} with ISD;"
        f" MoCo v2 balanced less unbalanced on rare classes is {loss:+.2f} points."
        f" Decided: {'stride 2' if strided_is_taken(shares, balanced, unbalanced) else 'stride 1'} for every later run."
    )
    return [shown, said]


def compared(runs: Runs, one: str, other: str, group: str) -> list[str]:
    """Both means over a group's classes and their difference."""
    means = [fmean(getattr(runs[name], group).values()) if name in runs else None for name in (one, other)]
    difference = None if means[0] is None or means[1] is None else means[0] - means[1]
    return [*(NO_RUN if mean is None else number(mean) for mean in means), "" if difference is None else f"{difference:+.2f}"]


if __name__ == "__main__":
    (HERE / "gate.md").write_text(render(read(PROFILE, METRIC)), encoding="utf-8")
