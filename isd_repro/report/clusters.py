"""k-means clusters of frozen features, and their purity.

k-means is run on L2-normalised features with as many clusters as classes, as the paper's cluster figure has 1,000 on ImageNet;
random members of random clusters are shown. The paper gives no numbers for this figure. Here every cluster has its purity, and
the whole clustering is compared with the purity of the same cluster sizes under shuffled labels, because purity grows with the
number of clusters and with the imbalance of classes and says little by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional

from isd_repro.evaluations.features import require_finite
from isd_repro.runtime.errors import ConfigError, UserError

if TYPE_CHECKING:
    from sklearn.cluster import KMeans

ITERATIONS = 300  # of k-means, at most
SHUFFLES = 10  # of the labels


@contextmanager
def scikit_learn() -> Iterator[None]:
    """Within the block scikit-learn can be imported and runs on one thread; outside, thread pools keep their sizes.

    With more threads, sums are added in any order, and k-means ends with other clusters at each call (observed on 19,000 rows of
    128 numbers: 96 iterations on one thread, and 218 with other clusters on two).

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


def k_means(features: Tensor, k: int, seed: int) -> KMeans:
    """k-means (k-means++, Lloyd, one start) on L2-normalised features; equal input gives equal clusters on one machine.

    Args:
        features: N x D, need not be normalised.
        k: number of clusters, some of which may stay empty.
        seed: of the first centres, 0..2**32-1.

    Raises:
        ConfigError: k is below 1 or above N.
        DataError: features are not finite.
        UserError: scikit-learn is not installed.
    """
    if not 1 <= k <= len(features):
        raise ConfigError(f"--k: {k} clusters of {len(features)} images", "give a number from 1 to the number of images")
    require_finite(features, "search features")
    with scikit_learn():
        from sklearn.cluster import KMeans

        rows = functional.normalize(features.float(), dim=1).numpy()  # a copy of our own, so k-means need not make one
        return KMeans(k, init="k-means++", n_init=1, max_iter=ITERATIONS, random_state=seed, copy_x=False).fit(rows)


def counts(assignment: Tensor, label: Tensor, k: int) -> Tensor:
    """Number of members of every cluster by class, int64, K x C; `assignment` and `label` are int64, N."""
    classes = int(label.max()) + 1
    return torch.bincount(assignment * classes + label, minlength=k * classes).view(k, classes)


def choose(assignment: Tensor, clusters: int, members: int, draws: Generator) -> list[tuple[int, Tensor]]:
    """Random clusters that are not empty, and random members of each: (cluster, positions), in the order drawn.

    At most as many as there are.
    """
    present = assignment.unique()
    shown = present[torch.randperm(len(present), generator=draws)][:clusters]
    found = []
    for cluster in shown.tolist():
        inside = (assignment == cluster).nonzero().squeeze(1)
        found.append((cluster, inside[torch.randperm(len(inside), generator=draws)][:members]))
    return found
