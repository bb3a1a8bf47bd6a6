"""Batches as a pure function of (seed, step): the same on resume, on any device and with any number of workers."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator, Tensor

from isd_repro.data import augment
from isd_repro.data.feed import Feed
from isd_repro.data.prepared import Split
from isd_repro.data.store import Store
from isd_repro.errors import ConfigError
from isd_repro.params import Data, View
from isd_repro.protocols import Batch


def generator_of(*key: object) -> Generator:
    """A CPU generator seeded by a tuple such as (seed, "step", 17)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Batches:
    """Training batches of one split; every epoch is a fresh permutation and its last partial batch is dropped."""

    def __init__(
        self,
        store: Store,
        split: Split,
        data: Data,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        decode_on_device: bool = False,
    ) -> None:
        """Raises `ConfigError` where the split does not fill one batch; `decode_on_device` as of `Feed`."""
        if len(split.index) < batch_size:
            raise ConfigError(
                f"optim.batch_size: {batch_size}, but subset {data.subset!r} has only {len(split.index)} images to train on",
                "lower batch_size or enlarge the subset",
            )
        self.store, self.split, self.data = store, split, data
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.steps_per_epoch = len(split.index) // batch_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._feed = Feed(store, lambda step: split.index[self._chosen(step)], device, decode_on_device=decode_on_device)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        chosen = self._chosen(step)
        pixels, sizes = self._feed.at(step)
        draws = generator_of(self.seed, "step", step)
        views = [self._view(pixels, sizes, law, draws) for law in (self.data.view_student, self.data.view_teacher)]
        shuffle = torch.randperm(self.batch_size, generator=draws)
        label = self.split.label[chosen]
        return Batch(views[0], views[1], chosen.to(self.device), label.to(self.device), shuffle.to(self.device))

    def labels_at(self, step: int) -> Tensor:
        """Classes of a step's images, int64, B, in the order of its batch; no image is read."""
        return self.split.label[self._chosen(step)]

    def _chosen(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.split.index), generator=generator_of(self.seed, "epoch", epoch)))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def _view(self, pixels: Tensor, sizes: Tensor, law: View, draws: Generator) -> Tensor:
        images = augment.view(pixels, sizes, law, self.data.image_size, draws)
        return augment.normalise(images, self.data.mean, self.data.std)
