"""Accounts for every tensor of a checkpoint, and finds every difference between an encoder and its architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class TensorUse:
    """How one tensor is used.

    Attributes:
        key: its name in the file, or the name that it should have.
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
    """Where the tensors of one encoder and of its architecture part: torchvision's names with shapes."""

    missing: Mapping[str, tuple[int, ...]]
    surplus: Mapping[str, tuple[int, ...]]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # found, expected

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.misshapen)


def compare(found: Mapping[str, Entry], expected: Mapping[str, Tensor]) -> Differences:
    """Tensors of a file against those of an architecture; BatchNorm's counters may be absent."""
    have = {name: tuple(entry.tensor.shape) for name, entry in found.items()}
    want = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return Differences(
        missing={name: shape for name, shape in want.items() if name not in have and not name.endswith(_COUNTER)},
        surplus={name: shape for name, shape in have.items() if name not in want},
        misshapen={name: (have[name], want[name]) for name in want if name in have and have[name] != want[name]},
    )


def problems(differences: Differences, prefix: str) -> list[str]:
    """One sentence for each kind of difference, with the file's prefix before the names."""
    surplus, by_shape = dict(differences.surplus), dict[tuple[int, ...], list[str]]()
    for name, shape in reversed(list(differences.missing.items())):
        by_shape.setdefault(shape, []).append(name)
    renamed = []
    for name, shape in differences.surplus.items():
        if by_shape.get(shape):
            renamed.append(f"{prefix}{name} {shape} where {prefix}{by_shape[shape].pop()} is expected")
            del surplus[name]
    lost = {name for names in by_shape.values() for name in names}
    missing = {name: shape for name, shape in differences.missing.items() if name in lost}
    sentences = {
        "renamed": renamed,
        "missing": [f"{prefix}{name}, expected {shape}" for name, shape in missing.items()],
        "surplus": [f"{prefix}{name} {shape}" for name, shape in surplus.items()],
        "of another shape": [
            f"{prefix}{name} is {found}, expected {wanted}" for name, (found, wanted) in differences.misshapen.items()
        ],
    }
    return [
        f"{len(items)} tensor{'s' if len(items) > 1 else ''} {kind}: {'; '.join(items[:_SHOWN])}"
        + (f"; and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
        for kind, items in sentences.items()
        if items
    ]


def refuse(where: str, arch: str, found: list[str]) -> DataError:
    """The error for an encoder that is not its architecture."""
    hints = {
        "renamed": "rename the tensor; names must be those of torchvision's ResNet",
        "missing": "the file is incomplete or has another architecture; missing tensors are never filled in",
        "surplus": "if these are heads that the features do not pass through, leave them out with --drop-unknown; parts of the "
        "ResNet itself are never left out",
        "of another shape": "the tensor belongs to another architecture",
    }
    hint = next(hints[kind] for kind in hints if any(f" {kind}: " in sentence for sentence in found))
    return DataError(f"{where}, {arch}: {'. '.join(found)}", hint)


def float32(tensors: Mapping[str, Entry], where: str) -> dict[str, Tensor]:
    """Weights as dense float32 of their own memory, counters as int64.

    Raises:
        DataError: a weight is not float16, bfloat16, float32 or float64, has values that are not finite, or is a negative
            variance.
    """
    result = {}
    for name, entry in tensors.items():
        if name.endswith(_COUNTER):
            result[name] = entry.tensor.detach().to(torch.int64).clone()
            continue
        if entry.tensor.dtype not in _DTYPES:
            raise DataError(
                f"{where}: {entry.key} is {_dtype(entry.tensor)}, expected float16, bfloat16, float32 or float64",
                "no ResNet has complex weights"
                if entry.tensor.is_complex()
                else "quantised weights cannot be read; use the original checkpoint",
            )
        value = torch.empty(entry.tensor.shape, dtype=torch.float32).copy_(entry.tensor.detach())
        if not bool(value.sum().isfinite()) and (bad := int((~value.isfinite()).sum())):
            raise DataError(
                f"{where}: {bad} of {value.numel()} values of {entry.key} are NaN or infinite",
                "the training diverged or the file is damaged; use an earlier checkpoint",
            )
        if name.endswith(".running_var") and bool((value < 0).any()):
            raise DataError(
                f"{where}: {int((value < 0).sum())} of {value.numel()} values of {entry.key} are negative; a variance cannot be",
                "the file is damaged or was edited; download or copy it again",
            )
        result[name] = value
    return result


def marked(
    rows: list[TensorUse], tensors: Mapping[str, Entry], differences: Differences, encoder: str, prefix: str
) -> list[TensorUse]:
    """The rows with an encoder's differences in them."""
    marks = {tensors[name].key: "surplus" for name in differences.surplus}
    marks |= {tensors[name].key: "other shape" for name in differences.misshapen}
    missing = differences.missing.items()
    return [replace(row, use=marks.get(row.key, row.use)) for row in rows] + [
        TensorUse(f"{prefix}{name}", shape, "float32", "missing", encoder) for name, shape in missing
    ]


def conversions(parsed: Parsed, used: Mapping[str, Collection[str]]) -> list[str]:
    """Notes on the weights used: precisions other than float32, and values that processors are slow with."""
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
    """What became of every tensor, for the encoders wanted; `used` holds torchvision's names by the encoder they stand under."""
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
