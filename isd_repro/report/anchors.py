r"""The nearest anchors of a query, and the teacher's soft target over them (the paper's first figure).

With unit-norm teacher and student embeddings k and q of a query and the K anchors x_i of a bank,

    p_t(i) = softmax_i(k . x_i / tau_teacher),    p_s(i) = softmax_i(q . x_i / tau_student)

are the paper's. A contrastive loss has a one-hot target instead: 1 on the other view of the query, 0 on every anchor. All in
float64: the numbers are few and are shown one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TOP = 10  # anchors shown of each query, as in the paper
_ROWS = 4096  # of the bank in float64 at a time


@dataclass(frozen=True)
class Spread:
    """How soft distributions over K anchors are, one value a query.

    Attributes:
        entropy: in nats; ln K if all anchors are alike, 0 if one has everything.
        top: mass of the TOP likeliest anchors, 0..1.
        highest: the likeliest anchor's.
    """

    entropy: Tensor
    top: Tensor
    highest: Tensor


def cosine(query_QD: Tensor, bank_KD: Tensor) -> Tensor:
    """Similarities of L2-normalised rows, float64, Q x K; a zero row has similarity 0 to everything."""
    query = functional.normalize(query_QD.double(), dim=1)
    return torch.cat([query @ functional.normalize(part.double(), dim=1).T for part in bank_KD.split(_ROWS)], dim=1)


def probabilities(cosine_QK: Tensor, tau: float) -> Tensor:
    """Softmax of the similarities at a temperature, Q x K."""
    return torch.softmax(cosine_QK.double() / tau, dim=1)


def spread(probability_QK: Tensor) -> Spread:
    """Entropy and concentration of each row."""
    best = probability_QK.topk(min(TOP, probability_QK.shape[1]), dim=1).values
    return Spread(torch.special.entr(probability_QK).sum(dim=1), best.sum(dim=1), best[:, 0])


def nearest(cosine_QK: Tensor, count: int = TOP) -> Tensor:
    """Positions of each query's most similar anchors, int64, nearest first; the lower position of equals first."""
    return cosine_QK.sort(dim=1, descending=True, stable=True).indices[:, :count]
