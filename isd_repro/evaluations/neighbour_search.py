"""Exact search for nearest neighbours by cosine similarity in float32, and their vote.

Neighbours are ordered by (similarity descending, label ascending, position ascending), so that permuting the bank changes no
prediction even if copies of one image have different labels. The vote is unweighted; the lowest label wins a tie.  # DEV-04

Every matrix product has the shape QUERY_ROWS x D x BANK_ROWS, filled up with zeros, so that a similarity does not depend on the
number of queries or bank images.

Memory. Neither the bank nor the queries are copied as a whole: both may be memory-mapped files larger than memory. In addition
the search needs 16 N bytes for the order of the bank, 8 Q k bytes for neighbours, the normalised queries of one pass (at most
QUERY_BYTES), one block of BANK_ROWS x D floats, and its similarities; together under 200 MB up to D = 2048. The bank is read once
for every QUERY_BYTES of queries: 7 times for 50,000 queries of 2,048 numbers. On a CUDA device a pass takes up to
CUDA_QUERY_BYTES of queries, so that the bank is copied to the device only once; no bit depends on the number of passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.features import UNUSABLE, require_finite
from isd_repro.runtime.errors import ConfigError, DataError

QUERY_ROWS = 1024
BANK_ROWS = 2048
QUERY_BYTES, CUDA_QUERY_BYTES = 2**26, 2**30
GROUPS = 64  # columns whose residues are compared together
_FEW = 16  # groups of one row that are cheaper to gather than to rank
VOTE_ROWS = 4096
_ZERO = 1e-12  # a vector shorter than this is not lengthened to 1
_ROWS = 256  # bank rows normalised at a time
_RANKED = 64  # rows whose every column is ranked by key at a time
_LOW = 0xFFFFFFFF  # the half of a key that holds the rank


def nearest(bank: Tensor, label: Tensor, query: Tensor, k: int, device: torch.device) -> Tensor:
    """Positions in the bank of each query's k nearest neighbours by cosine similarity, int64, Q x k, nearest first.

    A zero vector has similarity 0 to everything; it is an error if all queries or all bank rows are zero.

    Args:
        bank: labelled features, N x D; need not be normalised.
        label: their classes, int64, N.
        query: features to classify, Q x D.
        k: number of neighbours.
        device: where the search runs.

    Raises:
        ConfigError: k is below 1 or above N.
        DataError: features are not finite, all of them are zero, or sizes do not match.
    """
    check_k(k, len(bank))
    if bank.ndim != 2 or query.ndim != 2 or bank.shape[1] != query.shape[1] or len(label) != len(bank):
        shapes = f"bank {tuple(bank.shape)}, label {tuple(label.shape)}, query {tuple(query.shape)}"
        raise DataError(f"features do not fit each other: {shapes}", "run `extract` again")
    require_finite(query, "query features")
    if len(query) and not any(bool((torch.linalg.vector_norm(part, dim=1) > _ZERO).any()) for part in query.split(QUERY_ROWS)):
        raise DataError("query features: all of them are zero", UNUSABLE)
    order = torch.argsort(label, stable=True)  # rank -> position: rank order is (label, position) order
    room = CUDA_QUERY_BYTES if device.type == "cuda" else QUERY_BYTES
    rows = max(1, room // (4 * QUERY_ROWS * max(1, query.shape[1]))) * QUERY_ROWS
    found = [torch.empty(0, k, dtype=torch.int64)]
    with exact(device), torch.inference_mode():
        found += [_search(bank, order, part, k, device).cpu() for part in query.split(rows) if len(part)]
    rank = _LOW - (torch.cat(found) & _LOW)
    return order[rank]


def _search(bank: Tensor, order: Tensor, query: Tensor, k: int, device: torch.device) -> Tensor:
    """Keys of each query's k nearest, int64, Q x k, descending; one pass over the bank."""
    parts = query.split(QUERY_ROWS)
    blocks = [_filled(part, QUERY_ROWS, device) for part in parts]
    best = [torch.full((len(part), k), torch.iinfo(torch.int64).min, device=device) for part in parts]
    similarity = torch.empty(QUERY_ROWS, BANK_ROWS, device=device)
    chunk = torch.zeros(BANK_ROWS, query.shape[1], device=device)
    longest = 0.0
    for start in range(0, len(bank), BANK_ROWS):
        part = order[start : start + BANK_ROWS]
        longest = max(longest, _fill(chunk, bank, part))
        for at, block in enumerate(blocks):
            torch.mm(block, chunk.T, out=similarity)
            similarity[:, len(part) :] = -torch.inf
            best[at] = _merged(best[at], similarity[: len(best[at])], start, k)
    if longest <= _ZERO:
        raise DataError("search features: all of them are zero", UNUSABLE)
    return torch.cat(best)


