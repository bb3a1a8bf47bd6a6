"""Resume points: everything that the next step depends on, in one file that is whole or absent.

Batches are a pure function of (seed, step), so the step stands for every generator.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isd_repro.artifacts import write_atomic
from isd_repro.errors import DataError


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the metrics since the epoch began
    curve: list[dict[str, float]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # source hashes of the processes that trained
    seconds: float = 0.0


def save(path: Path, fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
    """Write a resume point; a reader never sees a part of it."""
    buffer = io.BytesIO()
    state = {
        "fingerprint": fingerprint,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
    }
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, fingerprint: str, method: nn.Module, optimizer: Optimizer, device: torch.device) -> Progress:
    """Restore a resume point in place and return the progress; a fresh `Progress` where there is none.

    Raises:
        DataError: the file is damaged or belongs to another configuration.
    """
    if not path.is_file():
        return Progress()
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
            wrong = archive.testzip()
        if wrong is not None:
            raise zipfile.BadZipFile(f"{wrong} does not have its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: damaged resume point ({error})", "delete it to start this run afresh") from error
    if state["fingerprint"] != fingerprint:
        found = state["fingerprint"]
        raise DataError(f"{path}: belongs to configuration {found}, not {fingerprint}", "delete it to start this run afresh")
    method.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])
