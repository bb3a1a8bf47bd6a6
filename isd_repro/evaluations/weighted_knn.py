"""Evaluate runs by nearest-neighbour classification weighted by similarity.

Each of the k nearest search images votes for its class with the weight exp(s / T), where s is its cosine similarity to the query
(Wu et al., CVPR 2018). The defaults are those of the tables of DINO and lightly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from isd_repro.config.fields import Count, Distinct, Frozen, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from isd_repro.evaluations.subject import Outcome, Subject

TITLE = "Weighted nearest neighbours"
METRICS = r"[1-9][0-9]*-NN-weighted"
OPTIONS = {"--k": "k"}
ROWS = 64  # queries whose neighbours are compared together


class Config(Frozen):
    """Keys of `evaluation.weighted_knn` in params.yaml."""

    k: Annotated[Distinct[Count], Field(min_length=1)] = (10, 20, 100, 200)  # numbers of neighbours
    temperature: Positive = 0.07


def protocol(evaluation: Any) -> str:
    """What was done, as tables print it."""
    config: Config = evaluation.weighted_knn
    return f"{', '.join(f'{k}-NN' for k in config.k)} weighted by exp(cosine similarity / {config.temperature:g})"


def columns(config: Config) -> list[str]:
    """Metrics in the order of their columns."""
    return [f"{k}-NN-weighted" for k in config.k]


def head(metric: str) -> str:
    """A metric as the head of a column."""
    return metric.replace("-weighted", ", weighted")


def evaluate(subject: Subject, config: Config) -> Outcome:
    """Classify the queries, for every k and encoder."""
    from isd_repro.evaluations.neighbour_search import nearest
    from isd_repro.evaluations.subject import Outcome

    predictions = {}
    for name, bank in subject.features["search"].items():
        query, label = subject.features["query"][name], subject.split("search").label
        near = nearest(bank, label, query, max(config.k), subject.device)
        similarity = similarities(bank, query, near)
        for k in config.k:
            votes = vote(label[near[:, :k]], similarity[:, :k], config.temperature, subject.classes)
            predictions[f"{name}/{k}-NN-weighted"] = votes
    return Outcome(predictions)


def similarities(bank_ND: Tensor, query_QD: Tensor, near_QK: Tensor) -> Tensor:
    """Cosine similarity of every query to its neighbours, Q x K."""
    import torch
    from torch.nn import functional

    found = []
    for query, near in zip(query_QD.split(ROWS), near_QK.split(ROWS), strict=True):
        rows = functional.normalize(bank_ND[near], dim=2)
        found.append((rows * functional.normalize(query, dim=1)[:, None]).sum(dim=2))
    return torch.cat(found)


def vote(label_QK: Tensor, similarity_QK: Tensor, temperature: float, classes: int) -> Tensor:
    """The class with the largest sum of weights, int64, Q; the lowest of equals."""
    import torch

    weight_QC = torch.zeros(len(label_QK), classes, dtype=torch.float64)
    weight_QC.scatter_add_(1, label_QK, (similarity_QK.double() / temperature).exp())
    return weight_QC.argmax(dim=1)
