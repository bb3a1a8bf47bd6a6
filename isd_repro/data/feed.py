"""Pixels on their way to a training step: read one step ahead, through page-locked memory to a CUDA device.

While a step computes, one thread reads the next batch (a store of JPEGs decodes with threads of its own) and a second stream
copies it, so two batches exist at a time: the one in use and the one after it. What a step gets is a function of the step
alone; reading ahead and the number of threads change no bit. Batches of a store of pixels for a CPU are read when asked for:
that is one copy, and nothing is gained by a thread.

Whole images are fed, with their short side as it was packed. Crops are cut from them where the views are made (`augment`),
with the windows that the step's generator draws.  # DEV-15

Engine `fast` decodes JPEGs by the CUDA device (nvJPEG) where a trial before the first step went well.  # DEV-24
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isd_repro.config.params import Numerics
from isd_repro.data.store import Store
from isd_repro.runtime.errors import DataError, UserError

NOT_DECODED = "JPEGs not decoded"
LEVELS = 8.0  # of 255: up to this mean difference from the CPU's pixels a device's decoder is taken for right, see `try_there`


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
            decode_on_device: the device decodes, as `decode_there`; `decodes_there` and `try_there` say where it may.
        """
        self._store, self._index_of, self._device = store, index_of, device
        self._decode_there = decode_on_device
        self._ahead = device.type == "cuda" or store.keeps_jpegs
        self._next: tuple[int, Future[_Loaded]] | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """As `Store.read`, of the step's images, with the pixels on the device.

        Raises:
            DataError: a JPEG is damaged, or the device fails at it.
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
        # made here, where "cuda" is this process's device: in a thread that never chose one it is the machine's first
        stream = self._stream if self._device.type == "cuda" else None
        return self._thread.submit(self._load, self._index_of(step), stream)

    def _load(self, index: Tensor, stream: torch.cuda.Stream | None) -> _Loaded:
        if stream is None:
            return _Loaded(*(decode_there(self._store, index, self._device) if self._decode_there else self._store.read(index)))
        with torch.cuda.stream(stream):
            if self._decode_there:
                pixels, sizes = decode_there(self._store, index, self._device)
            else:  # torch keeps the page-locked memory until the copy from it is done
                pixels, sizes = self._store.read(index, pinned=True)
                pixels = pixels.to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(stream)
        return _Loaded(pixels, sizes, ready)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="feed")

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)


# --- JPEGs by the device --------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """A batched decoder of JPEGs on a CUDA device."""

    name: str  # for the record: which library and which version of it, since each brings an nvJPEG of its own
    decode: Callable[[list[Tensor], int, torch.device], list[Tensor]]  # files, channels, device -> uint8 C x H x W each


def decodes_there(device: torch.device, numerics: Numerics, store: Store) -> bool:
    """Whether a run's JPEGs are to be decoded by its device: engine `fast`, a CUDA device and a store that keeps JPEGs."""
    return numerics.engine == "fast" and device.type == "cuda" and store.keeps_jpegs


@cache
def decoder() -> Decoder:
    """torchcodec's where it is installed and can be loaded, else torchvision's: the packages decide, and no timing.

    Raises:
        UserError: neither is there.
    """
    try:
        found: Any = importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):  # not installed, or its libraries do not fit this torch
        found = None
    if hasattr(found, "decode_jpeg"):  # from 0.16 on

        def by_torchcodec(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
            images: list[Tensor] = found.decode_jpeg(files, mode="RGB" if channels == 3 else "GRAY", device=device)
            return images

        return Decoder(_named("torchcodec"), by_torchcodec)
    if not hasattr(importlib.import_module("torchvision.io"), "decode_jpeg"):
        raise UserError("this torchvision decodes no JPEGs", "install torchcodec 0.16 or later")
    return Decoder(_named("torchvision"), _by_torchvision)


def _named(package: str) -> str:
    version = getattr(importlib.import_module(package), "__version__", "")
    return f"nvJPEG of {package} {version}".strip()


def _by_torchvision(files: list[Tensor], channels: int, device: torch.device) -> list[Tensor]:
    io: Any = importlib.import_module("torchvision.io")
    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities", category=DeprecationWarning)
    if device.type == "cuda":  # it writes in a stream of its own, and to memory that this one may still copy the last batch from
        torch.cuda.current_stream(device).synchronize()
    images: list[Tensor] = io.decode_jpeg(
        files, mode=io.ImageReadMode.RGB if channels == 3 else io.ImageReadMode.GRAY, device=device
    )
    return images


def decode_there(store: Store, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `Store.read`, decoded by the device. Where that fails no other decoder takes its place: its pixels would differ.

    Raises:
        DataError: a JPEG cannot be decoded or has another size than the index says.
        UserError: there is no such decoder.
    """
    try:
        return _decoded(store, index, device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"{store.path}: cannot be decoded on {device}: {error}", "run `prepare` for this subset again: it checks the pack"
        ) from error


def _decoded(store: Store, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    channels = store.info.settings.channels
    files = [torch.from_numpy(content.copy()) for content in store.payloads(index)]
    images = decoder().decode(files, channels, device)
    sizes = store.sizes[index.cpu()]
    height, width = (int(side) for side in sizes.amax(dim=0))
    batch = torch.zeros((len(files), channels, height, width), dtype=torch.uint8, device=device)
    for row, (image, (tall, wide)) in enumerate(zip(images, sizes.tolist(), strict=True)):
        if tuple(image.shape) != (channels, tall, wide):
            found = f"image {int(index[row])} (counted from 0) shows {tuple(image.shape)}, expected {(channels, tall, wide)}"
            raise ValueError(found)
        batch[row, :, :tall, :wide] = image
    return batch, sizes


def try_there(store: Store, index: Tensor, device: torch.device) -> tuple[str, str]:
    """Decode images on the device and compare them with the CPU's, so that a decoder that fails stops no run.

    Sizes must be equal, pixels nearly: both libraries have nvJPEG repeat the chroma of 4:2:0, which libjpeg-turbo interpolates.
    libjpeg-turbo told not to is 1.3 to 3.6 levels away on two photographs and 5 on the colourful pictures of the tests; swapped
    channels are 17 and more, another image 100 (DEV-24).

    Returns:
        the decoder's name, and why it is not to be used; empty where it is.

    Raises:
        DataError: the CPU cannot decode them either.
    """
    want, sizes = store.read(index)
    name = "nvJPEG"
    try:
        name = decoder().name
        found = _decoded(store, index, device)[0].cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - other people's libraries raise anything
        told = " ".join(str(error).strip().splitlines()[:1])
        return name, f"{type(error).__name__}: {told[:200]}"
    pixels = store.info.settings.channels * int(sizes.prod(dim=1).sum())  # without what pads them
    gap = sum(int((ours.int() - theirs.int()).abs().sum()) for ours, theirs in zip(found, want, strict=True)) / pixels
    return name, "" if gap <= LEVELS else f"its pixels are {gap:.1f} levels from the CPU's on average, more than {LEVELS:g}"
