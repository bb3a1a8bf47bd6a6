"""Evaluate runs by nearest-neighbour classification.

Each query takes the majority class of its k nearest search images by cosine similarity (the paper's NN and 20-NN).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from isd_repro.config.fields import Count, Distinct, Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from isd_repro.evaluations.subject import Outcome, Pictures, Subject

TITLE = "Nearest neighbours"
METRICS = r"[1-9][0-9]*-NN"
IN_ALL = True
OPTIONS = {"--k": "k"}
QUERIES, NEIGHBOURS = 8, 6  # rows of the picture, and neighbours per query


class Config(Frozen):
    """Settings of the evaluation."""

    k: Annotated[Distinct[Count], Field(min_length=1)] = (1, 20)  # numbers of neighbours


def protocol(evaluation: Any) -> str:
    """How neighbours are found and how they vote, as tables print it."""
    return f"{', '.join(columns(evaluation.knn))} exact float32, ties by lowest label"


def columns(config: Config) -> list[str]:
    """Metrics in the order of their columns."""
    return [f"{k}-NN" for k in config.k]


def evaluate(subject: Subject, config: Config) -> Outcome:
    """Classify the queries by their nearest search images, for every k and encoder."""
    from isd_repro.evaluations.neighbour_search import check_k, nearest, vote
    from isd_repro.evaluations.subject import Outcome

    check_k(max(config.k), subject.manifest.search)
    search, query, label = subject.features["search"], subject.features["query"], subject.split("search").label
    near = {name: nearest(bank, label, query[name], max(config.k), subject.device) for name, bank in search.items()}
    predictions = {f"{name}/{k}-NN": vote(label[found[:, :k]]) for name, found in near.items() for k in config.k}

    def pictures() -> Pictures:
        return {f"nearest-{name}": _picture(name, found, subject) for name, found in near.items()}

    return Outcome(predictions, pictures=pictures)


def _picture(encoder: str, near: Tensor, subject: Subject) -> tuple[Tensor, str]:
    """A picture of some queries of different classes, each in a row with its nearest search images."""
    import torch

    from isd_repro.data import contact_sheet

    query, search = subject.split("query"), subject.split("search")
    count = min(QUERIES, len(near))
    rows = torch.arange(count) * len(near) // count
    shown = near[rows, :NEIGHBOURS]
    pictures = subject.reader.read(torch.cat([query.index[rows][:, None], search.index[shown]], dim=1).flatten())
    pixels = contact_sheet.thumbnails(*pictures)
    right = (search.label[shown] == query.label[rows, None]).long()
    marks = torch.cat([torch.full((count, 1), -1), right], dim=1)
    caption = f"Queries (first column) and their nearest search images under the {encoder}; green has the query's class."
    return contact_sheet.sheet(list(pixels.unflatten(0, (count, -1))), marks), caption
