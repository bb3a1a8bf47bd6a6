"""Images for an encoder under evaluation: normalised float batches from a packed store or from a folder of files.

Both readers give the same pixels for the same images, and therefore the same bits.

Images of one batch are padded to a common size. If that would take more than `PADDED` bytes, which happens for no packed profile,
the batch is computed in parts, whose boundaries depend only on its images. On a CPU, large images and images of different sizes
are read and resized one by one for the evaluation view, without padding: this is faster, no image's bits depend on the other
images, and the progress bar moves with every image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.config.params import View
from isd_repro.data import augment
from isd_repro.data.loader import generator_of, padded
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store
from isd_repro.runtime import ranks

_AHEAD = 256  # images announced to the reader
PADDED = 2**28  # bytes of a padded uint8 batch; as floats it is four times that
LARGE = 2**14  # pixels; for smaller images the products of `augment.centre` cost less than the calls of `_centre_large`
_RED, _GREEN, _BLUE, _ROUND = 19595, 38470, 7471, 32768  # PIL's weights of "L", in 65536ths

T = TypeVar("T")
Images = Callable[[Tensor], Tensor]  # positions in a split, int64, B -> B x C x S x S


class Reader(Protocol):
    """Reads images by position.

    Attributes:
        sizes: height and width of every image, int64, N x 2.
        channels: 1 or 3; number of channels of every batch that `read` returns.
    """

    sizes: Tensor
    channels: int

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As `Store.read`."""

    def ahead(self, index: Tensor) -> None:
        """Announce the positions that will be read next; this affects speed only."""


class ViewSettings(Protocol):
    """How an evaluation augments its training images.

    Attributes:
        batch_size: images of a step.
        crop_min: smallest share of an image's area that a crop takes.
        flip: probability of a horizontal flip.
        seed: of the order and of every draw.
    """

    @property
    def batch_size(self) -> int: ...  # noqa: D102 - the class says it

    @property
    def crop_min(self) -> float: ...  # noqa: D102

    @property
    def flip(self) -> float: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102


class StoreReader:
    """A packed store, read as grey or as RGB."""

    def __init__(self, store: Store, channels: int | None = None) -> None:
        self.sizes = store.sizes
        self.channels = store.info.settings.channels if channels is None else channels
        self._store = store

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As `Store.read`, with this reader's number of channels."""
        pixels, sizes = self._store.read(index)
        return as_channels(pixels, self.channels), sizes

    def ahead(self, index: Tensor) -> None:
        """Nothing to prepare: the store is memory-mapped."""


class Ahead(Generic[T]):
    """Work on positions in threads, started before its results are requested."""

    def __init__(self, work: Callable[[int], T], pool: ThreadPoolExecutor) -> None:
        self._work, self._pool = work, pool
        self._waiting: dict[int, Future[T]] = {}

    def begin(self, positions: Iterable[int]) -> None:
        """Start the work on positions that is not yet under way."""
        for at in positions:
            if at not in self._waiting:
                self._waiting[at] = self._pool.submit(self._work, at)

    def keep(self, positions: Collection[int]) -> None:
        """Drop the results of all other positions."""
        for at in self._waiting.keys() - set(positions):
            self._waiting.pop(at).cancel()

    def take(self, positions: Iterable[int]) -> dict[int, T]:
        """Return the results by position, and drop them."""
        wanted = dict.fromkeys(positions)  # the last block may repeat its last image
        self.begin(wanted)
        return {at: self._waiting.pop(at).result() for at in wanted}


def as_channels(pixels: Tensor, channels: int) -> Tensor:
    """Convert grey to RGB by repetition, or RGB to grey exactly as PIL does (ITU-R 601 luma in integers).

    Args:
        pixels: uint8, B x 1 or 3 x H x W.
        channels: 1 or 3.
    """
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1).contiguous()
    red, green, blue = pixels.to(torch.int32).unbind(1)
    return ((red * _RED + green * _GREEN + blue * _BLUE + _ROUND) >> 16).to(torch.uint8)[:, None]


@dataclass(frozen=True)
class Frame:
    """Size, crop and normalisation of images in evaluation (the released Resize 256 and CenterCrop 224 are 224 and 0.875).

    Attributes:
        size: side of the square window in pixels.
        crop_ratio: the short side is first resized to size / crop_ratio.
        mean, std: of each channel, on the scale 0..1.
    """

    size: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def short_side(self) -> int:
        """Length in pixels to which the short side is resized, up or down."""
        return max(self.size, round(self.size / self.crop_ratio))


