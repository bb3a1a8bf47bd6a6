"""Rare less large within the same classes, so that it does not matter which classes happen to be large.

Rare and large queries of one set come from different classes, and classes differ more than methods do. Over several sets most
classes are rare in some and large in others: each of them is compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats


@dataclass(frozen=True)
class Contrast:
    """Rare less large within a class, averaged over classes, in the unit of the values.

    Attributes:
        mean: over the classes, each counted once.
        low, high: 95 % interval of Student's t over the classes; NaN for a single class.
        classes: how many are rare in one set and large in another.
    """

    mean: float
    low: float
    high: float
    classes: int


def within_class(rare: Mapping[str, Sequence[float]], large: Mapping[str, Sequence[float]]) -> Contrast | None:
    """The contrast of values by class: scores of a method, or differences of two.

    Args:
        rare: for each class its values in the sets where it is rare.
        large: likewise where it is large.

    Returns:
        None where no class is in both.
    """
    both = sorted(cls for cls in rare.keys() & large.keys() if rare[cls] and large[cls])
    values = [fmean(rare[cls]) - fmean(large[cls]) for cls in both]
    if not values:
        return None
    low, high = (math.nan, math.nan) if len(values) == 1 else stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Contrast(fmean(values), float(low), float(high), len(values))