def vote(labels: Tensor) -> Tensor:
    """Most frequent class of each row (int64, Q x k -> Q); the lowest class wins a tie."""
    if not len(labels):
        return torch.empty(0, dtype=torch.int64)
    classes = int(labels.max()) + 1
    found = []
    for part in labels.split(VOTE_ROWS):
        votes = torch.zeros(len(part), classes, dtype=torch.int32)
        votes.scatter_add_(1, part, torch.ones_like(part, dtype=torch.int32))
        found.append(votes.argmax(dim=1))  # the first of equal maxima
    return torch.cat(found)


def check_k(k: int, images: int) -> None:
    """Raise `ConfigError` if the search set does not have k images."""
    if not 1 <= k <= images:
        raise ConfigError(
            f"k = {k}: the search set has {images} images",
            "lower evaluation.knn.k, or --k of `evaluate`, or add labelled images (search_per_class of the subset)",
        )


def _filled(rows: Tensor, size: int, device: torch.device) -> Tensor:
    """L2-normalised rows in float32 on `device`, followed by zero rows up to `size`."""
    unit = functional.normalize(rows.to(device, torch.float32), dim=1)
    return functional.pad(unit, (0, 0, 0, size - len(unit)))


def _fill(chunk: Tensor, bank: Tensor, part: Tensor) -> float:
    """Put the L2-normalised bank rows at positions `part` into `chunk`, and zeros below them; the greatest length."""
    first, count = int(part[0]), len(part)
    follow = int(part[-1]) - first == count - 1 and bool((part.diff() == 1).all())  # as in a bank sorted by class
    lengths = chunk.new_empty(count, 1)
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        rows = bank[first + start : first + stop] if follow else bank[part[start:stop]]
        rows, length = rows.to(chunk.device, torch.float32), lengths[start:stop]
        torch.linalg.vector_norm(rows, dim=1, keepdim=True, out=length)
        torch.div(rows, length.clamp_min(_ZERO), out=chunk[start:stop])  # as functional.normalize
    if not bool(torch.isfinite(lengths).all()):
        require_finite(bank, "search features")
    chunk[count:] = 0
    return float(lengths.max())


def _merged(best: Tensor, similarity: Tensor, start: int, k: int) -> Tensor:
    """The k best keys among those found so far and the columns of one more block; `start` is the rank of its first column.

    Once k are known, only columns at least as similar as the k-th can matter, and in most blocks these are few. The largest
    value of every GROUPS-th column tells in one pass where they can be; they are gathered and ranked by key, ties included.
    """
    columns = similarity.shape[1]
    if start < k or columns % GROUPS:
        return torch.cat([best, _best_keys(similarity, start, k)], dim=1).topk(k).values
    least = _similarity(best[:, -1:])
    grouped = similarity.view(len(similarity), columns // GROUPS, GROUPS)
    hot = grouped.amax(dim=1) >= least  # rows x GROUPS
    many = hot.sum(dim=1) > _FEW
    hot &= ~many[:, None]
    row, group = hot.nonzero(as_tuple=True)  # by row, so that a row's columns follow each other
    values = grouped[row, :, group]
    hit, place = (values >= least[row]).nonzero(as_tuple=True)
    row, column = row[hit], place * GROUPS + group[hit]
    count = torch.bincount(row, minlength=len(best))
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    found = best.new_full((len(best), int(count.max())), torch.iinfo(torch.int64).min)
    found[row, slot] = _keys(values[hit, place], column + start)
    merged = torch.cat([best, found], dim=1).topk(k).values
    for rows in many.nonzero().squeeze(1).split(_RANKED):
        merged[rows] = torch.cat([best[rows], _best_keys(similarity[rows], start, k)], dim=1).topk(k).values
    return merged


def _similarity(keys: Tensor) -> Tensor:
    """The similarity that a key was made of; float32."""
    ordered = (keys >> 32).to(torch.int32)
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


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
        ranks = torch.arange(start, start + columns, device=similarity.device)
        for rows in unclear.nonzero().squeeze(1).split(_RANKED):
            keys[rows] = _keys(similarity[rows], ranks).topk(k).values
    return functional.pad(keys, (0, k - keys.shape[1]), value=torch.iinfo(torch.int64).min)


def _keys(similarity: Tensor, rank: Tensor) -> Tensor:
    """One integer per entry that orders by (similarity ascending, rank descending): float bits above, reversed rank below."""
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 + 0.0 = 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(torch.int64) << 32) | (_LOW - rank)
