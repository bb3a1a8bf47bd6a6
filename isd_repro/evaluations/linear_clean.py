"""The linear protocol with learning rate and epoch chosen on images held out of training, instead of on the queries.

A tenth of each class's labelled images, drawn by a seed, is held out. On views of the other images one head is trained for every
learning rate of the grid, all in the same pass of the backbone as the paper's protocol. The statistics that standardise the
features also come from the other images only. The learning rate and the epoch with the most correct held-out images are chosen,
and that head classifies the queries once. Everything else (schedule, momentum, weight decay, views, initial head) is as in the
paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from isd_repro.evaluations.features import require_finite
from isd_repro.evaluations.linear_head import answers, descend, new_head, rate, sgd, standardise
from isd_repro.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from isd_repro.evaluations.linear import Config

FACTORS = (1.0, 0.1, 0.3, 3.0, 10.0)  # of the protocol's rate; the first of equals is taken
SHARE = 0.1  # of each class's images

Order = Callable[[int], Sequence[Tensor]]  # epoch from 0 -> positions of each batch's images in the search split


@dataclass(frozen=True)
class Chosen:
    """The result of the clean protocol.

    Attributes:
        predicted: class of every query, int64, Q.
        among: classes of the largest logits of every query, int64, Q x min(5, C).
        lr: chosen learning rate.
        epoch: chosen epoch, counted from 1.
        held_correct, held: number of correct and of all held-out images for that choice.
        head: the chosen head.
    """

    predicted: Tensor
    among: Tensor
    lr: float
    epoch: int
    held_correct: int
    held: int
    head: nn.Linear


def hold_out(label: Tensor, seed: int, share: float = SHARE) -> Tensor:
    """Mask of the held-out images, bool, N: round(share x images) of each class, at least one, drawn by the seed.

    Raises:
        DataError: a class with fewer than two images.
    """
    draw = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(label), dtype=torch.bool)
    for cls in label.unique().tolist():
        members = (label == cls).nonzero().squeeze(1)
        if len(members) < 2:
            found = f"class number {cls} has {len(members)} labelled image, and one is to be held out"
            raise DataError(f"linear-clean: {found}", "give every class two labelled images or more")
        count = max(1, round(share * len(members)))
        held[members[torch.randperm(len(members), generator=draw)[:count]]] = True
    return held


class CleanProbe:
    """Heads for all learning rates of the grid for one encoder; a `Rider` of `linear_head.train`."""

    def __init__(
        self, name: str, search: Tensor, label: Tensor, classes: int, order: Order, settings: Config, device: torch.device
    ) -> None:
        """Initialise the heads.

        Args:
            name: the encoder.
            search: its features of the labelled images under the evaluation transform, N x D.
            label: their classes, int64, N.
            classes: number of classes.
            order: which images each batch of views shows.
            settings: the paper's protocol.
            device: where the heads run.
        """
        require_finite(search, f"search features of encoder {name!r}")
        self.name = name
        self._held = hold_out(label, settings.seed)
        self._transform = standardise(search[~self._held], device)
        self._held_z = self._transform(search[self._held].to(device))
        self._held_label = label[self._held]
        self._order, self._now = order, (-1, [torch.empty(0, dtype=torch.int64)])
        self._heads = [new_head(search.shape[1], classes, settings.seed).to(device) for _ in FACTORS]
        self._sgds = [sgd(head, settings, settings.lr * factor) for head, factor in zip(self._heads, FACTORS, strict=True)]
        self._settings = settings
        self._alive = [True] * len(FACTORS)
        self._best: tuple[int, int, int] = (-1, 0, 0)  # correct, epoch, number of the factor
        self._kept: dict[str, Tensor] = {}

    def learn(self, features: Tensor, label: Tensor, epoch: int, step: int) -> None:
        """Take one step of every head on the images of a batch that are not held out."""
        if self._now[0] != epoch:
            self._now = (epoch, list(self._order(epoch)))
        taught = (~self._held[self._now[1][step]]).to(features.device)
        if not bool(taught.any()):
            return
        z, lr = self._transform(features[taught]), rate(self._settings, epoch)
        for at, (head, optimiser) in enumerate(zip(self._heads, self._sgds, strict=True)):
            if self._alive[at]:
                loss = descend(head, optimiser, z, label[taught], lr * FACTORS[at])
                self._alive[at] = math.isfinite(float(loss))

    def close_epoch(self, epoch: int) -> Mapping[str, float]:
        """Score the held-out images; returns the best accuracy so far, in percent."""
        for at, head in enumerate(self._heads):
            if self._alive[at]:
                correct = int((answers(head, self._held_z)[0] == self._held_label).sum())
                if correct > self._best[0]:
                    self._best = (correct, epoch, at)
                    self._kept = {key: value.detach().clone() for key, value in head.state_dict().items()}
        return {f"{self.name}/held-out": 100.0 * max(self._best[0], 0) / len(self._held_label)}

    def outcome(self, query: Tensor) -> Chosen:
        """Classify the queries (features Q x D) with the chosen head.

        Raises:
            UserError: every learning rate diverged in the first epoch.
        """
        correct, epoch, at = self._best
        if correct < 0:
            found = f"linear-clean of encoder {self.name!r}: every learning rate of the grid diverged"
            raise UserError(found, "check its features")
        head = self._heads[at]
        head.load_state_dict(self._kept)
        predicted, among = answers(head, self._transform(query.to(self._held_z.device)))
        return Chosen(predicted, among, self._settings.lr * FACTORS[at], epoch, correct, len(self._held_label), head.cpu())
