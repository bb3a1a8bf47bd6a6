"""Packed images: one flat file, memory-mapped, and an index of offsets and sizes.

`store.u8` holds the images one after another, each as channels x height x width of uint8; a store of JPEGs has `store.jpegs`
instead, one JPEG file after another. `store.npy` is an int64 table with one row per image: offset in bytes, height, width,
channels, and for JPEGs the length in bytes. All files are written to a folder that gets its final name only when it is complete,
so a store that can be opened is complete.

Images are decoded with PIL, converted to grey ("L") or RGB, and resized with PIL's bilinear filter, whose support grows with the
scale (antialiased), without `reducing_gap`. The EXIF orientation is ignored. A store of JPEGs keeps these pixels as written by
Pillow's libjpeg-turbo, 4:2:0, with the quality in the settings, and reads them with the same library: equal pixels give equal
bytes if Pillow has the same version of this library.  # DEV-23
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from isd_repro.config import params
from isd_repro.config.fields import Frozen
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import naming, remembered_sha256, sync

Pixels = npt.NDArray[np.uint8]
PIXELS = "store.u8"
JPEGS = "store.jpegs"
INDEX = "store.npy"
_AGAIN = "run `prepare` for this subset again"


class StoreInfo(Frozen):
    """The description of a store in its manifest, by which it is identified and checked for damage."""

    settings: params.StoreSettings
    images: int
    bytes: int  # length of store.u8 or store.jpegs
    sha256: str  # of that file
    index_sha256: str  # of store.npy

    def key(self, manifest_sha256: str) -> str:
        """Folder name of an external store, which is the same for equal manifests and settings."""
        side = "" if self.settings.side is None else f"-{self.settings.side}"
        jpeg = "" if self.settings.jpeg_quality is None else f"-q{self.settings.jpeg_quality}"
        return f"{manifest_sha256}-{self.settings.resize}{side}-c{self.settings.channels}{jpeg}"


def file_of(settings: params.StoreSettings) -> str:
    """Name of the file that holds the images."""
    return PIXELS if settings.jpeg_quality is None else JPEGS


def usable_cores() -> int:
    """Number of cores for this process: those that it may use, divided by the number of processes that `torchrun` started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(share) if share.isdecimal() else 1))


# --- one image --------------------------------------------------------------------------------------------------------


