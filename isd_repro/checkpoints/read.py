"""Safe reading: recognises a file by its bytes and reads its tensors. No code in a file is ever run.

A pickle is examined first (`outline`) and refused if it contains more than tensors and plain values. Only then does torch's
restricted unpickler (`weights_only=True`) load it.
"""

from __future__ import annotations

import argparse
import codecs
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
_STATE = "save the module's state_dict() with torch.save and use that file"
_EXPORT = "export the weights as safetensors under torchvision's names (docs/checkpoints.md shows the lines)"
# First bytes of what people hand over by mistake: (offset, bytes, what it is, what to do).
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (0, b"BZh", "a bzip2 archive", "unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (257, b"ustar", "a tar archive", "unpack it first; a checkpoint from before torch 0.4 must be saved again with a later one"),
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
    """A pickle was not loaded; `outline` describes its content, and `sha256` and `size` are those of its file."""

    def __init__(self, message: str, outline: Outline) -> None:
        super().__init__(message, CONVERT)
        self.outline, self.sha256, self.size = outline, "", 0


def read(path: Path) -> Raw:
    """Read a file of any supported form.

    Raises:
        Refused: opening the file would run code.
        DataError: there is no such file, its format is not supported, it is damaged, or its content is implausibly large.
    """
    content, metadata = b"", dict[str, str]()
    try:
        content = _content(path)
        if content[:4] == b"PK\x03\x04":
            form, tree = "torch", _torch_archive(content)
        elif _is_safetensors(content[:9]):
            form, (tree, metadata) = "safetensors", _safetensors(content)
        else:
            form, tree = "torch legacy", _torch_load(content, content)
        for place, _ in tensors_in(tree):
            if not place.isprintable():
                said = f"a tensor's name cannot be shown: {ascii(place)[:200]}"
                raise DataError(said, "a tensor's name must consist of visible characters")
    except DataError as error:
        error.message = f"{path}: {error.message}"
        error.args = (error.message,)
        if isinstance(error, Refused):
            error.sha256, error.size = hashlib.sha256(content).hexdigest(), len(content)
        raise
    header = identified(path, "encoder", metadata, tree) if KEY in metadata else None
    return Raw(path, hashlib.sha256(content).hexdigest(), len(content), form, tree, header)


def _content(path: Path) -> bytes:
    """All bytes of the file, read once, so that the hashed bytes are the parsed ones even if the file changes meanwhile."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:  # noqa: PTH123 - a pipe must not block
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise DataError("a pipe or a device, not a file", f"write it to disk first; expected {_FORMATS}")
            if before.st_size == 0:
                raise DataError("empty file", "the copy or download failed; fetch it again")
            head = file.read(4096)
            if head[:4] != b"PK\x03\x04" and not _is_safetensors(head[:9]) and head[:1] != b"\x80":
                raise _unknown(head)
            file.seek(0)
            content = file.readall()
            after = os.fstat(file.fileno())
    except IsADirectoryError as error:
        raise DataError("a directory, not a file", f"give a file inside it; expected {_FORMATS}") from error
    except FileNotFoundError as error:
        what = "a link to a file that does not exist" if path.is_symlink() else "no such file"
        raise DataError(what, f"expected {_FORMATS}") from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", f"expected {_FORMATS}") from error
    if len(content) != before.st_size or _state(before) != _state(after):
        raise DataError("changed while it was being read", "wait until it has been written completely, then run again")
    return content


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header, 8 bytes little-endian, and with JSON; text has no byte 0."""
    return head[8:9] == b"{" and 0 in head[:8]


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def tensors_in(tree: Any) -> Iterator[tuple[str, Tensor]]:
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
            said = f"more than {MAX_TENSORS:,} tensors, {MAX_NODES:,} values or {MAX_DEPTH} levels"
            raise DataError(f"absurd content: {said}", "no ResNet checkpoint looks like this; do not trust the file")


def _safetensors(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata; every tensor must lie inside the file before anything is allocated for it."""
    size = len(content)
    (length,) = struct.unpack("<Q", content[:8])
    if length > size - 8:
        raise DataError(f"truncated safetensors file: its header has {length:,} bytes and the file {size:,}", "fetch it again")
    if length > MAX_HEADER:
        raise DataError(f"absurd header: {length:,} bytes, at most {MAX_HEADER:,} are read", "do not trust the file")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise DataError(f"damaged safetensors header ({error})", "fetch it again") from error
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise DataError(f"absurd header: {len(header):,} tensors, at most {MAX_TENSORS:,} are read", "do not trust the file")
    try:
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length:
                said = f"{name} {tuple(entry['shape'])} ends at byte {last:,} of {size - 8 - length:,}"
                raise DataError(f"truncated safetensors file: {said}", "fetch it again")
        return safetensors.torch.load(content), metadata
    except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"damaged safetensors file ({error})", "fetch it again") from error


def _torch_archive(content: bytes) -> dict[str, Any]:
    size = len(content)
    try:
        infos = zip_entries(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise DataError(f"truncated or damaged torch archive ({error})", "fetch it again") from error
    names = {info.filename.partition("/")[2]: info for info in infos}
    if "constants.pkl" in names:
        raise DataError("a TorchScript archive, which holds code", _STATE)
    if "data.pkl" not in names:
        raise _other_zip([info.filename for info in infos])
    unpacked = sum(info.file_size for info in infos)
    if unpacked > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        said = f"{unpacked:,} bytes inside a file of {size:,}; torch never compresses"
        raise DataError(f"absurd archive: {said}", "do not trust the file")
    if len(infos) > 2 * MAX_TENSORS or names["data.pkl"].file_size > MAX_PICKLE:
        said = f"{len(infos):,} entries, structure of {names['data.pkl'].file_size:,} bytes"
        raise DataError(f"absurd archive: {said}", "do not trust the file")
    try:
        check_zip(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        hint = "fetch it again; a file that torch wrote without checksums must be saved again with them"
        raise DataError(f"damaged torch archive: {error}", hint) from error
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return _torch_load(content, archive.read(names["data.pkl"]))


def _other_zip(names: list[str]) -> DataError:
    """Describe a zip archive that `torch.save` did not write: its format, or its content."""
    if any(name.endswith(".npy") for name in names):
        return DataError("a NumPy archive (.npz)", _EXPORT)
    if any(re.search(r"(?:^|/)(?:serialized_exported_program\.json|archive_format)$", name) for name in names):
        return DataError("a program of torch.export (.pt2)", _STATE)
    inside = next((name for name in names if name.endswith((".pth", ".pt", ".ckpt", ".tar", ".safetensors"))), "")
    shown = one_line(", ".join(names[:4])) or "nothing"
    hint = f"unpack it and give {one_line(inside)}" if inside else f"expected {_FORMATS}"
    return DataError(f"a zip archive that torch.save did not write; it holds {shown}", hint)


def _torch_load(content: bytes, payload: bytes) -> dict[str, Any]:
    """Load `payload`, the part of the file that begins with a pickle, after examining what the pickle imports."""
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
            raise DataError(f"truncated or damaged torch checkpoint ({reason})", "fetch it again") from error
        problem = f"the restricted unpickler stopped ({reason})"
    if problem:
        raise Refused(f"refused: {problem}; only tensors and plain values are loaded, and nothing of it was run", outline)
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, dict):
        raise DataError(f"holds a {type(found).__name__}, expected a dict of tensors", CONVERT)
    tree = {str(key): value for key, value in found.items()}
    if len(tree) < len(found):
        twice = next(key for key, count in Counter(map(str, found)).items() if count > 1)
        raise DataError(f"two keys are both written {one_line(twice)!r}", "rename one of them and save the file again")
    for place, tensor in tensors_in(tree):
        shown = f"{place} {tuple(tensor.shape)}"
        if tensor.is_meta:
            hint = "the model was saved before its weights were loaded; load them and save it again"
            raise DataError(f"{shown} has a shape but no values (torch's meta device)", hint)
        if tensor.layout is not torch.strided or tensor.numel() * tensor.element_size() > len(content):
            said = f"{shown} {tensor.dtype} is sparse or larger than the file of {len(content):,} bytes"
            raise DataError(f"absurd tensor: {said}", "no ResNet checkpoint contains such a tensor; do not trust the file")
    return tree


def _unknown(head: bytes) -> DataError:
    for offset, magic, name, hint in _OTHERS:
        if head[offset : offset + len(magic)] == magic:
            return DataError(name, hint)
    if re.match(rb"\x08[\x01-\x14][\x12\x1a:B]", head):
        hint = "ONNX files use their own names; use the checkpoint from which it was exported"
        return DataError("looks like an ONNX model", hint)
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) and _is_utf8(head):
        if b'"weight_map"' in head:
            return DataError("the index of a checkpoint in several files", "merge the files into one with safetensors")
        kind = "a web page" if head.lstrip()[:1] == b"<" else "a text file"
        return DataError(f"{kind}, not a checkpoint", f"the download failed or it is the wrong file; expected {_FORMATS}")
    return DataError(f"unknown file format (first bytes {head[:8].hex(' ')})", f"expected {_FORMATS}")


def _is_utf8(head: bytes) -> bool:
    """Whether the first bytes of a file, cut off anywhere, are UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
