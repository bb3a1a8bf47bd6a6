"""t-SNE of features.

t-SNE preserves only neighbourhoods: distances between groups, their sizes and the axes have no meaning, and drawings of two
encoders are not aligned. Each drawing is therefore shown with the nearest-neighbour accuracy among its points.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from isd_repro.report import clusters
from isd_repro.runtime.errors import DataError

CLASSES = 10  # as on the paper's poster; colours end there too
PER_CLASS = 100  # images, at most
PERPLEXITY = 30.0
_FEWEST = 4  # images


def choose(label: Tensor, draws: Generator) -> Tensor:
    """Positions of the images shown: at most PER_CLASS random ones of each of at most CLASSES random classes, ascending.

    `label` is int64, N. The generator is advanced by the same amount for equal labels.

    Raises:
        DataError: there are too few images for a drawing.
    """
    parts = [inside for _, inside in clusters.choose(label, CLASSES, PER_CLASS, draws)]
    found = torch.cat([torch.empty(0, dtype=torch.int64), *parts]).sort().values
    if len(found) < _FEWEST:
        raise DataError(f"{len(found)} query images, but t-SNE needs {_FEWEST}", "increase query_per_class of the subset")
    return found


def draw(unit_ND: Tensor, seed: int) -> tuple[np.ndarray, float]:
    """t-SNE (Barnes-Hut, PCA start); equal input gives equal points on one machine.

    Args:
        unit_ND: L2-normalised finite features, float32.
        seed: 0..2**32-1.

    Returns:
        points, N x 2, whose axes have no meaning; and the divergence that t-SNE minimised, in nats.

    Raises:
        UserError: scikit-learn is not installed.
    """
    flat = bool((unit_ND == unit_ND[0]).all())  # a collapsed encoder: no principal axis to start from
    with clusters.scikit_learn():
        from sklearn.manifold import TSNE

        perplexity = min(PERPLEXITY, (len(unit_ND) - 1) / 3)
        method = TSNE(perplexity=perplexity, init="random" if flat else "pca", learning_rate="auto", random_state=seed)
        return method.fit_transform(unit_ND.numpy()), float(method.kl_divergence_)
