"""Batches as a pure function of (seed, step): the same on resume, on any device and with any number of workers and ranks."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from isd_repro.config.params import Data, Numerics, View
from isd_repro.data import augment, feed
from isd_repro.data.augment import CHANGES, Change, Drawn
from isd_repro.data.feed import Feed
from isd_repro.data.prepared import Split
from isd_repro.data.store import Store
from isd_repro.interfaces import Batch
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import ConfigError


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
        changes: tuple[Change, ...] = CHANGES,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Raises `ConfigError` where the split does not fill one batch; `decode_on_device` as of `Feed`, `changes` of `apply`."""
        if len(split.index) < batch_size:
            raise ConfigError(
                f"optim.batch_size: {batch_size}, but subset {data.subset!r} has only {len(split.index)} images to train on",
                "lower batch_size or enlarge the subset",
            )
        self.store, self.split, self.data = store, split, data
        self.batch_size, self.seed, self.device = batch_size, seed, device
        self.steps_per_epoch = len(split.index) // batch_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.rank, self.world, self._decode_on_device, self._changes = rank, world, decode_on_device, changes
        self._feed = Feed(store, self._wanted, device, decode_on_device=decode_on_device)

    def choose_decoder(self, step: int, numerics: Numerics) -> str:
        """Decode on the device from now on where the rule says so and a trial with a step's images went well.

        Every rank tries the whole batch, and where one of them fails none decodes there: all ranks see the same pixels.

        Returns:
            what was chosen, to stand behind the device's name as of `engine.kernels_of`; empty where the rule says no.

        Raises:
            DataError: as of `feed.try_there`.
        """
        if not feed.decodes_there(self.device, numerics, self.store):
            return ""
        name, why = feed.try_there(self.store, self.split.index[self._chosen(step)], self.device)
        if ranks.anywhere(bool(why)):
            return f", {feed.NOT_DECODED} by {name} ({why or 'it failed on another rank'})"
        self._decode_on_device = True
        self._feed = Feed(self.store, self._wanted, self.device, decode_on_device=True)
        return f", JPEGs decoded by {name}"

    def part(self, rank: int, world: int) -> Batches:
        """The same batches as one of `world` ranks sees them, see `protocols.Batch`; `batch_size` is a multiple of `world`.

        Each rank draws for the whole batch and makes the views of its own rows, so that all ranks together have the same views,
        bit for bit, as one. What the teacher sees after the shuffle lies in other ranks' rows: it is read and made here.
        """
        same = (self.store, self.split, self.data, self.batch_size, self.seed, self.device)
        return Batches(*same, decode_on_device=self._decode_on_device, changes=self._changes, rank=rank, world=world)

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        chosen = self._chosen(step)
        drawn, shuffle = self._draws(step)
        pixels, _ = self._feed.at(step)
        parts: list[Tensor] | tuple[Tensor, ...] = [pixels] * 2
        if self.world > 1:
            rows = self._rows(shuffle)
            parts = self._padded(pixels, chosen).split([len(at) for at in rows])
            drawn = [each.at(at) for each, at in zip(drawn, rows, strict=True)]
            chosen = chosen[rows[0]]
        laws = (self.data.view_student, self.data.view_teacher)
        views = [self._view(*each) for each in zip(parts, drawn, laws, strict=True)]
        label = self.split.label[chosen]
        return Batch(views[0], views[1], *(augment.to_device(each, self.device) for each in (chosen, label, shuffle)))

    def labels_at(self, step: int) -> Tensor:
        """Classes of a step's images, int64, B, in the order of its batch; no image is read."""
        return self.split.label[self._chosen(step)]

    def _chosen(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.split.index), generator=generator_of(self.seed, "epoch", epoch)))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def _draws(self, step: int) -> tuple[list[Drawn], Tensor]:
        """What both views of the whole batch draw, and the shuffle of its teacher side."""
        sizes = self.store.sizes[self.split.index[self._chosen(step)]]
        draws = generator_of(self.seed, "step", step)
        drawn = [augment.draw(sizes, law, draws) for law in (self.data.view_student, self.data.view_teacher)]
        return drawn, torch.randperm(self.batch_size, generator=draws)

    def _rows(self, shuffle: Tensor) -> list[Tensor]:
        """Rows of the batch whose student and whose teacher views this rank makes."""
        return [positions.chunk(self.world)[self.rank] for positions in (torch.arange(self.batch_size), shuffle)]

    def _wanted(self, step: int) -> Tensor:
        """Positions in the store of the images that this rank reads."""
        chosen = self._chosen(step)
        if self.world > 1:
            chosen = torch.cat([chosen[at] for at in self._rows(self._draws(step)[1])])
        return self.split.index[chosen]

    def _padded(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        """Images padded to the largest of the whole batch: the length of a sum decides how it is rounded."""
        height, width = (int(side) for side in self.store.sizes[self.split.index[chosen]].amax(dim=0))
        return F.pad(pixels, (0, width - pixels.shape[3], 0, height - pixels.shape[2]))

    def _view(self, pixels: Tensor, drawn: Drawn, law: View) -> Tensor:
        images = augment.apply(pixels, drawn, law, self.data.image_size, self._changes)
        return augment.normalise(images, self.data.mean, self.data.std)
