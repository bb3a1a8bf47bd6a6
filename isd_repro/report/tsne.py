"""t-SNE plots of features, with a number computed from the features themselves.

t-SNE keeps neighbourhoods and nothing else: distances between groups, their sizes and the axes mean nothing, and drawings of
two encoders are not aligned. So each comes with the nearest-neighbour accuracy among the very points that it shows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from isd_repro.evaluations.features import require_finite
from isd_repro.report import clusters
from isd_repro.runtime.errors import DataError

CLASSES = 10  # as on the paper's poster; colours end there too
PER_CLASS = 100  # images, at most
PERPLEXITY = 30.0
_FEWEST = 4  # images


@dataclass(frozen=True)
class Drawing:
    """One panel.

    Attributes:
        points: float32, N x 2; axes mean nothing.
        divergence: what t-SNE minimised, in nats.
        neighbours: percent of points whose nearest other point, by cosine of the features, has their class.
        input_sha256: hash of the normalised features as little-endian float32.
    """

    points: Tensor
    divergence: float
    neighbours: float
    input_sha256: str


def choose(label: Tensor, draws: Generator) -> Tensor:
    """Positions of the images shown: at most PER_CLASS random ones of each of at most CLASSES random classes, ascending.

    Args:
        label: int64, N.
        draws: advanced by the same amount for equal labels.

    Raises:
        DataError: too few images for a drawing.
    """
    parts = [inside for _, inside in clusters.choose(label, CLASSES, PER_CLASS, draws)]
    found = torch.cat([torch.empty(0, dtype=torch.int64), *parts]).sort().values
    if len(found) < _FEWEST:
        raise DataError(f"{len(found)} query images, but t-SNE needs {_FEWEST}", "increase query_per_class of the subset")
    return found


def draw(features: Tensor, label: Tensor, seed: int) -> Drawing:
    """t-SNE (Barnes-Hut, PCA start) of L2-normalised features; equal input gives equal points on one machine.

    Args:
        features: N x D.
        label: their classes, int64, N.
        seed: 0..2**32-1.

    Raises:
        DataError: features that are not finite.
        UserError: scikit-learn is not installed.
    """
    require_finite(features, "query features")
    rows = functional.normalize(features.float(), dim=1)
    plain = rows.numpy()
    flat = bool((rows == rows[0]).all())  # a collapsed encoder: no principal axis to start from
    with clusters.scikit_learn():
        from sklearn.manifold import TSNE

        perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
        method = TSNE(perplexity=perplexity, init="random" if flat else "pca", learning_rate="auto", random_state=seed)
        points = method.fit_transform(plain)
    return Drawing(
        points=torch.from_numpy(points.astype("float32")),
        divergence=float(method.kl_divergence_),
        neighbours=neighbours(rows, label),
        input_sha256=hashlib.sha256(plain.astype("<f4").tobytes()).hexdigest(),
    )


def neighbours(unit_ND: Tensor, label: Tensor) -> float:
    """Percent of rows whose most similar other row has their class; the lower position of equals counts."""
    similarity = unit_ND.double() @ unit_ND.double().T
    similarity.fill_diagonal_(-torch.inf)
    return 100.0 * float((label[similarity.argmax(dim=1)] == label).double().mean())
