"""Packed images: one flat file, memory-mapped, and an index of offsets and sizes.

`store.u8` holds the images one after another, each as channels x height x width of uint8; a store of JPEGs has `store.jpegs`
in its place, one JPEG file after another. `store.npy` is an int64 table with one row an image: offset in bytes, height,
width, channels, and for JPEGs the length in bytes. All are written under a folder that gets its final name only when
complete, so a store that can be opened is whole.

Images are decoded with PIL, converted to grey ("L") or RGB, and resized with PIL's bilinear filter, whose support grows
with the scale (antialiased), without `reducing_gap`. Nothing turns images by their EXIF orientation. Where the store keeps
JPEGs, they are made of these pixels (`encoding`).  # DEV-23
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isd_repro.config import params
from isd_repro.config.fields import Frozen
from isd_repro.data.encoding import convert as convert  # named here too, for those who read files as a store does
from isd_repro.data.encoding import decode_into, encode
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import remembered_sha256

PIXELS = "store.u8"
JPEGS = "store.jpegs"
INDEX = "store.npy"
_AGAIN = "run `prepare` for this subset again"
_MAX_SIDE = 2**20  # pixels; sizes below it multiply without overflow


class Digest(Protocol):
    """A running hash."""

    def update(self, content: bytes, /) -> None:
        """Go on with these bytes."""

    def hexdigest(self) -> str:
        """Of all so far."""


class StoreInfo(Frozen):
    """What a manifest says of its store: enough to recognise it and to notice damage."""

    settings: params.Store
    images: int
    bytes: int  # length of store.u8 or store.jpegs
    sha256: str  # of that file
    index_sha256: str  # of store.npy

    def key(self, manifest_sha256: str) -> str:
        """Folder name of an external store: equal manifests and settings share one."""
        size = "" if self.settings.size is None else f"-{self.settings.size}"
        jpeg = "" if self.settings.jpeg_quality is None else f"-q{self.settings.jpeg_quality}"
        return f"{manifest_sha256}-{self.settings.resize}{size}-c{self.settings.channels}{jpeg}"


def file_of(settings: params.Store) -> str:
    """Name of the file that holds the images."""
    return PIXELS if settings.jpeg_quality is None else JPEGS


def usable_cores() -> int:
    """Cores for this process: of those that it may use, its share among the processes that `torchrun` started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(share) if share.isdecimal() else 1))