def convert(image: Image.Image, settings: params.StoreSettings) -> Pixels:
    """Convert a decoded image to the form in which the store keeps it.

    Args:
        image: any PIL image.
        settings: `square` gives side x side; `short-side` gives the short side `side` pixels and the long side
            int(side * long / short), as torchvision's Resize does, up or down; `none` keeps the size.

    Returns:
        uint8, channels x height x width.
    """
    image = image.convert("RGB" if settings.channels == 3 else "L")
    if settings.side is not None:
        width, height = image.size
        target = (settings.side, settings.side)
        if settings.resize == "short-side":
            short = min(width, height)
            target = (int(settings.side * width / short), int(settings.side * height / short))
        if target != image.size:
            image = image.resize(target, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


class StoredImage(NamedTuple):
    """One image of a store."""

    height: int
    width: int
    channels: int
    length: int  # bytes in the store's file


def encode(pixels: Pixels, settings: params.StoreSettings) -> tuple[bytes, StoredImage]:
    """The bytes that a store keeps for one image (uint8, channels x height x width), and its row of the index."""
    channels, height, width = pixels.shape
    if settings.jpeg_quality is None:
        content = pixels.tobytes()
    else:
        image = Image.fromarray(pixels[0] if channels == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=settings.jpeg_quality, subsampling="4:2:0")
        content = buffer.getvalue()
    return content, StoredImage(height, width, channels, len(content))


def _decode_into(content: bytes, out: Pixels) -> None:
    """Decode a JPEG of a store into `out`, height x width x channels; `ValueError` if it is damaged or has another shape."""
    try:
        found = np.asarray(Image.open(io.BytesIO(content), formats=("JPEG",)))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    found = found[:, :, None] if found.ndim == 2 else found
    if found.shape != out.shape:
        raise ValueError(f"shows {found.shape}, expected {out.shape} (height, width, channels)")
    out[:] = found


# --- writing ----------------------------------------------------------------------------------------------------------


class StoreWriter:
    """Writes images to `folder` one by one; `finish` writes the index, without which the store cannot be opened.

    `rows` describes the images that the file already contains, and `digest` is the sha256 object over their bytes; anything after
    them is cut off.
    """

    def __init__(
        self, folder: Path, settings: params.StoreSettings, rows: Iterable[StoredImage] = (), digest: Any = None
    ) -> None:
        self._folder, self._settings, self._rows = folder, settings, list(rows)
        self._file = (folder / file_of(settings)).open("r+b" if self._rows else "wb")
        self._digest = digest or hashlib.sha256()
        self._file.truncate(sum(row.length for row in self._rows))
        self._file.seek(0, os.SEEK_END)

    def add(self, content: bytes, row: StoredImage) -> None:
        """Add one image in the form that `encode` returns."""
        self._file.write(content)
        self._digest.update(content)
        self._rows.append(row)

    def sync(self) -> str:
        """Flush everything to the disk; returns the sha256 of the file so far."""
        sync(self._file)
        return str(self._digest.hexdigest())

    def finish(self) -> StoreInfo:
        """Flush to the disk, write the index, and return the description of both."""
        info, content = describe(self._rows, self._settings, self.sync())
        with (self._folder / INDEX).open("wb") as file:
            file.write(content)
            sync(file)
        return info

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def describe(rows: Iterable[StoredImage], settings: params.StoreSettings, sha256: str) -> tuple[StoreInfo, bytes]:
    """The manifest's description of a store whose file has this hash, and the content of the store's index."""
    table = np.array([[0, *row] for row in rows], dtype="<i8").reshape(-1, 5)
    ends = table[:, 4].cumsum()
    table[:, 0] = ends - table[:, 4]
    buffer = io.BytesIO()
    columns = 4 if settings.jpeg_quality is None else 5  # only JPEGs need a length
    np.save(buffer, np.ascontiguousarray(table[:, :columns]), allow_pickle=False)
    index = buffer.getvalue()
    size = int(ends[-1]) if len(ends) else 0
    digest = hashlib.sha256(index).hexdigest()
    return StoreInfo(settings=settings, images=len(table), bytes=size, sha256=sha256, index_sha256=digest), index


# --- reading ----------------------------------------------------------------------------------------------------------


class Store:
    """Read-only packed images.

    Attributes:
        info: the manifest's description of the store.
        sizes: height and width of every image, int64, N x 2.

    Raises:
        DataError: a file is missing, shorter or longer than the manifest says, or the index is damaged.
    """

    def __init__(self, folder: Path, info: StoreInfo, workers: int | None = None) -> None:
        """Open a store; `workers` threads decode its JPEGs, if it has any; the default is `usable_cores`."""
        self.info, self.folder, self._workers = info, folder, workers
        self.path = folder / file_of(info.settings)
        self._rows = rows = _read_index(folder / INDEX, info)
        found = self.path.stat().st_size if self.path.is_file() else None
        if found != info.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{self.path}: {state}, but the manifest says {info.bytes} bytes", _AGAIN)
        with naming(self.path):
            self._flat: Pixels = np.memmap(self.path, dtype=np.uint8, mode="r")
        self.sizes = torch.from_numpy(np.ascontiguousarray(rows[:, 1:3]))
        uniform = bool((rows[:, 1:4] == rows[0, 1:4]).all()) and not self.keeps_jpegs
        self._block = self._flat.reshape(len(rows), rows[0, 3], rows[0, 1], rows[0, 2]) if uniform else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keeps_jpegs(self) -> bool:
        """Whether reading decodes."""
        return self.info.settings.jpeg_quality is not None

    def read(self, index: Tensor, *, pinned: bool = False) -> tuple[Tensor, Tensor]:
        """Read the images at the given positions; smaller images are zero-padded at the bottom and right.

        Args:
            index: positions, int64, B, in any order, possibly repeated.
            pinned: read into page-locked memory, from which copies to a CUDA device are asynchronous.

        Returns:
            uint8, B x C x H x W, with H and W the largest of the batch, and int64, B x 2, (height, width) of each image. Batches
            of JPEGs are in channels_last format; the values do not depend on the number of workers.

        Raises:
            IndexError: a position is outside 0..len-1.
            DataError: a JPEG cannot be decoded.
        """
        at: npt.NDArray[np.int64] = index.cpu().numpy()
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"store positions must lie in 0..{len(self) - 1}, found {at.min()}..{at.max()}")
        sizes = self.sizes[torch.from_numpy(at)]
        channels = self.info.settings.channels
        height, width = (0, 0) if at.size == 0 else (int(side) for side in sizes.amax(dim=0))
        if self.keeps_jpegs:
            batch = torch.empty((at.size, height, width, channels), dtype=torch.uint8, pin_memory=pinned)
            self._decode(at, batch.numpy())
            return batch.permute(0, 3, 1, 2), sizes
        if self._block is not None:
            found = torch.from_numpy(np.array(self._block[at], copy=None, subok=False))
            return (found.pin_memory() if pinned else found), sizes
        batch = torch.zeros((at.size, channels, height, width), dtype=torch.uint8, pin_memory=pinned)
        pixels = batch.numpy()
        for row, (position, (tall, wide)) in enumerate(zip(at.tolist(), sizes.tolist(), strict=True)):
            pixels[row, :, :tall, :wide] = self._content(position).reshape(channels, tall, wide)
        return batch, sizes

    def _content(self, position: int) -> Pixels:
        offset, height, width, channels, *jpeg = (int(value) for value in self._rows[position])
        return self._flat[offset : offset + (jpeg[0] if jpeg else height * width * channels)]

    def _decode(self, at: npt.NDArray[np.int64], batch: Pixels) -> None:
        """Decode JPEGs into a batch, B x H x W x C, with zeros to the right of smaller images and below them."""

        def work(row: int) -> None:
            position = int(at[row])
            tall, wide = (int(side) for side in self._rows[position, 1:3])
            batch[row, tall:] = 0
            batch[row, :tall, wide:] = 0
            try:
                _decode_into(self._content(position).tobytes(), batch[row, :tall, :wide])
            except ValueError as error:
                raise DataError(f"{self.path}: image {position} (counted from 0) is damaged: {error}", _AGAIN) from error

        list((self._pool.map if self._pool else map)(work, range(at.size)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor | None:
        """The decoding threads, created when they are first needed; None if one thread is enough."""
        workers = usable_cores() if self._workers is None else self._workers
        return ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers > 1 else None

    def verify(self, memory: Path | None = None) -> None:
        """Hash every byte, or use the hash in `memory` if the file is unchanged; `DataError` if the manifest states another."""
        found = remembered_sha256(self.path, memory)
        if found != self.info.sha256:
            raise DataError(f"{self.path}: sha256 is {found}, but the manifest says {self.info.sha256}", _AGAIN)


def _read_index(path: Path, info: StoreInfo) -> npt.NDArray[np.int64]:
    """The index, checked against the manifest's hash."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", _AGAIN)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != info.index_sha256:
        raise DataError(f"{path}: damaged: sha256 is {found}, but the manifest says {info.index_sha256}", _AGAIN)
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False), dtype=np.int64)
