"""Products of float32 matrices on a CPU by oneDNN, which torch otherwise keeps for convolutions.

torch gives `mm` to its BLAS, which is MKL on x86. MKL uses the wide vector units of its maker's CPUs alone; oneDNN asks the CPU
what it can do. The rule is the device and the format, never a timing: a CPU, float32, and a torch that was built with oneDNN.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_onednn() -> bool:
    """Whether this torch has oneDNN and the operator that reaches it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself (AVX512_BF16 or AMX); elsewhere it is emulated, slower than float32."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return has_onednn() and any(ask() for ask in asked if ask)


def by_onednn(left: Tensor) -> bool:
    """Whether `times` of this matrix is oneDNN's, by the rule above."""
    return left.device.type == "cpu" and left.dtype == torch.float32 and has_onednn()


def times(left_NI: Tensor, right_MI: Tensor) -> Tensor:
    """left @ right.T, N x M, of two matrices of one format on one device; no gradient passes."""
    if not by_onednn(left_NI):
        return torch.mm(left_NI, right_MI.T)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left_NI, right_MI, None, "none", [], "")  # noqa: SLF001 - the one way in
    return found
