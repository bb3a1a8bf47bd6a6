"""scikit-learn on one thread: with more, its sums come in any order, and k-means ends in other clusters at each call.

Seen on 19,000 rows of 128 numbers: 96 iterations with one thread, 218 and other clusters with two. One thread is the same bits
whatever OMP_NUM_THREADS says, on one machine with one set of packages.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from isd_repro.runtime.errors import UserError


@contextmanager
def scikit_learn() -> Iterator[None]:
    """Within the block scikit-learn can be imported, and every pool of threads has one; they get theirs back after.

    Raises:
        UserError: a package of the extra `figures` is missing.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        message = "figures need scikit-learn and threadpoolctl, which are not installed"
        raise UserError(message, "pip install 'isd-repro[figures]'") from error
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: the empty ones are counted
        yield
