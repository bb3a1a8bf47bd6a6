"""Packed images: one flat uint8 file, memory-mapped, and an index of offsets and sizes.

`store.u8` holds the images one after another, each as channels x height x width. `store.npy` is an int64 table with one
row an image: offset in bytes, height, width, channels. Both are written under a folder that gets its final name only when
complete, so a store that can be opened is whole.

Images are decoded with PIL, converted to grey ("L") or RGB, and resized with PIL's bilinear filter, whose support grows
with the scale (antialiased), without `reducing_gap`. Nothing turns images by their EXIF orientation.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from isd_repro import params
from isd_repro.artifacts import remembered_sha256
from isd_repro.errors import DataError
from isd_repro.params import Frozen

PIXELS = "store.u8"
INDEX = "store.npy"
_AGAIN = "run `prepare` for this subset again"
_MAX_SIDE = 2**20  # pixels; sizes below it multiply without overflow


class StoreInfo(Frozen):
    """What a manifest says of its store: enough to recognise it and to notice damage."""

    settings: params.Store
    images: int
    bytes: int  # length of store.u8
    sha256: str  # of store.u8
    index_sha256: str  # of store.npy

    def key(self, manifest_sha256: str) -> str:
        """Folder name of an external store: equal manifests and settings share one."""
        size = "" if self.settings.size is None else f"-{self.settings.size}"
        return f"{manifest_sha256}-{self.settings.resize}{size}-c{self.settings.channels}"


def convert(image: Image.Image, settings: params.Store) -> npt.NDArray[np.uint8]:
    """One decoded image as the store keeps it.

    Args:
        image: any PIL image.
        settings: `square` gives size x size; `short-side` gives the short side `size` pixels and the long side
            int(size * long / short), as torchvision's Resize does, up or down; `none` keeps the size.

    Returns:
        uint8, channels x height x width.
    """
    image = image.convert("RGB" if settings.channels == 3 else "L")
    if settings.size is not None:
        width, height = image.size
        target = (settings.size, settings.size)
        if settings.resize == "short-side":
            short = min(width, height)
            target = (int(settings.size * width / short), int(settings.size * height / short))
        if target != image.size:
            image = image.resize(target, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


class StoreWriter:
    """Streams images into `folder`; only `finish` makes the index, without which nothing can be opened."""

    def __init__(self, folder: Path, settings: params.Store) -> None:
        self._folder = folder
        self._settings = settings
        self._file = (folder / PIXELS).open("wb")
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int]] = []
        self._offset = 0

    def append(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Add one image, uint8 channels x height x width."""
        channels, height, width = pixels.shape
        content = pixels.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._rows.append((self._offset, height, width, channels))
        self._offset += len(content)

    def finish(self) -> StoreInfo:
        """Flush to the disk, write the index, and describe both."""
        self._file.flush()
        os.fsync(self._file.fileno())
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(self._rows, dtype="<i8").reshape(-1, 4), allow_pickle=False)
        content = buffer.getvalue()
        with (self._folder / INDEX).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return StoreInfo(
            settings=self._settings,
            images=len(self._rows),
            bytes=self._offset,
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(content).hexdigest(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


class Store:
    """Read-only packed images.

    Attributes:
        info: what the manifest says of the store.
        sizes: height and width of every image, int64, N x 2.

    Raises:
        DataError: a file is missing, shorter or longer than the manifest says, or the index is damaged.
    """

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        self.info = info
        self.folder = folder
        rows = _read_index(folder / INDEX, info)
        path = folder / PIXELS
        found = path.stat().st_size if path.is_file() else None
        if found != info.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path}: {state}, the manifest says {info.bytes} bytes", _AGAIN)
        self._rows = rows
        self._flat: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        self.sizes = torch.from_numpy(np.ascontiguousarray(rows[:, 1:3]))
        uniform = bool((rows[:, 1:] == rows[0, 1:]).all())
        self._block = self._flat.reshape(len(rows), rows[0, 3], rows[0, 1], rows[0, 2]) if uniform else None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images at the given positions; smaller ones are zero-padded at the bottom and right.

        Args:
            index: positions, int64, B, in any order, repeats allowed.

        Returns:
            uint8 B x C x H x W, with H and W the largest of the batch, and int64 B x 2 (height, width) of each image.

        Raises:
            IndexError: a position is outside 0..len-1.
        """
        at = index.cpu().numpy()
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"store positions must lie in 0..{len(self) - 1}, found {at.min()}..{at.max()}")
        sizes = self.sizes[torch.from_numpy(at)]
        if self._block is not None:
            return torch.from_numpy(np.array(self._block[at], copy=None, subok=False)), sizes
        height, width = (0, 0) if at.size == 0 else (int(side) for side in sizes.amax(dim=0))
        batch = np.zeros((at.size, self.info.settings.channels, height, width), dtype=np.uint8)
        for row, position in enumerate(at):
            offset, tall, wide, channels = (int(value) for value in self._rows[position])
            batch[row, :, :tall, :wide] = self._flat[offset : offset + channels * tall * wide].reshape(channels, tall, wide)
        return torch.from_numpy(batch), sizes

    def verify(self, memory: Path | None = None) -> None:
        """Hash every byte, or trust the `memory` of an unchanged file; `DataError` where the manifest says another hash."""
        found = remembered_sha256(self.folder / PIXELS, memory)
        if found != self.info.sha256:
            raise DataError(f"{self.folder / PIXELS}: sha256 is {found}, the manifest says {self.info.sha256}", _AGAIN)


def _read_index(path: Path, info: StoreInfo) -> npt.NDArray[np.int64]:
    """The index, checked against the manifest's hash and against itself."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", _AGAIN)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != info.index_sha256:
        raise DataError(f"{path}: damaged: sha256 is {found}, the manifest says {info.index_sha256}", _AGAIN)
    strange = DataError(f"{path}: does not describe {info.images} images of {info.bytes} bytes, as the manifest says", _AGAIN)
    stream = io.BytesIO(content)
    try:  # np.load would make room for whatever number of rows a header claims
        np.lib.format.read_magic(stream)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        if shape != (info.images, 4) or by_columns or dtype != np.dtype("<i8"):
            raise strange
        rows: npt.NDArray[np.int64] = np.frombuffer(content, "<i8", offset=stream.tell()).reshape(shape).astype(np.int64)
    except (ValueError, TypeError, KeyError) as error:
        raise strange from error
    if not len(rows) or not bool(((rows[:, 1:] > 0) & (rows[:, 1:] <= _MAX_SIDE)).all()):
        raise strange
    lengths = rows[:, 1] * rows[:, 2] * rows[:, 3]
    ends = np.cumsum(lengths)
    whole = int(ends[-1]) == info.bytes and bool((rows[:, 0] == ends - lengths).all())
    if not whole or not bool((rows[:, 3] == info.settings.channels).all()) or not _resized(rows, info.settings):
        raise strange
    return rows


def _resized(rows: npt.NDArray[np.int64], settings: params.Store) -> bool:
    """Whether sizes are those that the settings give."""
    if settings.resize == "square":
        return bool((rows[:, 1:3] == settings.size).all())
    return settings.resize == "none" or bool((rows[:, 1:3].min(axis=1) == settings.size).all())
