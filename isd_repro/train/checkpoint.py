"""Resume points: everything that the next step depends on, in one file that is whole or absent.

Batches are a pure function of (seed, step), so the step stands for every generator. The resume point before the newest is
kept, and is used where the newest is damaged.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import check_zip, write_atomic
from isd_repro.train import checks

_KEYS = {"fingerprint", "method", "optimizer", "progress"}


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the metrics since the epoch began
    curve: list[dict[str, float]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # source hashes of the processes that trained
    seconds: float = 0.0
    code: dict[str, str] = field(default_factory=dict)  # what made the numbers of the last process, by file
    remarks: list[str] = field(default_factory=list)  # for the record's reader


class Wrong(Exception):
    """A resume point that does not fit; the text says how."""


def previous(path: Path) -> Path:
    """Where the resume point before that at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
    """Write a resume point and keep the one before it; a reader never sees a part of it."""
    write_atomic(path, dump(fingerprint, method, optimizer, progress), keep=previous(path))


def dump(fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: Progress) -> bytes:
    """A resume point's content."""
    buffer = io.BytesIO()
    state = {
        "fingerprint": fingerprint,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(state, buffer)
    return buffer.getvalue()


def load(
    path: Path,
    fingerprint: str,
    method: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    say: Callable[[str], object] = lambda line: None,
) -> Progress:
    """Restore the newest sound resume point in place and return its progress; a fresh `Progress` where there is none.

    Args:
        path: the newest; the one before it is beside it.
        fingerprint: of the run.
        method: takes the state.
        optimizer: takes the state.
        device: where both are.
        say: takes a line where the newest was damaged; it is then put aside, so that no later save overwrites it.

    Raises:
        DataError: no resume point is sound, or the newest belongs to another configuration. No file is touched.
    """
    found = [place for place in (path, previous(path)) if place.is_file()]
    damaged: list[str] = []
    for place in found:
        try:
            progress = _restore(place, fingerprint, method, optimizer, device)
        except Wrong as error:
            damaged.append(f"{place}: damaged resume point ({error})")
            continue
        if damaged:
            aside = _aside(path)
            path.rename(aside)
            say(f"{damaged[0]}; it is kept as {aside.name}, the one before it, of step {progress.step}, is used")
        return progress
    if damaged:
        raise DataError("; ".join(damaged), f"delete {'them' if len(damaged) > 1 else 'it'} to start this run afresh")
    return Progress()


def _aside(path: Path) -> Path:
    """A free name for a damaged file."""
    number = 1
    while (place := path.with_name(f"{path.stem}.damaged{number if number > 1 else ''}{path.suffix}")).exists():
        number += 1
    return place


def _restore(path: Path, fingerprint: str, method: nn.Module, optimizer: Optimizer, device: torch.device) -> Progress:
    return _take(_read(path), path, fingerprint, method, optimizer, device)


def take(content: bytes, fingerprint: str, method: nn.Module, optimizer: Optimizer, device: torch.device) -> Progress:
    """Restore what `dump` gave; `Wrong` or `DataError` where it does not fit."""
    return _take(_read(io.BytesIO(content)), Path("state"), fingerprint, method, optimizer, device)


def _take(state: Any, path: Path, fingerprint: str, method: nn.Module, optimizer: Optimizer, device: torch.device) -> Progress:
    if not isinstance(state, Mapping) or not set(state) >= _KEYS:
        lacking = ", ".join(sorted(_KEYS - set(state))) if isinstance(state, Mapping) else f"it is a {type(state).__name__}"
        raise Wrong(f"not all parts are there: {lacking}")
    if state["fingerprint"] != fingerprint:
        found = state["fingerprint"]
        raise DataError(f"{path}: belongs to configuration {found}, not {fingerprint}", "delete it to start this run afresh")
    try:
        progress = _progress(state["progress"], device)
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        _check_optimizer(optimizer)
        if not checks.is_finite(method):
            raise Wrong("weights or buffers that are not finite")
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise Wrong(" ".join(line.strip() for line in text[:3])) from error
    return progress


def _read(path: Path | io.BytesIO) -> Any:
    """What `torch.save` wrote; on the CPU, so that a full device is not taken for a damaged file."""
    try:
        check_zip(path)
        if isinstance(path, io.BytesIO):
            path.seek(0)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno is not None:  # the disk, not the content
            raise
        raise Wrong(str(error)) from error
    except (pickle.UnpicklingError, MemoryError, RecursionError) as error:
        raise Wrong(f"not readable: {type(error).__name__} {error}"[:300]) from error
    except Exception as error:  # zip and pickle readers raise almost anything on bytes that are not theirs
        raise Wrong(str(error) or type(error).__name__) from error


def _progress(raw: Any, device: torch.device) -> Progress:
    """The progress as it was saved; keys that later versions added may lack."""
    if not isinstance(raw, dict) or not {"step", "sums", "curve", "sources", "seconds"} <= set(raw) <= set(_SOUND):
        found = ", ".join(sorted(map(str, raw))) if isinstance(raw, dict) else type(raw).__name__
        raise Wrong(f"progress holds {found}")
    wrong = [name for name, value in raw.items() if not _SOUND[name](value)]
    if wrong:
        raise Wrong(f"progress: {', '.join(wrong)} not as saved")
    progress = Progress(**raw)
    progress.sums = {name: value.to(device) for name, value in progress.sums.items()}
    return progress


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(good(value) for value in values)


def _dict_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, dict) and all(isinstance(key, str) and good(values[key]) for key in values)


def _text(value: Any) -> bool:
    return isinstance(value, str)


_SOUND: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: type(value) is int and value >= 0,
    "seconds": lambda value: _number(value) and value >= 0,
    "sums": _dict_of(lambda value: isinstance(value, Tensor) and value.shape == ()),
    "curve": _list_of(_dict_of(lambda value: isinstance(value, int | float))),  # a metric beside the loss may be no number
    "sources": _list_of(_text),
    "code": _dict_of(_text),
    "remarks": _list_of(_text),
}


def _check_optimizer(optimizer: Optimizer) -> None:
    """The optimizer takes momenta of any shape without a word."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise Wrong(f"optimizer: {name} of shape {tuple(value.shape)} for a weight of {tuple(parameter.shape)}")
