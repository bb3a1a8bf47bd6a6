"""What `numerics.engine: fast` sets in a run's parts, and what it says of itself (DEV-24).

Levers that give equal bits have no switch: the teacher's average is one in-place operation, its forward records no gradient,
and the loop reads no number from the device between two log lines. `fast` is what gives other last bits.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import nn

from isd_repro.nn.bank import Bank
from isd_repro.nn.bank_attention import kernel_of
from isd_repro.params import Numerics


class Arithmetic(TypedDict):
    """The fields of `Setting` that the engine decides."""

    fast: bool
    bank_dtype: torch.dtype


def setting_of(numerics: Numerics) -> Arithmetic:
    """A float16 bank goes with bf16 networks, whose embeddings have 8 bits anyway; every other bank is float32."""
    fast = numerics.engine == "fast"
    return {"fast": fast, "bank_dtype": torch.float16 if fast and numerics.precision == "bf16" else torch.float32}


def kernels_of(method: nn.Module, numerics: Numerics) -> str:
    """The bank's kernel on the device where a method lies, to stand behind that device's name; empty where nothing was chosen."""
    if numerics.engine != "fast":
        return ""
    banks = [part.rows for part in method.modules() if isinstance(part, Bank)]
    return "".join(f", bank attention {kernel_of(rows)} on {rows.dtype}".replace("torch.", "") for rows in banks)
