r"""Soft similarities to a bank without a B x K matrix: attention with the bank as keys and as values.

For a query x and bank rows m_j,

    lse(x) = log sum_j exp(x . m_j),    mean(x) = sum_j softmax_j(x . m_j) m_j,    and mean is the gradient of lse.

Both come from one sweep over the bank with a running maximum, so the gradient is known when the forward pass ends and the bank
may be overwritten at once. A temperature is a factor of the query. A loss of any method on a bank is made of these two:
methods/isd.py and methods/moco.py have theirs. The sums of parts of a bank are merged as in flash-decoding (Dao et al., 2023).

The kernel follows from device, number format, D and K, never from a timing:

    cuda from compute capability 8.0, float16 bank, D a multiple of 8 up to 256, K of 4,096 or more:
        `flash`, torch's own attention over parts of the bank that run side by side;
    a CPU, float32 or float16 bank, torch with oneDNN: `onednn`, the loop of `chunked` with oneDNN's products (nn/products.py);
    everything else: `chunked`, a loop of matrix products over rows of the bank.

Shapes: N queries, K bank rows, D embedding.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from isd_repro.nn import products

Kernel = Literal["flash", "onednn", "chunked"]

PARTS = 64  # of the bank in `flash`: one block of queries leaves most of a large GPU idle
_FLASH_D, _FLASH_K = 256, 64 * PARTS
_CHUNK = {"cuda": 16_384}  # rows; a tile of 512 x 16,384 stays in a large GPU's cache
_CHUNK_ELSEWHERE = 1_024  # a tile of 512 x 1,024 float32 is 2 MiB


def kernel_of(bank_KD: Tensor) -> Kernel:
    """What `attend` runs for a bank, by the rule above."""
    rows, features = bank_KD.shape
    fits = features % 8 == 0 and features <= _FLASH_D and rows >= _FLASH_K and bank_KD.dtype == torch.float16
    if fits and bank_KD.is_cuda and torch.cuda.get_device_capability(bank_KD.device) >= (8, 0):
        return "flash"
    asked = bank_KD.new_empty(0, dtype=torch.float64 if bank_KD.dtype == torch.float64 else torch.float32)
    return "onednn" if products.by_onednn(asked) else "chunked"


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
            found = (flash if kernel_of(bank_KD) == "flash" else chunked)(query_ND, bank_KD)
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
    lse_N = lses.logsumexp(dim=0)
    share = (lses - lse_N).exp()
    return lse_N, torch.einsum("pn,pnd->nd", share, means)
