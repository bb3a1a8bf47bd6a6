"""Load backbones from this project's encoder files and account for every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Many, Pixels, Positive
from isd_repro.config.params import BackboneConfig
from isd_repro.nn.backbones import build
from isd_repro.runtime.errors import DataError
from isd_repro.tensor_files import load_tensors

_HINT = "the file was written by another version or for another backbone; run `pretrain` again"


class EncoderIdentity(Frozen):
    """The part of an encoder file's header that evaluation needs; other keys are allowed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    run: str
    manifest: str  # sha256 of the images it was trained on
    backbone: BackboneConfig
    image_size: Pixels
    crop_ratio: Annotated[float, Field(gt=0, le=1)]
    mean: Many[float]
    std: Many[Positive]
    encoders: Annotated[Many[Literal["student", "teacher"]], Field(min_length=1)]


def load_encoders(path: Path) -> tuple[dict[str, nn.Module], EncoderIdentity]:
    """Read an encoder file.

    Returns:
        the backbones by name, in eval mode on the CPU, and the file's identity.

    Raises:
        DataError: the file is missing or damaged, a value of its identity is missing or wrong, or its tensors are not exactly
            those of its backbone; the message lists every missing or unexpected tensor and every wrong shape or dtype.
    """
    tensors, header = load_tensors(path, "encoder")
    try:
        identity = EncoderIdentity.model_validate(header)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(f"{path}: its header is not that of an encoder: {problems}", _HINT) from error
    with torch.random.fork_rng():  # the draw of initial weights, all of them replaced, leaves no trace
        encoders: dict[str, nn.Module] = {name: build(identity.backbone, identity.image_size) for name in identity.encoders}
    expected = {f"{name}.{key}": value for name, encoder in encoders.items() for key, value in encoder.state_dict().items()}
    _account(path, tensors, expected)
    for name, encoder in encoders.items():
        encoder.load_state_dict({key: tensors[f"{name}.{key}"] for key in encoder.state_dict()}, strict=True)
        encoder.eval().requires_grad_(False)
    return encoders, identity


def check_manifest(path: Path, recorded: str, prepared: str, folder: Path | None = None) -> None:
    """Raise `DataError` if the file at `path` was made from other images than those in `folder`; both manifests by sha256."""
    if recorded != prepared:
        raise DataError(
            f"{path}: manifest changed since it was made: made with {recorded[:12]}, {folder or 'the prepared subset'} has"
            f" {prepared[:12]}",
            "restore or prepare that subset again; if its images have changed, run `pretrain` and all later stages again",
        )


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
        raise DataError(f"{path}: {len(problems)} tensors do not fit the backbone: {'; '.join(problems)}", _HINT)
