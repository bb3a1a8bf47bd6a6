"""Encoder files of a run: its last encoders, and those kept on the way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from isd_repro.runtime.files import write_atomic
from isd_repro.tensor_files import save_tensors


def save_encoders(path: Path, encoders: Mapping[str, nn.Module], identity: Mapping[str, Any]) -> None:
    """Write encoders as they are now, tensors named `<encoder>.<name>`, with what the file says of itself."""
    tensors = {f"{which}.{key}": value for which, encoder in encoders.items() for key, value in encoder.state_dict().items()}
    save_tensors(path, "encoder", tensors, {**identity, "encoders": list(encoders)})


def export_snapshots(kept: Path, folder: Path) -> None:
    """Copy the snapshots in `kept` to `folder` and remove all others there; an empty folder where none were kept."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in sorted(kept.glob("*.safetensors"))} if kept.is_dir() else {}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, path in wanted.items():
        write_atomic(folder / name, path.read_bytes())
