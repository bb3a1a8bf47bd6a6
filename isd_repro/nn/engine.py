"""What `numerics.engine: fast` sets in a run's parts, what it compiles, and what it says of itself (DEV-24).

Levers that give equal bits have no switch: the teacher's average is one in-place operation, its forward records no gradient,
and the loop reads no number from the device between two log lines. `fast` is what gives other last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from isd_repro.config.params import Numerics
from isd_repro.nn.bank import Bank
from isd_repro.nn.bank_attention import kernel_of, why_not_triton
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import UserError

NOT_COMPILED = "not compiled"
LEFT_OUT = "triton left out"
Change = Callable[[Tensor, Tensor], Tensor]  # images B x C x S x S, strengths B x 1 x 1 x 1 -> images


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
    return "".join(_kernel_words(part.rows) for part in method.modules() if isinstance(part, Bank))


def _kernel_words(rows_KD: Tensor) -> str:
    why = why_not_triton(rows_KD)
    note = f" ({LEFT_OUT}: {why})" if why else ""
    return f", bank attention {kernel_of(rows_KD)} on {str(rows_KD.dtype).removeprefix('torch.')}{note}"


def complaints(*words: str) -> list[str]:
    """Of what `kernels_of` and `compile_` say, what a run should have had and goes on without."""
    return [each.removeprefix(", ") for each in words if LEFT_OUT in each or NOT_COMPILED in each]


# --- torch.compile --------------------------------------------------------------------------------------------------------


def compiler_of(device: torch.device, numerics: Numerics) -> str:
    """Which backend of torch.compile the encoders and the colours of the views run through; empty: none, they run eagerly.

    The rule: engine `fast`, a CUDA device, one process: networks that exchange messages with other processes have not been tried.
    """
    return "inductor" if numerics.engine == "fast" and device.type == "cuda" and ranks.world() == 1 else ""


def changes_of(changes: tuple[Change, ...], device: torch.device, numerics: Numerics) -> tuple[Change, ...]:
    """The colour operations of the views, compiled where the rule says so; nothing is compiled before the first call.

    Each works on as many images as were drawn for it, so that number is no constant.
    """
    backend = compiler_of(device, numerics)
    if not backend:
        return changes
    try:
        return tuple(torch.compile(each, backend=backend, dynamic=True) for each in changes)
    except Exception:  # noqa: BLE001 - `compile_` meets the same, and says so
        return changes


def compile_(encoders: Mapping[str, nn.Module], views: Callable[[], Tensor], device: torch.device, numerics: Numerics) -> str:
    """Compile encoders in place where the rule says so, and try them, so that a compiler that fails stops no run.

    In place the names of all tensors stay, so checkpoints and exported encoders are those of an eager run. The trial is a pass
    through each encoder over a batch, with its gradient where it has one; BatchNorm's statistics are put back after it. Where
    anything of it fails, this process compiles nothing more and runs eagerly.

    Args:
        encoders: of a method, in training mode.
        views: makes the batch of the trial, B x C x S x S, with the changes of `changes_of`.
        device: where they lie.
        numerics: engine and precision.

    Returns:
        what was done, to stand behind the device's name as of `kernels_of`; empty where the rule compiles nothing.

    Raises:
        UserError: what `views` raises.
    """
    backend = compiler_of(device, numerics)
    if not backend:
        return ""
    torch.compiler.reset()  # a run before this one in this process counts for nothing, nor does its failure
    torch.compiler.set_stance("default")
    before = {name: {key: value.clone() for key, value in each.state_dict().items()} for name, each in encoders.items()}
    why = ""
    try:
        for encoder in encoders.values():
            encoder.compile(backend=backend)
        batch = views()
        for encoder in encoders.values():
            _try(encoder, batch, numerics)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - compilers raise anything
        told = " ".join(str(error).strip().splitlines()[:2])  # a backend's own words are the second line
        why = f"{type(error).__name__}: {told[:200]}"
        torch.compiler.set_stance("force_eager")
    for name, encoder in encoders.items():
        encoder.load_state_dict(before[name])
    return f", {NOT_COMPILED} by {backend} ({why})" if why else f", compiled by {backend}"


def _try(encoder: nn.Module, batch: Tensor, numerics: Numerics) -> None:
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    bf16 = numerics.precision == "bf16"
    with torch.set_grad_enabled(learns), torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=bf16):
        out = encoder(batch)
    if learns:
        out.float().square().mean().backward()
        encoder.zero_grad(set_to_none=True)
