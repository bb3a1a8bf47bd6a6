"""Nearest-neighbour classification by one exact cosine search in float32 (paper.md 4, NN / 20-NN).

Neighbours are ordered by (similarity descending, label ascending, position ascending), so that permuting the bank changes no
prediction even where copies of one image carry several labels. The vote is unweighted; the lowest label wins a draw.  # DEV-04

Every product has the shape QUERY_ROWS x D x BANK_ROWS, filled up with zeros, so that a similarity does not depend on how many
queries or bank images there are. Beside the features given, memory holds one normalised copy of the queries (4 Q D bytes),
8 Q k bytes of neighbours, and one block of at most about 200 MB; the bank is never copied whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.errors import ConfigError, DataError
from isd_repro.evals.arithmetic import exact
from isd_repro.evals.extract import require_finite

QUERY_ROWS = 512
BANK_ROWS = 8192
VOTE_ROWS = 4096
_LOW = 0xFFFFFFFF  # the half of a key that holds the rank


def predict(bank: Tensor, label: Tensor, query: Tensor, ks: Sequence[int], device: torch.device) -> dict[int, Tensor]:
    """Predicted classes for every k, from one search with the largest.

    Args:
        bank: labelled features, N x D; need not be normalised.
        label: their classes, int64, N.
        query: features to classify, Q x D.
        ks: numbers of neighbours.
        device: where the search runs.

    Returns:
        int64 classes on the CPU, Q, by k.

    Raises:
        ConfigError: k below 1 or above N.
        DataError: features that are not finite, or sizes that do not fit.
    """
    neighbours = nearest(bank, label, query, max(ks, default=0), device)
    return {k: vote(label[neighbours[:, :k]]) for k in ks if _check_k(k, len(bank))}


def nearest(bank: Tensor, label: Tensor, query: Tensor, k: int, device: torch.device) -> Tensor:
    """Positions in the bank of each query's k nearest, int64, Q x k, nearest first; arguments as for `predict`.

    Cosine similarity; a zero vector has similarity 0 to everything.
    """
    _check_k(k, len(bank))
    if bank.ndim != 2 or query.ndim != 2 or bank.shape[1] != query.shape[1] or len(label) != len(bank):
        shapes = f"bank {tuple(bank.shape)}, label {tuple(label.shape)}, query {tuple(query.shape)}"
        raise DataError(f"features do not fit each other: {shapes}", "run `extract` again")
    require_finite(bank, "search features")
    require_finite(query, "query features")
    order = torch.argsort(label, stable=True)  # rank -> position: rank order is (label, position) order
    blocks = [_filled(part, QUERY_ROWS, device) for part in query.split(QUERY_ROWS)]
    best = [torch.full((QUERY_ROWS, k), torch.iinfo(torch.int64).min, device=device) for _ in blocks]
    with exact(device), torch.inference_mode():
        for start in range(0, len(bank), BANK_ROWS):
            part = order[start : start + BANK_ROWS]
            chunk = _filled(bank[part], BANK_ROWS, device)
            for at, block in enumerate(blocks):
                similarity = block @ chunk.T  # QUERY_ROWS x BANK_ROWS
                similarity[:, len(part) :] = -torch.inf
                best[at] = torch.cat([best[at], _best_keys(similarity, start, k)], dim=1).topk(k).values
        rank = _LOW - (torch.cat([*best, torch.empty(0, k, dtype=torch.int64, device=device)])[: len(query)] & _LOW)
    return order[rank.cpu()]


def vote(labels: Tensor) -> Tensor:
    """Most frequent class of each row (int64, Q x k -> Q); the lowest of those that draw."""
    if not len(labels):
        return torch.empty(0, dtype=torch.int64)
    classes = int(labels.max()) + 1
    found = []
    for part in labels.split(VOTE_ROWS):
        votes = torch.zeros(len(part), classes, dtype=torch.int32)
        votes.scatter_add_(1, part, torch.ones_like(part, dtype=torch.int32))
        found.append(votes.argmax(dim=1))  # the first of equal maxima
    return torch.cat(found)


def _check_k(k: int, images: int) -> bool:
    if not 1 <= k <= images:
        raise ConfigError(
            f"evaluation.knn.k: {k} neighbours asked of a search set of {images} images",
            "lower k, or raise search_per_class of the subset",
        )
    return True


def _filled(rows: Tensor, size: int, device: torch.device) -> Tensor:
    """L2-normalised rows in float32 on `device`, followed by zero rows up to `size`."""
    unit = functional.normalize(rows.to(device, torch.float32), dim=1)
    return functional.pad(unit, (0, 0, 0, size - len(unit)))


def _best_keys(similarity: Tensor, start: int, k: int) -> Tensor:
    """Keys of the k best columns of each row, int64; `start` is the rank of the first column.

    `topk` picks freely among equal values. That matters only where the k-th and the next are equal: such rows, and only
    they, are ranked by key over all columns.
    """
    columns = similarity.shape[1]
    value, column = similarity.topk(min(k + 1, columns))
    keys = _keys(value[:, :k], column[:, :k] + start)
    if columns > k:
        unclear = (value[:, k - 1] == value[:, k]) & value[:, k].isfinite()
        rows = unclear.nonzero().squeeze(1)
        if len(rows):
            ranks = torch.arange(start, start + columns, device=similarity.device)
            keys[rows] = _keys(similarity[rows], ranks).topk(k).values
    return functional.pad(keys, (0, k - keys.shape[1]), value=torch.iinfo(torch.int64).min)


def _keys(similarity: Tensor, rank: Tensor) -> Tensor:
    """One integer per entry that orders by (similarity ascending, rank descending): float bits above, reversed rank below."""
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(torch.int64) << 32) | (_LOW - rank)
