"""Statistics against closed forms, hand-computed values and sums over all outcomes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import scipy.stats

from isd_repro.report import stats

Z = 1.959963984540054


def test_z_is_the_two_sided_95_percent_quantile() -> None:
    assert pytest.approx(Z, abs=1e-12) == stats.Z


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_wilson_at_the_ends_is_the_closed_form(n: int) -> None:
    edge = 100 * Z * Z / (n + Z * Z)
    assert stats.wilson(0, n) == pytest.approx((0.0, edge), abs=1e-10)
    assert stats.wilson(n, n) == pytest.approx((100 - edge, 100.0), abs=1e-10)


@pytest.mark.parametrize(("correct", "n"), [(1, 3), (421, 500), (30000, 50000), (7, 10)])
def test_wilson_ends_solve_the_score_equation(correct: int, n: int) -> None:
    """The interval is where |p - p0| = z sqrt(p0 (1 - p0) / n): the definition, not the formula that the code uses."""
    share = correct / n
    low, high = stats.wilson(correct, n)
    assert low / 100 < share < high / 100
    for end in (low / 100, high / 100):
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-9)


def test_half_widths_of_known_sizes() -> None:
    """Computed by hand: half = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)."""
    assert stats.half_width(30000, 50000) == pytest.approx(0.4294, abs=5e-5)
    assert stats.half_width(5, 10) == pytest.approx(26.3406, abs=5e-4)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_no_interval_of_no_proportion(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} of {n}"):
        stats.wilson(correct, n)


def test_sign_test_by_listing_all_outcomes() -> None:
    """P(outcome at least as far from even as ours) over all 2^n equally likely sequences of wins and losses."""
    for n in range(9):
        for wins in range(n + 1):
            far = abs(2 * wins - n)
            outcomes = [abs(2 * sum(flips) - n) >= far for flips in product((0, 1), repeat=n)]
            assert stats.sign_test(wins, n - wins) == pytest.approx(sum(outcomes) / len(outcomes), abs=1e-12)


def test_sign_test_of_large_counts_is_exact() -> None:
    exact = 2 * sum(math.comb(4000, i) for i in range(1901)) / 2**4000
    assert stats.sign_test(1900, 2100) == pytest.approx(exact, rel=1e-8)
    assert stats.sign_test(2100, 1900) == stats.sign_test(1900, 2100)


def test_mean_and_deviation() -> None:
    assert stats.mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7)))
    assert stats.mean_and_deviation([4.0]) == (4.0, None)


# --- paired comparisons ------------------------------------------------------------------------------------------------

GAINS = [1.8, 1.6, 3.5, 3.7, 2.8, 3.8, 2.0, 3.1, 1.8, 1.7]


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (1, 3), (421, 500), (1100, 1900)])
def test_wilson_against_scipy(correct: int, n: int) -> None:
    interval = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson(correct, n) == pytest.approx((100 * interval.low, 100 * interval.high), abs=1e-9)


def every_sign(differences: list[float]) -> float:
    """The definition: share of all sign vectors whose mean is at least as far from zero as the observed one."""
    exact = [Fraction(str(value)) for value in differences]
    zero = Fraction(0)
    seen = abs(sum(exact, zero))
    sums = [
        abs(sum((sign * value for sign, value in zip(signs, exact, strict=True)), zero))
        for signs in product((1, -1), repeat=len(exact))
    ]
    return sum(total >= seen for total in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [
        [1.0],
        [0.3, -0.1],
        [0.1, 0.2, 0.3],
        [0.1, 0.2, -0.3],
        [0.0, 0.0],
        GAINS,
        [0.7, 0.1, 2.5, 1.9, 0.3, 1.7, 0.0, 0.9, 0.1, 0.9],
    ],
)
def test_sign_flip_lists_all_signs(differences: list[float]) -> None:
    """In exact fractions, so that sums which are equal in truth are equal: 0.1 + 0.2 - 0.3 is no farther than 0."""
    assert stats.sign_flip(differences) == (every_sign(differences), True)


def test_sign_flip_against_scipy() -> None:
    differences = [2.1, -0.4, 1.3, 0.9, -1.7, 2.2, 0.35]
    both = scipy.stats.permutation_test((differences,), sum, permutation_type="samples", n_resamples=10**5)
    assert stats.sign_flip(differences)[0] == pytest.approx(both.pvalue)


def test_sign_flip_of_many_pairs_is_seeded_and_near_the_exact_value() -> None:
    """20 differences of equal size: the sum depends on the number of plus signs alone, so the exact p is a binomial sum."""
    differences = [1.0] * 14 + [-1.0] * 6
    exact = sum(math.comb(20, i) for i in range(21) if abs(2 * i - 20) >= 8) / 2**20
    p, is_exact = stats.sign_flip(differences)
    assert not is_exact
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / stats.RESAMPLES)
    assert stats.sign_flip(differences) == (p, is_exact)
    assert stats.sign_flip(differences, seed=1)[0] != p


@pytest.mark.parametrize("values", [[1.0, 2.0, 6.0], [0.0, 0.5, -1.0, 4.0, 2.0]])
def test_bootstrap_against_all_resamples(values: list[float]) -> None:
    """All n^n draws with replacement are the distribution that the seeded ones are drawn from: the ends have its tail shares."""
    n = len(values)
    means = [sum(draw) / n for draw in product(values, repeat=n)]
    low, high = stats.bootstrap(values)
    slack = 4 * math.sqrt(0.025 * 0.975 / stats.RESAMPLES)
    for end, below in ((low, 0.025), (high, 0.975)):
        strictly = sum(mean < end - 1e-9 for mean in means) / len(means)
        at_most = sum(mean <= end + 1e-9 for mean in means) / len(means)
        assert strictly - slack <= below <= at_most + slack
    assert stats.bootstrap(values) == (low, high)


def test_bootstrap_against_scipy() -> None:
    generator = np.random.default_rng(0)
    theirs = scipy.stats.bootstrap((GAINS,), np.mean, method="percentile", n_resamples=20_000, rng=generator)
    assert stats.bootstrap(GAINS) == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_paired_puts_them_together() -> None:
    found = stats.paired(GAINS)
    assert (found.n, found.above, found.below, found.exact) == (10, 10, 0, True)
    assert found.mean == pytest.approx(2.58)
    assert found.deviation == pytest.approx(np.std(GAINS, ddof=1))
    assert found.p == 2 / 2**10
    assert (found.low, found.high) == stats.bootstrap(GAINS)
    few = stats.paired([1.0, 2.0])
    assert (few.low, few.high, few.p) == (None, None, 0.5)