class StoreWriter:
    """Streams images into `folder`; only `finish` makes the index, without which nothing can be opened.

    `rows` (height, width, channels and length of each image) say what the file holds already, and `digest` is over these
    bytes; whatever follows them is cut off.
    """

    def __init__(
        self,
        folder: Path,
        settings: params.Store,
        rows: Sequence[tuple[int, int, int, int]] = (),
        digest: Digest | None = None,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._file = (folder / file_of(settings)).open("r+b" if rows else "wb")
        self._digest = hashlib.sha256() if digest is None else digest
        self._rows: list[tuple[int, ...]] = []
        self.bytes = 0
        for row in rows:
            self._note(*row)
        self._file.truncate(self.bytes)
        self._file.seek(self.bytes)

    def append(self, pixels: npt.NDArray[np.uint8]) -> None:
        """Add one image, uint8 channels x height x width."""
        channels, height, width = pixels.shape
        self.add(encode(pixels, self._settings), height, width, channels)

    def add(self, content: bytes, height: int, width: int, channels: int) -> None:
        """Add one image as `encode` gave it."""
        self._file.write(content)
        self._digest.update(content)
        self._note(height, width, channels, len(content))

    def sync(self) -> str:
        """Bring what there is to the disk; the sha256 of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def finish(self) -> StoreInfo:
        """Flush to the disk, write the index, and describe both."""
        sha256 = self.sync()
        content = index_of(self._rows, self._settings)
        with (self._folder / INDEX).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return StoreInfo(
            settings=self._settings,
            images=len(self._rows),
            bytes=self.bytes,
            sha256=sha256,
            index_sha256=hashlib.sha256(content).hexdigest(),
        )

    def _note(self, height: int, width: int, channels: int, length: int) -> None:
        self._rows.append((self.bytes, height, width, channels, length))
        self.bytes += length

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

    def __init__(self, folder: Path, info: StoreInfo, workers: int | None = None) -> None:
        """Open a store; `workers` threads decode its JPEGs, where it has any: by default `usable_cores`."""
        self.info = info
        self.folder = folder
        self.path = folder / file_of(info.settings)
        rows = _read_index(folder / INDEX, info)
        found = self.path.stat().st_size if self.path.is_file() else None
        if found != info.bytes:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{self.path}: {state}, the manifest says {info.bytes} bytes", _AGAIN)
        self._rows = rows
        self._workers = workers
        self._flat: npt.NDArray[np.uint8] = np.memmap(self.path, dtype=np.uint8, mode="r")
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
        """Images at the given positions; smaller ones are zero-padded at the bottom and right.

        Args:
            index: positions, int64, B, in any order, repeats allowed.
            pinned: into page-locked memory, from which a CUDA device copies by itself.

        Returns:
            uint8 B x C x H x W, with H and W the largest of the batch, and int64 B x 2 (height, width) of each image. Of
            JPEGs the colours of a pixel lie side by side (channels_last); the values are the same for any number of workers.

        Raises:
            IndexError: a position is outside 0..len-1.
            DataError: a JPEG cannot be decoded.
        """
        at = self._checked(index)
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
        for row, position in enumerate(at):
            _, tall, wide, _, *_ = (int(value) for value in self._rows[position])
            pixels[row, :, :tall, :wide] = self._content(int(position)).reshape(channels, tall, wide)
        return batch, sizes

    def payloads(self, index: Tensor) -> list[npt.NDArray[np.uint8]]:
        """What the store keeps of each image, read-only; `IndexError` as `read`."""
        return [self._content(int(position)) for position in self._checked(index)]

    def _checked(self, index: Tensor) -> npt.NDArray[np.int64]:
        at: npt.NDArray[np.int64] = index.cpu().numpy()
        if at.size and (at.min() < 0 or at.max() >= len(self)):
            raise IndexError(f"store positions must lie in 0..{len(self) - 1}, found {at.min()}..{at.max()}")
        return at

    def _content(self, position: int) -> npt.NDArray[np.uint8]:
        offset, height, width, channels, *jpeg = (int(value) for value in self._rows[position])
        return self._flat[offset : offset + (jpeg[0] if jpeg else height * width * channels)]

    def _decode(self, at: npt.NDArray[np.int64], batch: npt.NDArray[np.uint8]) -> None:
        """Decode JPEGs into a batch, B x H x W x C, with zeros beside and below smaller ones."""

        def work(row: int) -> None:
            position = int(at[row])
            tall, wide = (int(side) for side in self._rows[position, 1:3])
            batch[row, tall:] = 0
            batch[row, :tall, wide:] = 0
            try:
                decode_into(self._content(position).tobytes(), batch[row, :tall, :wide])
            except ValueError as error:
                raise DataError(f"{self.path}: image {position} (counted from 0) is damaged: {error}", _AGAIN) from error

        if self._pool is None:
            for row in range(at.size):
                work(row)
        else:
            list(self._pool.map(work, range(at.size)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor | None:
        """Threads that decode, made when first needed; none where one would do it."""
        workers = usable_cores() if self._workers is None else self._workers
        return ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers > 1 else None

    def verify(self, memory: Path | None = None) -> None:
        """Hash every byte, or trust the `memory` of an unchanged file; `DataError` where the manifest says another hash."""
        found = remembered_sha256(self.path, memory)
        if found != self.info.sha256:
            raise DataError(f"{self.path}: sha256 is {found}, the manifest says {self.info.sha256}", _AGAIN)


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
        if shape != (info.images, _columns(info.settings)) or by_columns or dtype != np.dtype("<i8"):
            raise strange
        rows: npt.NDArray[np.int64] = np.frombuffer(content, "<i8", offset=stream.tell()).reshape(shape).astype(np.int64)
    except (ValueError, TypeError, KeyError) as error:
        raise strange from error
    if not len(rows) or not bool(((rows[:, 1:4] > 0) & (rows[:, 1:4] <= _MAX_SIDE)).all()):
        raise strange
    lengths = rows[:, 1] * rows[:, 2] * rows[:, 3] if info.settings.jpeg_quality is None else rows[:, 4]
    if not bool(((lengths > 0) & (lengths <= info.bytes)).all()):
        raise strange
    ends = np.cumsum(lengths)
    whole = int(ends[-1]) == info.bytes and bool((rows[:, 0] == ends - lengths).all())
    if not whole or not bool((rows[:, 3] == info.settings.channels).all()) or not _resized(rows, info.settings):
        raise strange
    return rows


def index_of(rows: Sequence[tuple[int, ...]], settings: params.Store) -> bytes:
    """The index file of a store, from offset, height, width, channels and length of each image."""
    buffer = io.BytesIO()
    table = np.asarray(rows, dtype="<i8").reshape(-1, 5)[:, : _columns(settings)]
    np.save(buffer, np.ascontiguousarray(table), allow_pickle=False)
    return buffer.getvalue()


def _columns(settings: params.Store) -> int:
    """Of the index: only JPEGs need a length."""
    return 4 if settings.jpeg_quality is None else 5


def _resized(rows: npt.NDArray[np.int64], settings: params.Store) -> bool:
    """Whether sizes are those that the settings give."""
    if settings.resize == "square":
        return bool((rows[:, 1:3] == settings.size).all())
    return settings.resize == "none" or bool((rows[:, 1:3].min(axis=1) == settings.size).all())
