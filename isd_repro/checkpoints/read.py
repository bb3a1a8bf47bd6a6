"""Safe reading: recognises a file by its bytes and reads its tensors. No code in a file is ever run.

A pickle is looked at first (`outline`): what it asks for beyond tensors and plain values is refused. Only then does torch's
restricted unpickler (`weights_only=True`) load it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from isd_repro.checkpoints.outline import Outline
from isd_repro.runtime.archives import check_zip, zip_entries
from isd_repro.runtime.errors import DataError, one_line
from isd_repro.tensor_files import KEY, identified

MAX_TENSORS = 10_000  # a ResNet-101 with teacher and optimizer has under 3,000
MAX_HEADER = 4 * 2**20  # bytes of a safetensors header; 10,000 tensors have 2 MB
MAX_NODES = 1_000_000  # containers and values of a pickle, so that one that repeats itself ends
MAX_DEPTH = 24
MAX_PICKLE = 64 * 2**20  # bytes of a torch archive's structure, weights excluded

_FORMATS = "a torch checkpoint (.pt, .pth, .tar, .ckpt) or a safetensors file"
CONVERT = (
    "if you trust its origin, open it with the software that wrote it, in an environment that holds nothing of value, "
    "save its state dict alone with safetensors.torch.save_file, and give that file here (docs/checkpoints.md shows the lines)"
)
_EXPORT = "export the weights as safetensors under torchvision's names (docs/checkpoints.md shows the lines)"
# First bytes of what people hand over by mistake: (offset, bytes, what it is, what to do).
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (
        257,
        b"ustar",
        "a tar archive",
        "unpack it first; a checkpoint from before torch 0.4 must be saved again with a later torch",
    ),
    (0, b"\x89HDF", "an HDF5 file (Keras?)", _EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", _EXPORT),
    (0, b"GGUF", "a GGUF file", "ResNets are not stored in this format; use a torch or safetensors checkpoint"),
)


@dataclass(frozen=True)
class Raw:
    """The content of a file, before any check."""

    path: Path
    sha256: str
    size: int  # bytes
    form: str  # "safetensors", "torch" or "torch legacy"
    tree: dict[str, Any]  # containers as saved; for safetensors one flat dict of tensors
    header: dict[str, Any] | None  # our encoder files' identity


class Refused(DataError):
    """A pickle that is not loaded; `outline` says what it holds, and `sha256` and `size` are of its file."""

    def __init__(self, message: str, outline: Outline) -> None:
        super().__init__(message, CONVERT)
        self.outline, self.sha256, self.size = outline, "", 0


def read(path: Path) -> Raw:
    """Read a file of any supported form.

    Raises:
        Refused: opening it needs code.
        DataError: there is no such file, it is none of the supported forms, damaged, or absurdly large inside.
    """
    content = _content(path)
    header = None
    try:
        if content[:4] == b"PK\x03\x04":
            form, tree = "torch", _torch_archive(path, content)
        elif _is_safetensors(content[:9]):
            form, (tree, header) = "safetensors", _safetensors(path, content)
        else:
            form, tree = "torch legacy", _torch_load(path, content, content)
    except Refused as error:
        error.sha256, error.size = hashlib.sha256(content).hexdigest(), len(content)
        raise
    for place, _ in tensors_in(tree, path):
        if not place.isprintable():
            raise DataError(
                f"{path}: a tensor's name cannot be shown: {ascii(place)[:200]}",
                "a tensor's name must consist of visible characters",
            )
    return Raw(path, hashlib.sha256(content).hexdigest(), len(content), form, tree, header)


def _content(path: Path) -> bytes:
    """All bytes, read once: what is hashed is what is parsed, whatever becomes of the file meanwhile."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:  # noqa: PTH123 - a pipe must not block
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                what = "a pipe or a device, not a file"
                raise DataError(f"{path}: {what}", f"write it to disk first; expected {_FORMATS}")
            if before.st_size == 0:
                raise DataError(f"{path}: empty file", "the copy or download failed; fetch it again")
            head = file.read(4096)
            if head[:4] != b"PK\x03\x04" and not _is_safetensors(head[:9]) and head[:1] != b"\x80":
                raise _unknown(path, head)
            file.seek(0)
            content = file.readall()
            after = os.fstat(file.fileno())
    except IsADirectoryError as error:
        raise DataError(f"{path}: a directory, not a file", f"give a file inside it; expected {_FORMATS}") from error
    except FileNotFoundError as error:
        what = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise DataError(f"{path}: {what}", f"expected {_FORMATS}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", f"expected {_FORMATS}") from error
    if len(content) != before.st_size or _state(before) != _state(after):
        raise DataError(f"{path}: changed while it was being read", "wait until it has been written completely, then run again")
    return content


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header, 8 bytes little-endian, and with JSON; text has no byte 0."""
    return head[8:9] == b"{" and 0 in head[:8]


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def tensors_in(tree: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor below a container with its place ("optimizer/state/0/momentum_buffer"), in the file's order.

    Raises:
        DataError: more tensors, values or levels than any checkpoint has.
    """
    stack: list[tuple[str, Any, int]] = [("", tree, 0)]
    tensors = nodes = 0
    while stack:
        place, value, depth = stack.pop()
        nodes += 1
        if isinstance(value, Tensor):
            tensors += 1
            yield place, value
        elif isinstance(value, argparse.Namespace):
            stack.append((place, vars(value), depth))
        elif isinstance(value, dict | list | tuple):
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            stack += [(f"{place}/{key}" if place else str(key), item, depth + 1) for key, item in reversed(items)]
        if tensors > MAX_TENSORS or nodes + len(stack) > MAX_NODES or depth > MAX_DEPTH:
            raise DataError(
                f"{path}: absurd content: more than {MAX_TENSORS:,} tensors, {MAX_NODES:,} values or {MAX_DEPTH} levels",
                "no ResNet checkpoint looks like this; do not trust the file",
            )


