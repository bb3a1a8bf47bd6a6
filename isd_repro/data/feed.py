"""Pixels on their way to a training step: read one step ahead, through page-locked memory to a CUDA device.

While a step computes, one thread reads the next batch (a store of JPEGs decodes with threads of its own) and a second stream
copies it, so two batches exist at a time: the one in use and the one after it. What a step gets is a function of the step
alone; reading ahead and the number of threads change no bit. Batches of a store of pixels for a CPU are read when asked for:
that is one copy, and nothing is gained by a thread.

Whole images are fed, with their short side as it was packed. Crops are cut from them where the views are made (`augment`),
with the windows that the step's generator draws.  # DEV-15
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from isd_repro.data.store import Store
from isd_repro.errors import DataError, UserError


@dataclass(frozen=True)
class _Loaded:
    """A batch that was read; on a CUDA device it is there when `ready` has happened."""

    pixels: Tensor
    sizes: Tensor
    ready: torch.cuda.Event | None = None


class Feed:
    """Batches of pixels by step."""

    def __init__(
        self, store: Store, index_of: Callable[[int], Tensor], device: torch.device, *, decode_on_device: bool = False
    ) -> None:
        """Nothing is read yet.

        Args:
            store: where images are.
            index_of: positions of a step's images, int64, B; called by the thread that calls `at`.
            device: where pixels are wanted.
            decode_on_device: JPEGs are decoded by a CUDA device (nvJPEG), whose pixels differ from libjpeg-turbo's by some
                levels; nothing else is decoded there.
        """
        self._store, self._index_of, self._device = store, index_of, device
        self._decode_there = decode_on_device and device.type == "cuda" and store.keeps_jpegs
        self._ahead = device.type == "cuda" or store.keeps_jpegs
        self._next: tuple[int, Future[_Loaded]] | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """As `Store.read`, of the step's images, with the pixels on the device.

        Raises:
            DataError: a JPEG is damaged.
            UserError: this torchvision cannot decode on the device.
        """
        if not self._ahead:
            pixels, sizes = self._store.read(self._index_of(step))
            return pixels.to(self._device), sizes
        waiting, self._next = self._next, None
        begun = waiting[1] if waiting is not None and waiting[0] == step else self._begin(step)
        loaded = begun.result()
        self._next = step + 1, self._begin(step + 1)
        if loaded.ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(loaded.ready)
            loaded.pixels.record_stream(current)
        return loaded.pixels, loaded.sizes

    def _begin(self, step: int) -> Future[_Loaded]:
        return self._thread.submit(self._load, self._index_of(step))

    def _load(self, index: Tensor) -> _Loaded:
        if self._device.type != "cuda":
            return _Loaded(*self._store.read(index))
        with torch.cuda.stream(self._stream):
            if self._decode_there:
                pixels, sizes = decode_there(self._store, index, self._device)
            else:  # torch keeps the page-locked memory until the copy from it is done
                pixels, sizes = self._store.read(index, pinned=True)
                pixels = pixels.to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return _Loaded(pixels, sizes, ready)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="feed")

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)


def decode_there(store: Store, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `Store.read`, decoded by a CUDA device through torchvision's nvJPEG.

    The rule is the caller's wish alone: where this torchvision has no such decoder, that is an error, and no other one
    quietly takes its place, for its pixels would differ.

    Raises:
        DataError: a JPEG cannot be decoded or has another size than the index says.
        UserError: this torchvision has no such decoder.
    """
    io: Any = importlib.import_module("torchvision.io")
    if not hasattr(io, "decode_jpeg"):
        raise UserError("this torchvision decodes no JPEGs", "decode on the CPU, or install a torchvision below 0.30")
    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities", category=DeprecationWarning)
    channels = store.info.settings.channels
    mode = io.ImageReadMode.RGB if channels == 3 else io.ImageReadMode.GRAY
    contents = [torch.from_numpy(content.copy()) for content in store.payloads(index)]
    try:
        images = io.decode_jpeg(contents, mode=mode, device=device)
    except RuntimeError as error:
        raise DataError(
            f"{store.path}: cannot be decoded on {device}: {error}", "look at the pack, or decode on the CPU"
        ) from error
    sizes = store.sizes[index.cpu()]
    height, width = (int(side) for side in sizes.amax(dim=0))
    batch = torch.zeros((len(images), channels, height, width), dtype=torch.uint8, device=device)
    for row, (image, (tall, wide)) in enumerate(zip(images, sizes.tolist(), strict=True)):
        if tuple(image.shape) != (channels, tall, wide):
            found = f"image {int(index[row])} (counted from 0) shows {tuple(image.shape)}, expected {(channels, tall, wide)}"
            raise DataError(f"{store.path}: {found}", "run `prepare` for this subset again")
        batch[row, :, :tall, :wide] = image
    return batch, sizes
