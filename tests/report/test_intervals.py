"""Intervals and tests against their definitions: sums over all outcomes, closed forms."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from isd_repro.report import intervals

GAINS = [1.8, 1.6, 3.5, 3.7, 2.8, 3.8, 2.0, 3.1, 1.8, 1.7]


@pytest.mark.parametrize("differences", [[1.0], [0.1, 0.2, 0.3], [0.1, 0.2, -0.3], [0.0, 0.0], GAINS])
def test_sign_flip_counts_all_signs(differences: list[float]) -> None:
    """In exact fractions, so that sums which are equal in truth are equal: 0.1 + 0.2 - 0.3 is no farther from zero than 0."""
    exact = [Fraction(str(value)) for value in differences]
    sums = [abs(float(sum(a * b for a, b in zip(signs, exact, strict=True)))) for signs in product((1, -1), repeat=len(exact))]
    assert intervals.sign_flip(differences) == sum(total >= abs(float(sum(exact))) for total in sums) / len(sums)


@pytest.mark.parametrize("clusters", [[[1.0], [2.0], [6.0]], [[1.0], [2.0, 6.0], [3.0, 0.0, 3.0]]])
def test_bootstrap_against_all_resamples(clusters: list[list[float]]) -> None:
    """All n^n draws with replacement are what the seeded ones are drawn from: the ends have the tail shares."""
    drawn = list(product(clusters, repeat=len(clusters)))
    means = [sum(map(sum, one)) / sum(map(len, one)) for one in drawn]
    slack = 4 * math.sqrt(0.025 * 0.975 / intervals.RESAMPLES)
    for end, below in zip(intervals.bootstrap(clusters), (0.025, 0.975), strict=True):
        strictly, at_most = (sum(mean < end + shift for mean in means) / len(means) for shift in (-1e-9, 1e-9))
        assert strictly - slack <= below <= at_most + slack


def test_bootstrap_keeps_its_numbers() -> None:
    """Printed on committed pages."""
    assert intervals.bootstrap([[gain] for gain in GAINS]) == pytest.approx((2.07, 3.10), abs=0.005)


def test_students_interval() -> None:
    """The t distribution with 2 degrees of freedom has a closed form: its quantile is sqrt(2) x / sqrt(1 - x^2) with x = 0.95."""
    half = math.sqrt(2) * 0.95 / math.sqrt(1 - 0.95**2) * math.sqrt(7 / 3)
    assert intervals.student_interval([1.0, 2.0, 6.0]) == pytest.approx((3 - half, 3 + half))
    assert intervals.student_interval([1.0]) is None


def test_paired_puts_them_together() -> None:
    found = intervals.paired(GAINS)
    assert (found.n, found.above, found.below, found.p) == (10, 10, 0, 2 / 2**10)
    assert (found.mean, found.deviation) == pytest.approx((2.58, np.std(GAINS, ddof=1)))
    few = intervals.paired([1.0, 2.0])
    assert (few.low, few.high, few.p) == (None, None, 0.5)