def _safetensors(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, Any] | None]:
    size = len(content)
    (length,) = struct.unpack("<Q", content[:8])
    if length > size - 8:
        raise DataError(
            f"{path}: truncated safetensors file: its header has {length:,} bytes and the file {size:,}", "fetch it again"
        )
    if length > MAX_HEADER:
        raise DataError(f"{path}: absurd header: {length:,} bytes, at most {MAX_HEADER:,} are read", "do not trust the file")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged safetensors header ({error})", "fetch it again") from error
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise DataError(
            f"{path}: absurd header: {len(header):,} tensors, at most {MAX_TENSORS:,} are read", "do not trust the file"
        )
    try:
        _check_safetensors(path, header, size - 8 - length)
        tensors: dict[str, Any] = safetensors.torch.load(content)
        return tensors, identified(path, "encoder", metadata, tensors) if KEY in metadata else None
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged safetensors file ({error})", "fetch it again") from error


def _check_safetensors(path: Path, header: dict[str, Any], data: int) -> None:
    """Every tensor lies inside the file, before anything is allocated for it."""
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= data:
            raise DataError(
                f"{path}: truncated safetensors file: {name} {tuple(entry['shape'])} ends at byte {last:,} of {data:,}",
                "fetch it again",
            )


def _torch_archive(path: Path, content: bytes) -> dict[str, Any]:
    size = len(content)
    try:
        infos = zip_entries(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: truncated or damaged torch archive ({error})", "fetch it again") from error
    names = {info.filename.partition("/")[2]: info for info in infos}
    if "constants.pkl" in names:
        raise DataError(
            f"{path}: a TorchScript archive, which holds code", "save the module's state_dict() with torch.save and use that file"
        )
    if "data.pkl" not in names:
        raise _other_zip(path, [info.filename for info in infos])
    unpacked = sum(info.file_size for info in infos)
    if unpacked > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise DataError(
            f"{path}: absurd archive: {unpacked:,} bytes inside a file of {size:,}; torch never compresses",
            "do not trust the file",
        )
    if len(infos) > 2 * MAX_TENSORS or names["data.pkl"].file_size > MAX_PICKLE:
        raise DataError(
            f"{path}: absurd archive: {len(infos):,} entries, structure of {names['data.pkl'].file_size:,} bytes",
            "do not trust the file",
        )
    try:
        check_zip(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        hint = "fetch it again; a file that torch wrote without checksums must be saved again with them"
        raise DataError(f"{path}: damaged torch archive: {error}", hint) from error
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        payload = archive.read(names["data.pkl"])
    return _torch_load(path, content, payload)


def _other_zip(path: Path, names: list[str]) -> DataError:
    """A zip archive that `torch.save` did not write: what it is, or what lies in it."""
    if any(name.endswith(".npy") for name in names):
        return DataError(f"{path}: a NumPy archive (.npz)", _EXPORT)
    if any(re.search(r"(?:^|/)(?:serialized_exported_program\.json|archive_format)$", name) for name in names):
        return DataError(
            f"{path}: a program of torch.export (.pt2)", "save the module's state_dict() with torch.save and use that file"
        )
    inside = next((name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".tar", ".safetensors"))), "")
    shown = one_line(", ".join(names[:4])) or "nothing"
    hint = f"unpack it and give {one_line(inside)}" if inside else f"expected {_FORMATS}"
    return DataError(f"{path}: a zip archive that torch.save did not write; it holds {shown}", hint)


