"""Statistics against closed forms, hand-computed values and sums over all outcomes."""

from __future__ import annotations

import math
from itertools import product

import pytest

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
