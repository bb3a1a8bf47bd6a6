"""The few statistics that tables print, in plain Python: intervals of proportions and means, paired exact tests, deviations.

What is drawn at random is drawn from a seeded `random.Random`, whose `random()` is the same in every version of Python, so that
a second rendering gives equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist, fmean, stdev

from isd_repro.runtime.errors import UserError

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)  # 1.96
RESAMPLES = 10_000  # of the bootstrap, and of the sign-flip test where it is not exact
EXACT = 16  # differences up to which all 2^n signs are listed


def wilson(correct: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent.

    With p = correct / n: centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).

    Raises:
        ValueError: not 0 <= correct <= n with n > 0.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"no proportion: {correct} of {n}")
    share = correct / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == n else centre + half
    return 100 * low, 100 * high


def half_width(correct: int, n: int) -> float:
    """Half the length of Wilson's interval, in points: what tables print after the plus-minus sign."""
    low, high = wilson(correct, n)
    return (high - low) / 2


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test; on discordant queries this is McNemar's exact test.

    Under the null hypothesis wins ~ Binomial(wins + losses, 1/2); p = min(1, 2 P(X <= min(wins, losses))).
    """
    n, fewer = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0
    log_choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in log_choose))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 (None for fewer than two values)."""
    return fmean(values), stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Paired:
    """What paired differences say of their mean.

    Attributes:
        n: number of pairs.
        mean: mean difference, in the unit of the differences.
        deviation: standard deviation with n - 1; None for one pair.
        low, high: bootstrap interval of the mean; None for one or two pairs, from which resampling learns nothing.
        p: two-sided p of the sign-flip test.
        exact: whether `p` counts all 2^n signs; else it is estimated from `RESAMPLES` seeded ones.
        above, below: pairs with a positive and with a negative difference.
    """

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    p: float
    exact: bool
    above: int
    below: int


def paired(differences: Sequence[float], seed: int = 0) -> Paired:
    """All that is said of paired differences, such as those of two methods over repeated draws of a subset."""
    mean, deviation = mean_and_deviation(differences)
    low, high = bootstrap(differences, seed) if len(differences) > 2 else (None, None)
    p, exact = sign_flip(differences, seed)
    above, below = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return Paired(len(differences), mean, deviation, low, high, p, exact, above, below)


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Means of `resamples` draws of n from the n values with replacement; the interval runs between their quantiles at
    (1 - LEVEL) / 2 and (1 + LEVEL) / 2. With few values it is too narrow: that of n values has about the factor
    sqrt((n - 1) / n) of the usual standard error.
    """
    generator, n = Random(seed), len(values)  # noqa: S311 - no secret
    means = sorted(math.fsum(values[int(generator.random() * n)] for _ in range(n)) / n for _ in range(resamples))
    return _quantile(means, 0.5 - LEVEL / 2), _quantile(means, 0.5 + LEVEL / 2)


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of a mean: mean +- t(n - 1) s / sqrt(n) at LEVEL; None of fewer than two values.

    Raises:
        UserError: scipy is not installed.
    """
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return None
    half = student_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean - half, mean + half


def student_quantile(freedom: int) -> float:
    """What share (1 + LEVEL) / 2 of Student's distribution with so many degrees of freedom lies below.

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise UserError("Student's interval needs scipy, which is not installed", "pip install 'isd-repro[report]'") from error
    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


def resampled_clusters(clusters: Sequence[Sequence[float]], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of all values, whole clusters of dependent values drawn together.

    A draw takes as many clusters as there are, with replacement, and is the sum of their values over their number of values, so
    that without resampling it is the plain mean.
    """
    generator, n = Random(seed), len(clusters)  # noqa: S311 - no secret
    sums = [(math.fsum(cluster), len(cluster)) for cluster in clusters]
    means = []
    for _ in range(resamples):
        drawn = [sums[int(generator.random() * n)] for _ in range(n)]
        means.append(math.fsum(total for total, _ in drawn) / sum(size for _, size in drawn))
    means.sort()
    return _quantile(means, 0.5 - LEVEL / 2), _quantile(means, 0.5 + LEVEL / 2)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, the ends at shares 0 and 1."""
    at = share * (len(ordered) - 1)
    floor = math.floor(at)
    above = ordered[min(floor + 1, len(ordered) - 1)]
    return ordered[floor] + (at - floor) * (above - ordered[floor])


def sign_flip(differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, bool]:
    """Two-sided permutation test of a mean difference (Fisher 1935) and whether it is exact.

    If the two sides of each pair could be exchanged, every sign of every difference would be as likely: p is the share of the 2^n
    sums with signs +-1 that are at least as far from zero as the observed one. Beyond `EXACT` pairs, `resamples` seeded sign
    vectors stand for all of them, and the observed one counts among them.
    """
    n, seen = len(differences), abs(math.fsum(differences))
    far = seen - 1e-9 * math.fsum(map(abs, differences))  # equal sums differ by rounding when they are added in another order
    if n <= EXACT:
        sums = [0.0]
        for value in differences:
            sums = [total + sign * value for total in sums for sign in (1, -1)]
        return sum(abs(total) >= far for total in sums) / len(sums), True
    generator = Random(seed)  # noqa: S311 - no secret
    hits = sum(
        abs(math.fsum(value if generator.random() < 0.5 else -value for value in differences)) >= far for _ in range(resamples)
    )
    return (hits + 1) / (resamples + 1), False
