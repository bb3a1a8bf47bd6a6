"""The few statistics that tables print, in plain Python: a binomial interval, a paired exact test, mean and deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)  # 1.96


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
