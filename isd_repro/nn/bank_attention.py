r"""Soft similarities to a bank without a B x K matrix: attention with the bank as keys and as values.

For a query x and bank rows m_j,

    lse(x) = log sum_j exp(x . m_j),    mean(x) = sum_j softmax_j(x . m_j) m_j,    and mean is the gradient of lse.

Both come from one sweep over the bank with a running maximum, so the gradient is known when the forward pass ends and the bank
may be overwritten at once. A temperature is a factor of the query. A loss of any method on a bank is made of these two:
methods/isd.py and methods/moco.py have theirs. The sums of parts of a bank are merged as in flash-decoding (Dao et al., 2023).

The kernel follows from device, number format, D and K, never from a timing:

    cuda from compute capability 8.0, float16 bank, D a multiple of 8 up to 256, K of 4,096 or more:
        `flash`, torch's own attention over parts of the bank that run side by side;
    the same with D a multiple of 16 above 256, up to 512: `triton`, a kernel of our own (nn/bank_triton.py), where it passes its
        trial, a small problem before a process first uses it, compared with `chunked`; after a failure the process never uses it;
    a CPU, float32 or float16 bank, torch with oneDNN: `onednn`, the loop of `chunked` with oneDNN's products (nn/products.py);
    everything else: `chunked`, a loop of matrix products over rows of the bank.

Shapes: N queries, K bank rows, D embedding.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.nn import bank_triton, products

Kernel = Literal["flash", "triton", "onednn", "chunked"]

PARTS = 64  # of the bank in `flash`: one block of queries leaves most of a large GPU idle
_FLASH_D, _SPLIT_K = 256, 64 * PARTS
_CHUNK = {"cuda": 16_384}  # rows; a tile of 512 x 16,384 stays in a large GPU's cache
_CHUNK_ELSEWHERE = 1_024  # a tile of 512 x 1,024 float32 is 2 MiB


def kernel_of(bank_KD: Tensor) -> Kernel:
    """What `attend` runs for a bank, by the rule above."""
    if _takes_splits(bank_KD) and bank_KD.shape[1] % 8 == 0 and bank_KD.shape[1] <= _FLASH_D:
        return "flash"
    if _is_for_triton(bank_KD) and not why_not_triton(bank_KD):
        return "triton"
    asked = bank_KD.new_empty(0, dtype=torch.float64 if bank_KD.dtype == torch.float64 else torch.float32)
    return "onednn" if products.by_onednn(asked) else "chunked"


def why_not_triton(bank_KD: Tensor) -> str:
    """Why `triton` is left out for a bank that the rule gives to it; empty where it is not, and for every other bank."""
    return _trial(bank_KD.shape[1], bank_KD.device) if _is_for_triton(bank_KD) else ""


def _takes_splits(bank_KD: Tensor) -> bool:
    large = len(bank_KD) >= _SPLIT_K and bank_KD.dtype == torch.float16
    return large and bank_KD.is_cuda and torch.cuda.get_device_capability(bank_KD.device) >= (8, 0)


def _is_for_triton(bank_KD: Tensor) -> bool:
    features = bank_KD.shape[1]
    return features % 16 == 0 and _FLASH_D < features <= bank_triton.LARGEST_D and _takes_splits(bank_KD)


def attend(query_ND: Tensor, bank_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every query's similarities, and the mean of the bank's rows under their softmax.

    Args:
        query_ND: rows divided by their temperature, float32 or float64.
        bank_KD: float16, float32 or float64; it takes no gradient and may change afterwards.

    Returns:
        N values with a gradient to the query, and N x D without one, both in the query's format.

    Raises:
        TypeError: a bfloat16 bank or query (8 bits put errors of a percent into the gradient), or a float16 query.
    """
    if bank_KD.dtype == torch.bfloat16 or query_ND.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"attend: a {query_ND.dtype} query of a {bank_KD.dtype} bank; give float32 and a float32 or float16 bank")
    lse_N, mean_ND = _Attend.apply(query_ND, bank_KD)
    return lse_N, mean_ND


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_ND: Tensor, bank_KD: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(query_ND.device.type, enabled=False):
            found = {"flash": flash, "triton": by_triton}.get(kernel_of(bank_KD), chunked)(query_ND, bank_KD)
        ctx.save_for_backward(found[1])
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph: it would be zero without a word
            raise RuntimeError("attend: there is no second derivative")
        (mean_ND,) = ctx.saved_tensors
        return gradient_N[:, None] * mean_ND, None


