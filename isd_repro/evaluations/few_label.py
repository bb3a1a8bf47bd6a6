"""Few labels: what `evals.linear` answers after learning from a labelled part of the search set, top-5 beside top-1.

A top-5 answer is stored as one class a query: the true one where it is among the five largest logits, else the first guess,
which then is wrong. So top-5 is recomputed from the stored answers as top-1 is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isd_repro.evaluations.linear import Outcome


def answers(outcome: Outcome, label: Tensor, percent: str) -> dict[str, Tensor]:
    """Answers to all queries by metric, int64, Q.

    Args:
        outcome: what the head reached.
        label: true classes of the queries, int64, Q.
        percent: of labelled images, as metrics name it.
    """
    found = {}
    for name, first, among in (("last", outcome.last, outcome.last5), ("best", outcome.best, outcome.best5)):
        found[f"few-{percent}pct-{name}"] = first
        found[f"few-{percent}pct-{name}-top5"] = among_five(first, among, label)
    return found


def among_five(first: Tensor, among: Tensor, label: Tensor) -> Tensor:
    """The label where it is among the guesses (Q x 5), else the first guess; int64, Q."""
    return torch.where((among == label[:, None]).any(dim=1), label, first)
