"""Intervals and tests that tables print: of a share of queries, of a mean over repetitions, of paired differences.

Resampling draws from `RandomState`, whose stream NumPy has frozen, so that a second rendering gives equal bytes. SciPy is
imported where it is used, as that takes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from isd_repro.report import text

LEVEL = 0.95
RESAMPLES = 10_000  # of the bootstrap
SIGNS = 2**16  # sign vectors of the sign-flip test: all of them for up to 16 pairs, else as many random ones


def mean_per_class(correct: Sequence[int], n: Sequence[int]) -> tuple[float, float, float]:
    """Mean over classes of the share of correct predictions, with its 95 % interval, in percent.

    Classes without queries do not count. The variance of each share is that of the posterior of a flat prior,
    Beta(correct + 1, n - correct + 1).
    """
    right, of = (np.array(values, dtype=float)[np.array(n) > 0] for values in (correct, n))
    mean, share = 100 * float((right / of).mean()), (right + 1) / (of + 2)
    half = 1.96 * 100 * float(np.sqrt((share * (1 - share) / (of + 3)).sum())) / len(of)
    return mean, max(0.0, mean - half), min(100.0, mean + half)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test; on queries that only one of two runs classifies correctly this is McNemar's exact test."""
    from scipy import stats

    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean: mean +- t(n - 1) s / sqrt(n); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), student_quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    from scipy import special

    return float(special.stdtrit(freedom, 0.5 + LEVEL / 2))


def bootstrap(clusters: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of a mean of values that come in clusters of dependent ones.

    A resample takes as many clusters as there are, with replacement, and is the sum of their values over their number of values.
    Independent values are clusters of one. With n clusters the interval is too narrow by a factor of about sqrt((n - 1) / n).
    """
    n = len(clusters)
    drawn = (np.random.RandomState([seed]).random_sample((RESAMPLES, n)) * n).astype(int)
    sums, sizes = np.array([sum(one) for one in clusters]), np.array([len(one) for one in clusters])
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return float(low), float(high)


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """p of the two-sided permutation test of a mean difference (Fisher 1935): the share of signs with a sum as far from zero.

    All 2^n signs are counted for up to 16 pairs, else `SIGNS` random ones.
    """
    if len(differences) < 2:
        return 1.0
    from scipy import stats

    def total(values: np.ndarray, axis: int) -> Any:
        return values.sum(axis).round(9)  # sums that are equal in truth differ by rounding when added in another order

    found = stats.permutation_test(
        (differences,), total, permutation_type="samples", vectorized=True, n_resamples=SIGNS, rng=np.random.RandomState([seed])
    )
    return float(found.pvalue)


@dataclass(frozen=True)
class Paired:
    """What paired differences, such as those of two methods over draws of a subset, say of their mean, in their unit."""

    n: int  # number of pairs
    mean: float
    deviation: float | None  # standard deviation with n - 1; None for one pair
    low: float | None  # bootstrap interval of the mean; None for one or two pairs, from which resampling learns nothing
    high: float | None
    p: float  # of the sign-flip test
    above: int  # pairs with a positive difference
    below: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both of its ends, if there are any."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def words(self) -> str:
        """Interval and test of the mean difference."""
        interval = f"95 % bootstrap interval {text.span(self.interval)}; " if self.interval else ""
        return f"{interval}sign-flip test over {self.n} pairs {text.p_value(self.p)}"


def paired(differences: Sequence[float]) -> Paired:
    """Mean, interval and test of paired differences."""
    n, deviation = len(differences), stdev(differences) if len(differences) > 1 else None
    low, high = bootstrap([[value] for value in differences]) if n > 2 else (None, None)
    above, below = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return Paired(n, fmean(differences), deviation, low, high, sign_flip(differences), above, below)