def chunked(query_ND: Tensor, bank_KD: Tensor, rows: int = 0) -> tuple[Tensor, Tensor]:
    """`attend` as a loop over `rows` rows of the bank at a time (0: what suits the device), without a gradient.

    Its products are `products.times`, so on a CPU this is the kernel `onednn`, too.
    """
    rows = min(rows or _CHUNK.get(query_ND.device.type, _CHUNK_ELSEWHERE), len(bank_KD))
    half = _multiplies_half(query_ND, bank_KD)
    top_N1 = query_ND.new_full((len(query_ND), 1), -math.inf)
    total_N1 = query_ND.new_zeros((len(query_ND), 1))
    mean_ND = torch.zeros_like(query_ND)
    product = _half_product if half else products.times
    for part_CD in bank_KD.split(rows):
        part_CD = part_CD if half else part_CD.to(query_ND.dtype)  # noqa: PLW2901
        near_NC = product(query_ND, part_CD)
        higher_N1 = torch.maximum(top_N1, near_NC.amax(dim=1, keepdim=True))
        shrink_N1 = (top_N1 - higher_N1).exp_()
        near_NC.sub_(higher_N1).exp_()
        total_N1.mul_(shrink_N1).add_(near_NC.sum(dim=1, keepdim=True))
        mean_ND.mul_(shrink_N1).add_(product(near_NC, part_CD.T))
        top_N1 = higher_N1
    return (top_N1 + total_N1.log())[:, 0], mean_ND.div_(total_N1)


def _multiplies_half(query_ND: Tensor, bank_KD: Tensor) -> bool:
    """Whether float16 rows stay so in products: on CUDA, whose units sum such products in float32; a CPU is faster in float32."""
    return bank_KD.is_cuda and bank_KD.dtype == torch.float16 and query_ND.dtype == torch.float32


def _half_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of entries rounded to float16, summed and given back in float32."""
    return torch.mm(left.half(), right.T, out_dtype=torch.float32)


def flash(query_ND: Tensor, bank_KD: Tensor, parts: int = PARTS) -> tuple[Tensor, Tensor]:
    """`attend` by torch's flash attention over `parts` equal parts of the bank at once, without a gradient.

    The rest of the bank, fewer rows than parts, goes through `chunked`. On the CPU the same operator's CPU form runs, which needs
    a bank in the query's format; no rule chooses it there.
    """
    length, features = len(bank_KD) // parts, bank_KD.shape[1]
    whole = bank_KD[: length * parts].view(parts, 1, length, features)
    asked = query_ND.to(bank_KD.dtype).expand(parts, 1, *query_ND.shape).contiguous()
    if bank_KD.is_cuda:
        operator = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001 - the form that returns the log-sum-exp
    else:
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    mean, lse = operator(asked, whole, whole, 0.0, False, scale=1.0)[:2]
    means = mean.reshape(parts, *query_ND.shape).to(query_ND.dtype)
    lses = lse.reshape(parts, len(query_ND)).to(query_ND.dtype)
    if len(bank_KD) > length * parts:
        last = chunked(query_ND, bank_KD[length * parts :])
        lses, means = torch.cat([lses, last[0][None]]), torch.cat([means, last[1][None]])
    return _merged(lses, means)


def by_triton(query_ND: Tensor, bank_KD: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
    """`attend` by nn/bank_triton.py, without a gradient; `splits` is for its `parts`."""
    lses, means = bank_triton.parts(query_ND, bank_KD, splits)
    return _merged(lses.to(query_ND.dtype), means.to(query_ND.dtype))


def _merged(lses_PN: Tensor, means_PND: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over a bank from those over its parts."""
    lse_N = lses_PN.logsumexp(dim=0)
    share_PN = (lses_PN - lse_N).exp()
    return lse_N, torch.einsum("pn,pnd->nd", share_PN, means_PND)


# --- the trial of `triton` ----------------------------------------------------------------------------------------------

# Relative to lse, which is about the largest logit. Both kernels sum in float32, at D = 512 in some 30 steps that may each cut
# off 2^-23: 4e-6. One row of 4,100 too many or too few moves the lse of a flat softmax by 2.4e-4, which is 3e-5 of it.
_LSE_ROOM = 2e-5
# Both round weights to float16, by up to 2^-11 of each: unaveraged 2^-10 of unit rows, and twice that where the mean is short.
_MEAN_ROOM = 2e-3


@cache
def _trial(features: int, device: torch.device) -> str:
    """Why `triton` is not to be used on a device, from sums of 100 queries over 4,100 rows; empty where it is.

    Each query is near one row, the first and the last among them, at temperatures from 1 to 0.01, so that a row too few or too
    many shows. Neither block, tile nor split divides these numbers, and a split has many tiles, as in a run.

    Raises:
        torch.OutOfMemoryError: that says nothing of the kernel.
    """
    draws = torch.Generator().manual_seed(0)
    bank = functional.normalize(torch.randn(4100, features, generator=draws), dim=1)
    noise = torch.randn(100, features, generator=draws) / (2 * features**0.5)
    near = functional.normalize(bank[torch.linspace(0, 4099, 100).long()] + noise, dim=1)
    query, bank = (near / torch.tensor([1, 0.2, 0.05, 0.01]).repeat(25)[:, None]).to(device), bank.half().to(device)
    lse, mean = chunked(query, bank)
    try:
        found = by_triton(query, bank, splits=3)
        apart = float(((found[0] - lse) / lse).abs().max())
        share = float(((found[1] - mean).norm(dim=1) / mean.norm(dim=1)).max())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything
        told = " ".join(str(error).strip().splitlines()[:2])
        return f"{type(error).__name__}: {told[:200]}"
    if apart <= _LSE_ROOM and share <= _MEAN_ROOM:  # NaN is not
        return ""
    return f"wrong by {apart:.1e} of lse and {share:.1e} of the mean"
