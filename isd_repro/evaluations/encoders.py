"""Load backbones from this project's encoder files and account for every tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from isd_repro.nn.backbones import build
from isd_repro.runtime.errors import DataError
from isd_repro.tensor_files import EncoderIdentity, encoder_identity, load_tensors


def load_encoders(path: Path) -> tuple[dict[str, nn.Module], EncoderIdentity]:
    """Read an encoder file.

    Returns:
        the backbones by name, in eval mode on the CPU, and the file's identity.

    Raises:
        DataError: the file is missing or damaged, a value of its identity is missing or wrong, or its tensors are not exactly
            those of its backbone; the message lists every missing or unexpected tensor and every wrong shape or dtype.
    """
    tensors, header = load_tensors(path, "encoder")
    identity = encoder_identity(path, header)
    with torch.random.fork_rng():  # the draw of initial weights, all of them replaced, leaves no trace
        encoders: dict[str, nn.Module] = {name: build(identity.backbone, identity.image_size) for name in identity.encoders}
    _account(path, tensors, {f"{name}.{key}": value for name, net in encoders.items() for key, value in net.state_dict().items()})
    for name, encoder in encoders.items():
        encoder.load_state_dict({key: tensors[f"{name}.{key}"] for key in encoder.state_dict()}, strict=True)
        encoder.eval().requires_grad_(False)
    return encoders, identity


def check_manifest(path: Path, recorded: str, prepared: str, folder: Path | None = None) -> None:
    """Raise `DataError` if the file at `path` was made from other images than those in `folder`; both manifests by sha256."""
    if recorded != prepared:
        found = f"made with {recorded[:12]}, {folder or 'the prepared subset'} has {prepared[:12]}"
        hint = "restore or prepare that subset again; if its images have changed, run `pretrain` and all later stages again"
        raise DataError(f"{path}: manifest changed since it was made: {found}", hint)


def check_run(path: Path, said: str, run: str) -> None:
    """Raise `DataError` if the file at `path` belongs to another run, as after a copy from that run's folder."""
    if said != run:
        raise DataError(f"{path}: belongs to run {said!r}, not {run!r}", "run `pretrain` and all later stages for this run")


def _account(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    def form(tensor: Tensor) -> str:
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

    problems = [f"missing {key}" for key in sorted(expected.keys() - tensors.keys())]
    problems += [f"unmatched {key}" for key in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{key} is {form(tensors[key])}, expected {form(expected[key])}"
        for key in sorted(expected.keys() & tensors.keys())
        if form(tensors[key]) != form(expected[key])
    ]
    if problems:
        hint = "the file was written by another version or for another backbone; run `pretrain` again"
        raise DataError(f"{path}: {len(problems)} tensors do not fit the backbone: {'; '.join(problems)}", hint)
