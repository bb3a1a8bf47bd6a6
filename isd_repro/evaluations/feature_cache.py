"""Features of a checkpoint in memory-mapped files, computed shard by shard and kept for the next evaluation.

The features of one encoder under one transform of one manifest are in one folder, named after their identity. It holds
`identity.json` and, for each split, `<split>.npy` (float32, N x D) and `<split>.shards` with one line `<number> <sha256>` for
each finished shard. A line is written after the shard's rows have reached the disk, and a shard is valid only as long as its rows
have that hash. A killed extraction therefore continues at the shard on which it was working, and rows are reused only if
everything that they depend on is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from isd_repro.config.reader import fingerprint
from isd_repro.evaluations.features import BLOCK, Images, features
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError

SHARD = 32 * BLOCK  # images
_NOISE = 1e-6  # of a number of a normalised feature
Identity = Mapping[str, object]  # JSON-serialisable; everything except the split on which the rows depend


def stream(
    root: Path,
    encoders: Mapping[str, nn.Module],
    identities: Mapping[str, Identity],
    splits: Mapping[str, tuple[Images, int]],
    device: torch.device,
    on_rows: Callable[[int], object] = lambda images: None,
    on_kept: Callable[[int], object] = lambda images: None,
) -> dict[str, dict[str, Tensor]]:
    """Features of every split under every encoder; each image is read once for all encoders that still lack its features.

    Args:
        root: the folder that holds one folder for each identity.
        encoders: modules B x C x H x W -> B x D by name.
        identities: what the features of each encoder depend on: the file's hash and the encoder's name in it, the manifest's
            hash, the transform and the arithmetic.
        splits: for each split its images and their number.
        device: where the forward pass runs.
        on_rows: called after each group with its number of images.
        on_kept: called with the number of rows that were reused.

    Returns:
        float32 features, N x D, memory-mapped, by split and encoder.

    Raises:
        DataError: features are not finite, or the disk is full.
        UserError: another process writes the same features.
    """
    found: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        folders = {name: stack.enter_context(_folder(root, identity)) for name, identity in identities.items()}
        for split, (images, count) in splits.items():
            kept = {name: _CachedRows(folder, split, count) for name, folder in folders.items()}
            for shard in range(0, max(count, 1), SHARD):
                missing = {name: encoders[name] for name, rows in kept.items() if not rows.has(shard // SHARD)}
                size = min(SHARD, count - shard)
                if not missing:
                    on_kept(size)
                    continue
                made = features(missing, partial(_shifted, images, shard), size, device, on_rows)
                for name, rows in made.items():
                    kept[name].write(shard // SHARD, rows)
            found[split] = {name: rows.tensor() for name, rows in kept.items()}
    return found


def digest(root: Path, identities: Mapping[str, Identity]) -> str:
    """One sha256 over the features of these identities, computed from the encoders' names and the hashes of their shards."""
    hasher = hashlib.sha256()
    for name, identity in sorted(identities.items()):
        for path in sorted((root / fingerprint(identity)).glob("*.shards")):
            hasher.update(f"{name} {path.name}\n".encode())
            hasher.update("".join(f"{shard} {text}\n" for shard, text in sorted(_log(path).items())).encode())
    return hasher.hexdigest()


def same(rows: Tensor) -> bool:
    """Whether all rows (N x D) have the same direction up to float32 rounding, as after a collapse."""
    first = nn.functional.normalize(rows[:1].double(), dim=1)
    return all(bool((nn.functional.normalize(part.double(), dim=1) - first).abs().max() < _NOISE) for part in rows.split(SHARD))


def _shifted(images: Images, first: int, position: Tensor) -> Tensor:
    return images(first + position)


class _CachedRows:
    """One split's rows of one encoder."""

    def __init__(self, folder: Path, split: str, count: int) -> None:
        self._path, self._shards = folder / f"{split}.npy", folder / f"{split}.shards"
        self._count = count
        self._rows = self._open()
        self._done = {} if self._rows is None else self._verified(self._rows)

    def has(self, shard: int) -> bool:
        return shard in self._done

    def write(self, shard: int, rows: Tensor) -> None:
        if self._rows is None:
            self._rows = self._create(rows.shape[1])
        found = np.ascontiguousarray(rows.numpy(), dtype=np.float32)
        with files.naming(self._path), self._path.open("r+b") as file:  # not through a map, which some file systems only read
            file.seek(self._rows.offset + shard * SHARD * self._rows.strides[0])
            file.write(found.data)
            files.sync(file)
        self._done[shard] = _sha256(found)
        with files.naming(self._shards), self._shards.open("ab") as file:
            file.write(f"{shard} {self._done[shard]}\n".encode())
            files.sync(file)

    def tensor(self) -> Tensor:
        """All rows, mapped copy-on-write: writing to them changes no file."""
        return torch.from_numpy(np.load(self._path, mmap_mode="c"))

    def _open(self) -> np.memmap[Any, Any] | None:
        """Rows of an earlier extraction; None where there are none, or not all of the file is there."""
        try:
            rows: np.memmap[Any, Any] = np.load(self._path, mmap_mode="r")  # which a file cut short does not survive
        except (OSError, ValueError, EOFError):
            return None
        return rows if rows.ndim == 2 and len(rows) == self._count and rows.dtype == np.float32 else None

    def _create(self, width: int) -> np.memmap[Any, Any]:
        """A file whose space is taken at once, so that a full disk is met before the work."""
        self._shards.unlink(missing_ok=True)
        size = 4 * self._count * width
        try:
            with self._path.open("wb") as file:
                shape = (self._count, width)
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                file.flush()
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, file.tell() + size)
                else:  # macOS, Windows
                    file.truncate(file.tell() + size)
        except OSError as error:
            self._path.unlink(missing_ok=True)
            hint = f"{files.advice(error)}; ISD_STATE_ROOT can name a folder with room"
            raise DataError(f"{self._path}: no room for {size:,} bytes of features ({error.strerror})", hint) from error
        rows: np.memmap[Any, Any] = np.load(self._path, mmap_mode="r")
        return rows

    def _verified(self, rows: np.memmap[Any, Any]) -> dict[int, str]:
        """Shards whose rows still have the hash that the log says; the log is written anew where it says more."""
        cuts = {shard: (rows[shard * SHARD : (shard + 1) * SHARD], text) for shard, text in _log(self._shards).items()}
        found = {shard: text for shard, (cut, text) in cuts.items() if len(cut) and _sha256(cut) == text}
        files.write_atomic(self._shards, "".join(f"{shard} {text}\n" for shard, text in found.items()).encode())
        return found


def _sha256(rows: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()


def _log(path: Path) -> dict[int, str]:
    """Finished shards and their hashes; a line that a kill cut short is ignored."""
    if not path.is_file():
        return {}
    lines = path.read_text("ascii", errors="replace").splitlines()
    pairs = [line.split(" ") for line in lines]
    return {int(pair[0]): pair[1] for pair in pairs if len(pair) == 2 and pair[0].isdecimal() and len(pair[1]) == 64}


@contextmanager
def _folder(root: Path, identity: Identity) -> Iterator[Path]:
    """The identity's folder, held by this process alone; content of any other identity is thrown away."""
    folder = root / fingerprint(identity)
    with files.exclusive(folder / "lock", f"{folder}: these features are already being extracted"):
        said = folder / "identity.json"
        text = json.dumps(dict(identity), indent=1, sort_keys=True).encode() + b"\n"
        if not said.is_file() or said.read_bytes() != text:
            for path in folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            files.write_atomic(said, text)
        yield folder
