"""Training batches as a pure function of (seed, step), whatever the device, the workers, the ranks and the interruptions.

Complete images are copied to the device, as they were packed. Crops are cut from them there, when the views are computed
(`augment`), with windows drawn by the step's generator.  # DEV-15
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from isd_repro.config.params import Data
from isd_repro.data import augment
from isd_repro.data.augment import CHANGES, Change
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store
from isd_repro.interfaces import Batch
from isd_repro.runtime.errors import ConfigError


def generator_of(*key: object) -> Generator:
    """A CPU generator seeded by a tuple such as (seed, "step", 17)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def padded(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Images padded to the largest of these sizes, B x 2: the length of a sum decides how it is rounded."""
    height, width = (int(side) for side in sizes.amax(dim=0))
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.pad(pixels, (0, width - pixels.shape[3], 0, height - pixels.shape[2]))


class Batches:
    """Training batches of one split; every epoch has a new permutation, and an incomplete last batch is dropped."""

    def __init__(
        self,
        store: Store,
        split: Split,
        data: Data,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        changes: tuple[Change, ...] = CHANGES,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raise `ConfigError` if the split does not fill one batch; `changes` is as for `augment.apply`."""
        if len(split.index) < batch_size:
            found = f"{batch_size}, but subset {data.subset!r} has only {len(split.index)} images to train on"
            raise ConfigError(f"optim.batch_size: {found}", "lower batch_size or enlarge the subset")
        self.store, self.split, self.data = store, split, data
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.steps_per_epoch = len(split.index) // batch_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.world, self._changes = world, changes
        self._rows = torch.arange(batch_size).chunk(world)[rank]  # rows of the batch that this rank holds
        self._prefetch = Prefetch(store, lambda step: split.index[self._chosen(step)[self._rows]], device)

    def part(self, rank: int, world: int) -> Batches:
        """The part of these batches that one of `world` ranks has, see `interfaces.Batch`; `batch_size` is a multiple of `world`.

        Each rank draws the random values of the whole batch and computes the views of its own rows, so that all ranks together
        have the same views, bit for bit, as a single process.
        """
        same = (self.store, self.split, self.data, self.batch_size, self.seed, self.device)
        return Batches(*same, changes=self._changes, rank=rank, world=world)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        chosen, data, draws = self._chosen(step), self.data, generator_of(self.seed, "step", step)
        sizes = self.store.sizes[self.split.index[chosen]]
        drawn = [augment.draw(sizes, view, draws) for view in (data.view_student, data.view_teacher)]
        shuffle = torch.randperm(self.batch_size, generator=draws)
        drawn += [augment.draw(sizes, view, draws) for view in data.views_more]
        pixels, _ = self._prefetch.at(step)
        if self.world > 1:
            rows = self._rows
            pixels, drawn, chosen = padded(pixels, sizes), [each.at(rows) for each in drawn], chosen[rows]
        views = []
        for each, settings in zip(drawn, (data.view_student, data.view_teacher, *data.views_more), strict=True):
            images = augment.apply(pixels, each, settings, data.image_size, self._changes)
            views.append(augment.normalise(images, data.mean, data.std))
        index, label, shuffle = (augment.to_device(each, self.device) for each in (chosen, self.split.label[chosen], shuffle))
        return Batch(views[0], views[1], index, label, shuffle, step, tuple(views[2:]))

    def labels_at(self, step: int) -> Tensor:
        """Classes of a step's images, int64, B, in the order of its batch; no image is read."""
        return self.split.label[self._chosen(step)]

    def _chosen(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.split.index), generator=generator_of(self.seed, "epoch", epoch)))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]


_Loaded = tuple[Tensor, Tensor, torch.cuda.Event | None]  # pixels, sizes; on a CUDA device they are complete after the event


class Prefetch:
    """Reads the pixels of one step, and those of the next step in advance.

    While a step computes, one thread reads the next batch (a store of JPEGs has its own decoding threads), and a second stream
    copies it through page-locked memory to a CUDA device. A step's pixels depend only on the step. On a CPU, pixels that need no
    decoding are read when they are requested: this is one copy, and a thread would not make it faster.
    """

    def __init__(self, store: Store, index_of: Callable[[int], Tensor], device: torch.device) -> None:
        """Read nothing yet; `index_of` gives the store positions of a step's images, int64, B, and runs in the thread of `at`."""
        self._store, self._index_of, self._device = store, index_of, device
        self._ahead = device.type == "cuda" or store.keeps_jpegs
        self._next: tuple[int, Future[_Loaded]] | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """As `Store.read`, of the step's images, with the pixels on the device."""
        if not self._ahead:
            pixels, sizes = self._store.read(self._index_of(step))
            return pixels.to(self._device), sizes
        waiting, self._next = self._next, None
        begun = waiting[1] if waiting is not None and waiting[0] == step else self._begin(step)
        pixels, sizes, ready = begun.result()
        self._next = step + 1, self._begin(step + 1)
        if ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready)
            pixels.record_stream(current)
        return pixels, sizes

    def _begin(self, step: int) -> Future[_Loaded]:
        # made here, where "cuda" is this process's device: in a thread that never chose one it is the machine's first
        stream = self._stream if self._device.type == "cuda" else None
        return self._thread.submit(self._load, self._index_of(step), stream)

    def _load(self, index: Tensor, stream: torch.cuda.Stream | None) -> _Loaded:
        if stream is None:
            return *self._store.read(index), None
        with torch.cuda.stream(stream):  # torch keeps the page-locked memory until the copy from it is done
            pixels, sizes = self._store.read(index, pinned=True)
            pixels = pixels.to(self._device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(stream)
        return pixels, sizes, ready

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)
