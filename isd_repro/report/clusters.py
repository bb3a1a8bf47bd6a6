"""k-means clusters of frozen features, and their purity.

k-means on L2-normalised features with as many clusters as classes, as the paper's cluster figure has 1,000 on ImageNet; shown
are random members of random clusters. The paper prints no number beside it. Here each cluster has its
purity, and the whole has the purity that the same cluster sizes reach when labels are dealt out at random: purity rises with
the number of clusters and with the imbalance of classes, so alone it says little.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from isd_repro.evaluations.features import require_finite
from isd_repro.runtime.errors import ConfigError, UserError

ITERATIONS = 300  # of k-means, at most
SHUFFLES = 10  # of the labels


@contextmanager
def scikit_learn() -> Iterator[None]:
    """Within the block scikit-learn can be imported and runs on one thread; the thread pools keep their size outside.

    With more threads its sums come in any order and k-means ends in other clusters at each call (seen on 19,000 rows of 128
    numbers: 96 iterations on one thread, 218 and other clusters on two).

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


@dataclass(frozen=True)
class Clusters:
    """What k-means found.

    Attributes:
        assignment: cluster of each row, int64, N.
        k: number of clusters, some of which may be empty.
        inertia: sum of squared distances to the cluster's centre.
        iterations: done until the centres stood still, or ITERATIONS.
    """

    assignment: Tensor
    k: int
    inertia: float
    iterations: int

    @property
    def sha256(self) -> str:
        """Hash of the assignment as little-endian int32."""
        return hashlib.sha256(self.assignment.numpy().astype("<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class Cluster:
    """One cluster: its size, its most frequent class (the lowest of those that draw; -1 if empty) and how often that occurs."""

    number: int
    size: int
    label: int
    hits: int

    @property
    def purity(self) -> float:
        """Percent of members of the most frequent class; 0 if empty."""
        return 100.0 * self.hits / self.size if self.size else 0.0


def fit(features: Tensor, k: int, seed: int) -> Clusters:
    """k-means (k-means++, Lloyd, one start) on L2-normalised features; equal input gives equal clusters on one machine.

    Args:
        features: N x D, need not be normalised.
        k: number of clusters.
        seed: of the first centres, 0..2**32-1.

    Raises:
        ConfigError: k below 1 or above N.
        DataError: features that are not finite.
        UserError: scikit-learn is not installed.
    """
    if not 1 <= k <= len(features):
        raise ConfigError(f"--k: {k} clusters of {len(features)} images", "give a number from 1 to the number of images")
    require_finite(features, "search features")
    with scikit_learn():
        from sklearn.cluster import KMeans

        rows = functional.normalize(features.float(), dim=1).numpy()  # a copy of our own, so k-means need not make one
        found = KMeans(k, init="k-means++", n_init=1, max_iter=ITERATIONS, random_state=seed, copy_x=False).fit(rows)
    return Clusters(torch.from_numpy(found.labels_.astype("int64")), k, float(found.inertia_), int(found.n_iter_))


def tally(assignment: Tensor, label: Tensor, k: int) -> list[Cluster]:
    """Size and most frequent class of every cluster; `assignment` and `label` are int64, N."""
    classes = int(label.max()) + 1
    counts_KC = torch.bincount(assignment * classes + label, minlength=k * classes).view(k, classes)
    sizes, best = counts_KC.sum(dim=1), counts_KC.argmax(dim=1)  # the first of equal maxima
    hits = counts_KC.amax(dim=1)
    rows = zip(sizes.tolist(), best.tolist(), hits.tolist(), strict=True)
    return [Cluster(number, size, cls if size else -1, hit) for number, (size, cls, hit) in enumerate(rows)]


def purity(clusters: list[Cluster]) -> float:
    """Percent of all images that belong to the most frequent class of their cluster."""
    return 100.0 * sum(cluster.hits for cluster in clusters) / sum(cluster.size for cluster in clusters)


def shuffled_purity(assignment: Tensor, label: Tensor, k: int, draws: Generator) -> float:
    """Mean purity of SHUFFLES random orders of the labels: what these cluster sizes reach without looking at the images."""
    orders = (torch.randperm(len(label), generator=draws) for _ in range(SHUFFLES))
    return math.fsum(purity(tally(assignment, label[order], k)) for order in orders) / SHUFFLES


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
