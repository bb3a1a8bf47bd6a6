r"""The sums of `attend` by a Triton kernel of our own, for embeddings that torch's flash attention does not take (D above 256).

A program has one block of queries and one split of the bank. It loads a tile of rows once, as keys and as values, and keeps for
each query a running maximum t, total s and sum a of the rows; a tile with similarities n = q . m changes them to

    t' = max(t, max_j n_j),    s' = s e^(t - t') + sum_j e^(n_j - t'),    a' = a e^(t - t') + sum_j e^(n_j - t') m_j,

and it writes t + log s and a / s. Products are of float16 and summed in float32, so the weights e^(n - t') are rounded to float16
where they multiply rows, as in `chunked` on CUDA; the total has them unrounded. Nothing is added atomically: bits repeat.

Block sizes follow from D, the number of splits from N and K, nothing from a timing or from the card:

    D padded to P, a power of two: 64 queries and 8 warps always; P = 512: tiles of 32 rows, below: of 64.

At P = 512 the sums a take 64 x 512 float32, 128 of a thread's 255 registers; in shared memory the queries take 64 KiB and a
tile 32 KiB, of which `num_stages=3` holds two (compute capability 8.0: 132 KiB in all, as compiled) or three (9.0: 160 KiB).
Cards with 99 KiB for a program (8.6, 8.9, 12.0) cannot run that; the trial in nn/bank_attention.py finds it out.

**It has not run on a GPU yet**: the tests run it in Triton's interpreter, and compile it for 8.0 and 9.0.

Shapes: N queries, K bank rows, D embedding, S splits; B queries of a block, T rows of a tile, P padded embedding.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # triton is on Linux alone, and no CPU run should load it: `_kernel` imports it
    from triton import language as tl

LARGEST_D = 512
BLOCK = 64  # queries; 64 is what Hopper's matrix instruction takes, and 128 would need every register of a multiprocessor
_PROGRAMS = 528  # 4 for each of an H100's 132 multiprocessors, 5 for an A100's 108 (one runs at a time): few idle at the end
# fusing is what Triton does by default before 3.10; it is named so that no version decides it
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def tile_of(features: int) -> int:
    """Rows of the bank in a tile."""
    return 32 if features > LARGEST_D // 2 else 64


def splits_of(count: int, rows: int, features: int) -> int:
    """Into how many splits `parts` divides a bank: with the blocks of queries about `_PROGRAMS`, and a tile at least for each."""
    return max(1, min(_PROGRAMS // _ceil(count, BLOCK), _ceil(rows, tile_of(features))))


def parts(query_ND: Tensor, bank_KD: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and mean of every query over each split of the bank, S x N and S x N x D in float32.

    Args:
        query_ND: rows divided by their temperature; they are rounded to float16.
        bank_KD: float16, D a multiple of 16 up to 512.
        splits: at most so many, of whole tiles but for the last; 0: as of `splits_of`.
    """
    (rows, features), count, tile = bank_KD.shape, len(query_ND), tile_of(bank_KD.shape[1])
    assert bank_KD.dtype == torch.float16
    assert features % 16 == 0 < features <= LARGEST_D
    length = tile * _ceil(rows, tile * (splits or splits_of(count, rows, features)))
    splits = _ceil(rows, length)
    lse_SN = torch.empty(splits, count, dtype=torch.float32, device=bank_KD.device)
    mean_SND = lse_SN.new_empty(splits, count, features)
    sizes = {"D": features, "P": 1 << (features - 1).bit_length(), "B": BLOCK, "T": tile}
    asked_ND = query_ND.half().contiguous()
    # blocks of queries come first in the grid, so that programs beside each other read the same rows from the card's cache
    grid = (_ceil(count, BLOCK), splits)
    with torch.cuda.device_of(bank_KD):
        _kernel()[grid](asked_ND, bank_KD.contiguous(), lse_SN, mean_SND, count, rows, length, **sizes, **OPTIONS)
    return lse_SN, mean_SND


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


@cache
def _kernel() -> Any:
    """`_sweep` for Triton; `ImportError` where it is not installed. One binary for all N and K, so the trial's is the run's."""
    global tl  # noqa: PLW0603
    import triton
    from triton import language as tl

    return triton.jit(_sweep, do_not_specialize=["count", "rows", "length"])


def _sweep(  # type: ignore[no-untyped-def]  # Triton looks up what annotations name, and refuses `Any`
    query_ND,
    bank_KD,
    lse_SN,
    mean_SND,
    count,
    rows,
    length,
    D: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    split = tl.program_id(1)
    first = split * length
    last = tl.minimum(first + length, rows)
    at_B, at_P = tl.program_id(0) * B + tl.arange(0, B), tl.arange(0, P)
    ours_B, ours_BP = at_B < count, (at_B < count)[:, None] & (at_P < D)[None, :]
    asked_BP = tl.load(query_ND + at_B[:, None] * D + at_P[None, :], mask=ours_BP, other=0.0)
    top_B = tl.full([B], float("-inf"), tl.float32)
    total_B = tl.zeros([B], tl.float32)
    sum_BP = tl.zeros([B, P], tl.float32)
    for start in range(first, last, T):
        at_T = start + tl.arange(0, T)
        inside_T = at_T < last  # a split has a row, so its first tile makes every maximum finite
        place_TP = at_T.to(tl.int64)[:, None] * D + at_P[None, :]
        tile_TP = tl.load(bank_KD + place_TP, mask=inside_T[:, None] & (at_P < D)[None, :], other=0.0)
        near_BT = tl.where(inside_T[None, :], tl.dot(asked_BP, tl.trans(tile_TP)), float("-inf"))
        higher_B = tl.maximum(top_B, tl.max(near_BT, axis=1))
        shrink_B = tl.exp(top_B - higher_B)
        weight_BT = tl.exp(near_BT - higher_B[:, None])
        total_B = total_B * shrink_B + tl.sum(weight_BT, axis=1)
        sum_BP = tl.dot(weight_BT.to(tl.float16), tile_TP, sum_BP * shrink_B[:, None])
        top_B = higher_B
    place_B = split.to(tl.int64) * count + at_B
    tl.store(lse_SN + place_B, top_B + tl.log(total_B), mask=ours_B)
    tl.store(mean_SND + place_B[:, None] * D + at_P[None, :], sum_BP / total_B[:, None], mask=ours_BP)
