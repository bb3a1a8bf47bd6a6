"""Device and arithmetic of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def best_device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in plain float32 inside the block: no autocast, no TF32, deterministic kernels; restore the settings afterwards."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
