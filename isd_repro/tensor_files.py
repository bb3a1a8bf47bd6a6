"""Encoder and feature files: safetensors with a JSON identity in the header, written atomically.

They contain no time and no machine, so equal results give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isd_repro.config.fields import Frozen, Many, Pixels, Positive, problems
from isd_repro.config.params import BackboneConfig
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import naming, write_atomic

FORMAT = 1
KEY = "isd_repro"
_DIGEST = "content_sha256"


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


def encoder_identity(path: Path, header: Mapping[str, Any]) -> EncoderIdentity:
    """The identity in the header of an encoder file; `DataError` names every value that is missing or wrong."""
    try:
        return EncoderIdentity.model_validate(header)
    except ValidationError as error:
        hint = "the file was written by another version or for another backbone; run `pretrain` again"
        raise DataError(f"{path}: its header is not that of an encoder: {problems(error)}", hint) from error


def save_tensors(
    path: Path, kind: Literal["encoder", "features"], tensors: Mapping[str, Tensor], identity: Mapping[str, Any]
) -> None:
    """Write named tensors and their identity; equal input gives equal bytes."""
    said = {"format": FORMAT, "kind": kind, **identity}
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    text = json.dumps({**said, _DIGEST: _digest(said, ordered)}, sort_keys=True, allow_nan=False)
    write_atomic(path, save(ordered, metadata={KEY: text}))


def _digest(identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over an identity and over name, type, shape and bytes of every tensor: safetensors itself has no checksum."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(path: Path, kind: Literal["encoder", "features"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: the file is missing, damaged, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that writes it; `dvc repro` runs every stage that is needed")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            with naming(path):
                raise
        raise DataError(f"{path}: damaged or not a safetensors file ({error})", "delete it and run its stage again") from error
    return tensors, identified(path, kind, metadata, tensors)


def identified(
    path: Path, kind: Literal["encoder", "features"], metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The identity in a file's metadata; `DataError` if it is missing or does not belong to the tensors."""
    try:
        identity = json.loads(metadata.get(KEY) or "null")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: damaged or not a safetensors file ({error})", "delete it and run its stage again") from error
    identity = identity if isinstance(identity, dict) else {}
    if identity.get("kind") != kind or identity.get("format") != FORMAT:
        found = f"kind {identity.get('kind')!r} format {identity.get('format')!r}" if identity else "no identity"
        raise DataError(f"{path}: expected kind {kind!r} format {FORMAT}, found {found}", "delete it and run its stage again")
    stated = identity.pop(_DIGEST, None)  # absent in files from before there was one
    if stated is not None and stated != _digest(identity, tensors):
        raise DataError(
            f"{path}: damaged: the hash of its content is not the hash in its header", "delete it and run its stage again"
        )
    return identity