def centred(
    reader: Reader,
    index: Tensor,
    frame: Frame,
    device: torch.device,
    on_views: Callable[[int], object] = lambda images: None,
) -> Images:
    """A function from positions in a split to the normalised evaluation views of these images.

    Args:
        reader: reads the pixels.
        index: the split's positions in the reader, int64, n.
        frame: size, crop and normalisation.
        device: where the views are computed.
        on_views: called with the number of images whose views are finished; large images take more time here than in the encoder.
    """
    sizes = reader.sizes[index]
    alone = device.type == "cpu" and bool((sizes.prod(dim=1) >= LARGE).any() or (sizes != sizes[:1]).any())

    def images(position: Tensor) -> Tensor:
        chosen = index[position]
        following = position[-1] + 1 + torch.arange(_AHEAD)
        found: list[Tensor] = []
        for part in chosen.split(1) if alone else [chosen[cut] for cut in parts(reader.sizes[chosen], reader.channels)]:
            pixels, sizes = reader.read(part)
            done = sum(map(len, found)) + len(part)
            reader.ahead(torch.cat([chosen[done:], index[following[following < len(index)]]]))
            if alone and sizes.prod() >= LARGE:
                views = _centre_large(pixels, frame)
            else:
                views = augment.centre(augment.to_device(pixels, device), sizes, frame.size, frame.crop_ratio)  # DEV-28
            found.append(augment.normalise(views, frame.mean, frame.std))
            on_views(len(part))
        return found[0] if len(found) == 1 else torch.cat(found)

    return images


def _centre_large(pixels: Tensor, frame: Frame) -> Tensor:
    """`augment.centre` of one image (uint8, 1 x C x H x W) with torch's own float32 resize, which does not multiply by zeros."""
    short = min(pixels.shape[2:])
    resized = [frame.short_side if side == short else int(frame.short_side * side / short) for side in pixels.shape[2:]]
    images = functional.interpolate(pixels.float().div_(255), resized, mode="bilinear", antialias=True)
    top, left = (round((side - frame.size) / 2) for side in resized)
    return images[..., top : top + frame.size, left : left + frame.size]


def order(count: int, settings: ViewSettings, epoch: int) -> Sequence[Tensor]:
    """Positions of each batch of one epoch of the linear protocol: every position once, a function of (seed, epoch)."""
    shuffled = torch.randperm(count, generator=generator_of(settings.seed, "linear", epoch))
    return list(shuffled.split(settings.batch_size))


def augmented(
    reader: Reader, split: Split, frame: Frame, settings: ViewSettings, device: torch.device
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Batches of randomly cropped and flipped images with their labels, a pure function of (seed, epoch).

    With several ranks, each computes the views of its own `ranks.rows` of a batch, with the same bits as alone, and has all
    labels.
    """
    crop_and_flip = View(crop_min=settings.crop_min, crop_max=1.0, flip=settings.flip)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = order(len(split), settings, epoch)
        for step, batch in enumerate(chosen):
            following = chosen[step + 1] if step + 1 < len(chosen) else batch[:0]
            following = split.index[following[ranks.rows(len(following))]]
            index = split.index[batch]
            sizes = reader.sizes[index]
            # All windows are drawn first, so parts and ranks change no draw.
            crop = augment.draw_crop(sizes, crop_and_flip, generator_of(settings.seed, "linear", epoch, step))
            mine, found = ranks.rows(len(index)), []
            for part in parts(sizes, reader.channels):
                at = mine[(mine >= part.start) & (mine < part.stop)]
                if len(at):
                    pixels, _ = reader.read(index[at])
                    reader.ahead(torch.cat([index[mine[mine >= part.stop]], following]))
                    pixels = augment.to_device(padded(pixels, sizes[part]), device)
                    found.append(augment.resample(pixels, crop.at(at), frame.size))
            views = found[0] if len(found) == 1 else torch.cat(found)
            yield augment.normalise(views, frame.mean, frame.std), split.label[batch]

    return batches


def parts(sizes: Tensor, channels: int) -> list[slice]:
    """Split a batch into consecutive parts whose padded form takes at most `PADDED` bytes; a larger image is a part of its own.

    Args:
        sizes: height and width of each image, int64, B x 2.
        channels: of each image.
    """
    tallest, widest = sizes.amax(dim=0).tolist() if len(sizes) else (0, 0)
    if len(sizes) * channels * tallest * widest <= PADDED:
        return [slice(0, len(sizes))]
    found, start, high, wide = [], 0, 0, 0
    for at, (height, width) in enumerate(sizes.tolist()):
        high, wide = max(high, height), max(wide, width)
        if at > start and (at + 1 - start) * channels * high * wide > PADDED:
            found.append(slice(start, at))
            start, high, wide = at, height, width
    return [*found, slice(start, len(sizes))]
