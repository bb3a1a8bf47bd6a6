"""Evaluate runs by nearest neighbours on more queries of rare classes.

The queries are the validation images and, for every rare class, the train images on which no compared run trains (dense queries).
A dense query is classified by the search set without the query itself. Otherwise neighbours are found and vote as in `knn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from isd_repro.config.fields import Count, Distinct, Frozen
from isd_repro.runtime.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from isd_repro.data.manifests import Manifest
    from isd_repro.evaluations.subject import Outcome, Subject

TITLE = "Nearest neighbours, dense queries"
METRICS = r"[1-9][0-9]*-NN-dense"
OPTIONS = {"--k": "k"}
NOTE = "Dense queries are more than n; a rare class has more of them than a large one, and over all queries it weighs more."
OWN_QUERIES = True


class Config(Frozen):
    """Keys of `evaluation.knn_dense` in params.yaml."""

    k: Annotated[Distinct[Count], Field(min_length=1)] = (1, 20)  # numbers of neighbours
    trained: Count | None = None  # images of a rare class, first in its draw, that compared runs train on; None: this run's own


def protocol(evaluation: Any) -> str:
    """What was done, as tables print it."""
    config: Config = evaluation.knn_dense
    left = "that the run does not train on" if config.trained is None else f"after the first {config.trained} of the class's draw"
    ks = ", ".join(f"{k}-NN" for k in config.k)
    return f"{ks} exact float32, of the validation images and of the rare classes' train images {left}, each without itself"


def columns(config: Config) -> list[str]:
    """Metrics in the order of their columns."""
    return [f"{k}-NN-dense" for k in config.k]


def head(metric: str) -> str:
    """A metric as the head of a column."""
    return metric.replace("-dense", ", dense")


def evaluate(subject: Subject, config: Config) -> Outcome:
    """Classify the validation images, then the dense queries in the search set's order, for every k and encoder.

    Raises:
        ConfigError: as for `dense_queries`, or k is larger than the number of images.
    """
    import torch

    from isd_repro.evaluations.neighbour_search import nearest, vote
    from isd_repro.evaluations.subject import Outcome

    dense, most = dense_queries(subject.prepared.manifest, config.trained), max(config.k)
    label = subject.split("search").label
    predictions: dict[str, Tensor] = {}
    for name, bank in subject.features["search"].items():
        near = nearest(bank, label, subject.features["query"][name], most, subject.device)
        others = without_itself(nearest(bank, label, bank[dense], most + 1, subject.device), dense)
        voters = label[torch.cat([near, others])]
        predictions |= {f"{name}/{k}-NN-dense": vote(voters[:, :k]) for k in config.k}
    return Outcome(predictions, label=torch.cat([subject.split("query").label, label[dense]]))


def dense_queries(manifest: Manifest, trained: int | None) -> Tensor:
    """Positions in the search set of the dense queries, int64, ascending.

    Args:
        manifest: of the images.
        trained: as in `Config`. A draw of 135 images contains every smaller draw with the same seed, so with `trained: 135` a set
            with 38 images of each rare class and its balanced control with 135 have the same queries.

    Raises:
        ConfigError: the run trains on images of a rare class that are not among the first `trained` ones.
    """
    import torch

    from isd_repro.data.subsets import rare_order

    label, seen = manifest.labels[manifest.search], np.isin(manifest.search, manifest.train)
    free = ~seen
    for at, name in enumerate(manifest.classes):
        members = np.flatnonzero(label == at)
        if name in manifest.large:
            free[members] = False
        elif trained is not None:
            drawn = members[rare_order(len(members), manifest.rule.get("seed", 0), name)]
            own = int((manifest.labels[manifest.train] == at).sum())
            if own > trained or not seen[drawn[:own]].all():
                found = f"subset {manifest.subset!r} trains on {own} images of class {name}"
                raise ConfigError(
                    f"evaluation.knn_dense.trained: {trained}, but {found}, which are not among the first {trained} of its draw",
                    "raise it; it needs a subset of the rule unbalanced or halves with every train image in the search set",
                )
            free[drawn[:trained]] = False
    return torch.from_numpy(np.flatnonzero(free))


def without_itself(near: Tensor, itself: Tensor) -> Tensor:
    """Neighbours without the query itself, which is an image of the bank; copies of it remain.

    Args:
        near: positions of the k + 1 nearest, int64, Q x (k + 1), nearest first.
        itself: the query's own position, int64, Q.

    Returns:
        positions of the k nearest others, int64, Q x k.
    """
    keep = near != itself[:, None]
    keep[keep.all(dim=1), -1] = False  # k + 1 copies come before it
    return near[keep].view(len(near), -1)
