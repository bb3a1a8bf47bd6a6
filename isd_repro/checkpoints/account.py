"""Accounts for every tensor of a checkpoint, and finds every difference between an encoder and its architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from isd_repro.checkpoints.layouts import Entry, Parsed
from isd_repro.runtime.errors import DataError

_SHOWN = 8
_SUBNORMAL = 1000  # one in so many subnormal weights is worth a word
_SAMPLED = 16  # of so many weights of a tensor one is looked at before all are
_TINY = torch.finfo(torch.float32).tiny
_DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_COUNTER = "num_batches_tracked"  # absent in files from before torch 0.4.1, and without effect in evaluation
_HINTS = {  # kinds of differences and what to do about each
    "renamed": "rename the tensor; names must be those of torchvision's ResNet",
    "missing": "the file is incomplete or has another architecture; missing tensors are never filled in",
    "surplus": "if these are heads that the features do not pass through, leave them out with --drop-unknown; parts of the "
    "ResNet itself are never left out",
    "of another shape": "the tensor belongs to another architecture",
}


@dataclass(frozen=True)
class TensorUse:
    """How one tensor is used.

    Attributes:
        key: its name in the file, or the expected name.
        use: "used", "other encoder", "head dropped", "dropped", "bank", "counter", "optimizer" or "not used"; in an
            inspection also "missing", "surplus" and "other shape".
        encoder: "student", "teacher" or "".
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    use: str
    encoder: str


@dataclass(frozen=True)
class Differences:
    """How the tensors of an encoder differ from its architecture: a sentence, a hint, and uses by key for an inspection."""

    words: str
    hint: str
    marks: Mapping[str, str]
    missing: tuple[TensorUse, ...]


def compare(found: Mapping[str, Entry], expected: Mapping[str, Tensor], encoder: str, prefix: str) -> Differences | None:
    """Compare a file's tensors with those of an architecture; BatchNorm's counters may be absent. `prefix` is the file's."""
    have = {name: tuple(entry.tensor.shape) for name, entry in found.items()}
    want = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    missing = {name: shape for name, shape in want.items() if name not in have and not name.endswith(_COUNTER)}
    surplus = {name: shape for name, shape in have.items() if name not in want}
    misshapen = [name for name in want if name in have and have[name] != want[name]]
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, shape in reversed(missing.items()):
        by_shape.setdefault(shape, []).append(name)
    pairs = {name: by_shape[shape].pop() for name, shape in surplus.items() if by_shape.get(shape)}
    lost = [name for name in missing if name not in pairs.values()]
    kinds = {
        "renamed": [f"{prefix}{name} {surplus[name]} where {prefix}{old} is expected" for name, old in pairs.items()],
        "missing": [f"{prefix}{name}, expected {missing[name]}" for name in lost],
        "surplus": [f"{prefix}{name} {shape}" for name, shape in surplus.items() if name not in pairs],
        "of another shape": [f"{prefix}{name} is {have[name]}, expected {want[name]}" for name in misshapen],
    }
    said = {
        kind: f"{len(items)} tensor{'s' if len(items) > 1 else ''} {kind}: {'; '.join(items[:_SHOWN])}"
        + (f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
        for kind, items in kinds.items()
        if items
    }
    if not said:
        return None
    marks = {found[name].key: "surplus" for name in surplus} | {found[name].key: "other shape" for name in misshapen}
    rows = (TensorUse(f"{prefix}{name}", shape, "float32", "missing", encoder) for name, shape in missing.items())
    return Differences(". ".join(said.values()), _HINTS[next(iter(said))], marks, tuple(rows))


def float32(tensors: Mapping[str, Entry], where: str) -> dict[str, Tensor]:
    """Copy weights to dense float32 tensors, and counters to int64.

    Raises:
        DataError: a weight is not float16, bfloat16, float32 or float64, has values that are not finite, or is a variance with
            negative values.
    """
    result = {}
    for name, entry in tensors.items():
        if name.endswith(_COUNTER):
            result[name] = entry.tensor.detach().to(torch.int64).clone()
            continue
        if entry.tensor.dtype not in _DTYPES:
            found = f"{entry.key} is {_dtype(entry.tensor)}, expected float16, bfloat16, float32 or float64"
            quantised = "quantised weights cannot be read; use the original checkpoint"
            raise DataError(f"{where}: {found}", "no ResNet has complex weights" if entry.tensor.is_complex() else quantised)
        value = torch.empty(entry.tensor.shape, dtype=torch.float32).copy_(entry.tensor.detach())
        checks = [(~torch.isfinite(value), "NaN or infinite", "the training diverged or the file is damaged; use an earlier one")]
        if name.endswith(".running_var"):
            checks.append((value < 0, "negative; a variance cannot be", "the file is damaged or was edited; copy it again"))
        for mask, what, hint in checks:
            if bool(mask.any()):
                raise DataError(f"{where}: {int(mask.sum())} of {value.numel()} values of {entry.key} are {what}", hint)
        result[name] = value
    return result


def conversions(parsed: Parsed, used: Mapping[str, Collection[str]]) -> list[str]:
    """Notes on the weights that are used: precisions other than float32, and denormal values, which make processors slow."""
    mine = [entry for entry in parsed.entries if entry.use == "backbone" and entry.name in used.get(entry.encoder, ())]
    taken = [entry.tensor for entry in mine if entry.tensor.dtype in _DTYPES]
    kinds = {_dtype(tensor) for tensor in taken} - {"float32"}
    notes = [f"weights are {kind} in the file and were converted to float32" for kind in sorted(kinds)]
    small = sum(_subnormal(tensor) for tensor in taken if _subnormal(tensor.flatten()[::_SAMPLED]))
    if small > sum(tensor.numel() for tensor in taken) // _SUBNORMAL:
        notes.append(f"{small:,} weights are subnormal (below {_TINY:.1e}), which slows processors down up to 50 times")
    return notes


def _subnormal(tensor: Tensor) -> int:
    return int(((tensor < _TINY) & (tensor > -_TINY)).count_nonzero() - (tensor == 0).count_nonzero())


def uses(parsed: Parsed, wanted: Collection[str], used: Mapping[str, Collection[str]]) -> list[TensorUse]:
    """The use of every tensor for the requested encoders; `used` holds the torchvision names that each encoder uses."""
    rows = []
    for entry in parsed.entries:
        use = entry.use
        if use == "backbone" and entry.name in used.get(entry.encoder, ()):
            use = "used"
        elif use in {"backbone", "counter"} and entry.encoder not in wanted:
            use = "other encoder"
        elif use == "backbone":
            use = "not used"
        rows.append(row(entry, use))
    return rows


def row(entry: Entry, use: str) -> TensorUse:
    """One line of the account."""
    return TensorUse(entry.key, tuple(entry.tensor.shape), _dtype(entry.tensor), use, entry.encoder)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
