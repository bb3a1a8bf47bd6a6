"""What is printed beside a score."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from isd_repro.records import wilson


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 40), (7, 40), (40, 40), (4321, 10_000)])
def test_wilson_is_that_of_scipy(correct: int, n: int) -> None:
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert wilson(correct, n) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