def _torch_load(path: Path, content: bytes, payload: bytes) -> dict[str, Any]:
    """`payload` is the part of the file that begins with a pickle; what it asks for is looked at before anything is loaded."""
    outline, found = None, None
    try:
        outline = Outline(payload, len(content))
        problem = outline.problem
        if not problem:
            with torch.serialization.safe_globals([argparse.Namespace, *outline.stands]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols and old storages
                found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # damaged bytes fail anywhere in a reader, with any exception
        lines = str(error).partition("WeightsUnpickler error:")[2] or str(error) or type(error).__name__
        reason = one_line(" ".join(lines.split()))
        if outline is None or not isinstance(error, pickle.UnpicklingError):
            raise DataError(f"{path}: truncated or damaged torch checkpoint ({reason})", "fetch it again") from error
        problem = f"the restricted unpickler stopped ({reason})"
    if problem:
        words = "only tensors and plain values are loaded, and nothing of it was run"
        raise Refused(f"{path}: refused: {problem}; {words}", outline)
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}, expected a dict of tensors", CONVERT)
    tree = {str(key): value for key, value in found.items()}
    if len(tree) < len(found):
        twice = next(key for key, count in Counter(map(str, found)).items() if count > 1)
        raise DataError(f"{path}: two keys are both written {one_line(twice)!r}", "rename one of them and save the file again")
    for place, tensor in tensors_in(tree, path):
        if tensor.is_meta:
            raise DataError(
                f"{path}: {place} {tuple(tensor.shape)} has a shape but no values (torch's meta device)",
                "the model was saved before its weights were loaded; load them and save it again",
            )
        if tensor.layout is not torch.strided or tensor.numel() * tensor.element_size() > len(content):
            raise DataError(
                f"{path}: absurd tensor: {place} {tuple(tensor.shape)} {tensor.dtype} is sparse or larger than the file of "
                f"{len(content):,} bytes",
                "no ResNet checkpoint contains such a tensor; do not trust the file",
            )
    return tree


def _unknown(path: Path, head: bytes) -> DataError:
    for offset, magic, name, hint in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            return DataError(f"{path}: {name}", hint)
    if re.match(rb"\x08[\x01-\x14][\x12\x1a:B]", head):
        return DataError(
            f"{path}: looks like an ONNX model",
            "ONNX files use their own names; use the checkpoint from which it was exported",
        )
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) and _is_utf8(head):
        if b'"weight_map"' in head:
            return DataError(f"{path}: the index of a checkpoint in several files", "merge the files into one with safetensors")
        kind = "a web page" if head.lstrip()[:1] == b"<" else "a text file"
        return DataError(f"{path}: {kind}, not a checkpoint", f"the download failed or it is the wrong file; expected {_FORMATS}")
    return DataError(f"{path}: unknown file format (first bytes {head[:8].hex(' ')})", f"expected {_FORMATS}")


def _is_utf8(head: bytes) -> bool:
    try:
        head[: len(head) - 3 if len(head) == 4096 else None].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 8 and len(head) == 4096
    return True
