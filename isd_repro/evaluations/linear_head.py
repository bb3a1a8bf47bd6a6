"""Linear heads on frozen features, trained as in the paper.

A feature x of the frozen backbone becomes z = (x / |x| - mean) / sqrt(var + 1e-5), with the mean and the unbiased variance of
each dimension over the labelled training images under the evaluation transform. One linear layer is trained by SGD on z of
augmented views and scored on the queries after every epoch. As in the paper, the best epoch is chosen on the queries themselves.
That number is optimistic, so the number of the last epoch is reported as well.  # DEV-05
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.features import require_finite
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from isd_repro.evaluations.linear import Config

EPS = 1e-5
TOP = 5  # classes that a query's answer may be among for `top5`

TrainBatches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # epoch from 0 -> (images B x C x H x W, labels B) in order
OnEpoch = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class Standardise:
    """x -> (x / |x| - mean) / scale, both of D numbers."""

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features B x D in, B x D out."""
        return (functional.normalize(features, dim=1) - self.mean) / self.scale


@dataclass(frozen=True)
class LinearTask:
    """Training data and queries of the heads.

    Attributes:
        search: features of the labelled training images under the evaluation transform by encoder, N x D.
        query: features of the queries by encoder, Q x D.
        query_label: classes of the queries, int64, Q.
        classes: number of classes.
        train_batches: augmented views of the labelled training images, the same for every encoder. With several ranks, each rank
            gets the views of its own `ranks.rows` of a batch, and the labels of the whole batch.
    """

    search: Mapping[str, Tensor]
    query: Mapping[str, Tensor]
    query_label: Tensor
    classes: int
    train_batches: TrainBatches


class Rider(Protocol):
    """A further head that is trained in the same pass of a backbone over the views.

    Attributes:
        name: the encoder whose features it learns from.
    """

    name: str

    def learn(self, features: Tensor, label: Tensor, epoch: int, step: int) -> None:
        """Take one step on one batch: raw features B x D and classes B on the device; epoch and step are counted from 0."""

    def close_epoch(self, epoch: int) -> Mapping[str, float]:
        """Called after each epoch, counted from 1; returns values for `on_epoch`."""


def rate(settings: Config, epoch: int) -> float:
    """Learning rate of an epoch counted from 0; it is multiplied by `factor` after each number of epochs in `milestones`."""
    return settings.lr * settings.factor ** sum(epoch >= milestone for milestone in settings.milestones)


def standardise(search: Tensor, device: torch.device | None = None) -> Standardise:
    """Statistics of the L2-normalised training features (N x D), then moved to `device`; `DataError` if N is below 2."""
    if len(search) < 2:
        raise DataError(f"linear evaluation needs at least 2 labelled images, found {len(search)}", "raise search_per_class")
    var, mean = torch.var_mean(functional.normalize(search, dim=1), dim=0, correction=1)
    return Standardise(mean.to(device), (var + EPS).sqrt().to(device))


def new_head(features: int, classes: int, seed: int) -> nn.Linear:
    """An `nn.Linear` with its default initialisation, drawn from a generator with this seed."""
    generator = torch.Generator().manual_seed(seed)
    head: nn.Linear = nn.utils.skip_init(nn.Linear, features, classes)
    nn.init.kaiming_uniform_(head.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(features)
    nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return head


def train(
    encoders: Mapping[str, nn.Module],
    task: LinearTask,
    settings: Config,
    device: torch.device,
    on_epoch: OnEpoch = lambda row: None,
    riders: Sequence[Rider] = (),
) -> dict[str, PaperHead]:
    """Train and score one head per encoder; all heads see the same views and start from the same seed.

    Several ranks share the forward passes; every rank then has the features of the whole batch and trains the same heads.

    Args:
        encoders: backbones, moved to `device` and left in eval mode, otherwise unchanged.
        task: features, labels and views.
        settings: learning rate, epochs and seed; batch size, crop and flip are already applied in `task.train_batches`.
        device: where backbones and heads run.
        on_epoch: called after each epoch with epoch (from 1), lr, and loss and top1 (percent) of each encoder.
        riders: further heads, which do not affect the others.

    Returns:
        the trained heads by encoder.

    Raises:
        UserError: a loss is not finite, or another rank has ended.
        DataError: features are not finite, or there are too few images.
    """
    for encoder in encoders.values():
        encoder.to(device).eval()
    found = {name: PaperHead(name, name, task, settings, device) for name in encoders}
    heads: list[Rider] = [*found.values(), *riders]
    with exact(device):
        for epoch in range(settings.epochs):
            for step, (images, labels) in enumerate(task.train_batches(epoch)):
                batch, label = images.to(device, torch.float32), labels.to(device)
                for name, encoder in encoders.items():
                    with torch.no_grad():
                        features = ranks.whole(encoder(batch), len(label))
                    for head in heads:
                        if head.name == name:
                            head.learn(features, label, epoch, step)
            row: dict[str, float] = {"epoch": epoch + 1, "lr": rate(settings, epoch)}
            for head in heads:
                row |= head.close_epoch(epoch + 1)
            on_epoch(row)
    return found


class PaperHead:
    """The paper's protocol for one encoder: its head and its best epoch so far.

    Attributes:
        head: the head after the last epoch.
        last: predicted class of every query after the last epoch, int64 on the CPU, Q.
        best: the same after the epoch with the most correct queries, the first of equals.
        best_epoch: that epoch, counted from 1.
        last5, best5: the classes of the largest logits of every query after those epochs, int64, Q x min(5, classes).
    """

    def __init__(self, name: str, title: str, task: LinearTask, settings: Config, device: torch.device) -> None:
        require_finite(task.search[name], f"search features of encoder {name!r}")
        require_finite(task.query[name], f"query features of encoder {name!r}")
        self.name, self.title = name, title
        self.transform = standardise(task.search[name], device)
        self.query = self.transform(task.query[name].to(device))
        self.query_label = task.query_label
        self.head = new_head(self.query.shape[1], task.classes, settings.seed).to(self.query)
        self.settings, self.sgd = settings, sgd(self.head, settings, settings.lr)
        self.loss = torch.zeros((), device=device)
        self.seen = 0
        self.last = self.best = torch.empty(0, dtype=torch.int64)
        self.last5 = self.best5 = torch.empty(0, 0, dtype=torch.int64)
        self.best_epoch, self.best_correct = 0, -1

    def learn(self, features: Tensor, label: Tensor, epoch: int, step: int) -> None:
        """Take one SGD step on one batch of views."""
        loss = descend(self.head, self.sgd, self.transform(features), label, rate(self.settings, epoch))
        self.loss += loss * len(label)
        self.seen += len(label)

    def close_epoch(self, epoch: int) -> dict[str, float]:
        """Score the queries; returns the epoch's loss and top-1 accuracy in percent."""
        loss = float(self.loss) / max(self.seen, 1)
        if not self.seen or not math.isfinite(loss):
            what = f"loss {loss}" if self.seen else "no batch"
            raise UserError(f"linear head of encoder {self.title!r}: {what} in epoch {epoch}", "lower evaluation.linear.lr")
        self.last, self.last5 = answers(self.head, self.query)
        correct = int((self.last == self.query_label).sum())
        if correct > self.best_correct:
            self.best, self.best5, self.best_correct, self.best_epoch = self.last, self.last5, correct, epoch
        self.loss.zero_()
        self.seen = 0
        return {f"{self.title}/loss": loss, f"{self.title}/top1": 100.0 * correct / max(len(self.query_label), 1)}


def sgd(head: nn.Linear, settings: Config, lr: float) -> torch.optim.SGD:
    """The protocol's optimiser for one head, with learning rate `lr`."""
    return torch.optim.SGD(head.parameters(), lr=lr, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay)


def descend(head: nn.Linear, optimiser: torch.optim.SGD, z: Tensor, label: Tensor, lr: float) -> Tensor:
    """Take one step on standardised features (B x D); returns the mean loss of the batch before the step."""
    loss = functional.cross_entropy(head(z), label)
    optimiser.zero_grad()
    loss.backward()
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    return loss.detach()


def answers(head: nn.Linear, z: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted class of every row of z (N x D) and the classes of its largest logits: int64 on the CPU, N and N x min(5, C)."""
    first, among = [], []
    with torch.inference_mode():
        for part in z.split(4096):
            logits = head(part)
            first.append(logits.argmax(dim=1).cpu())
            among.append(logits.topk(min(TOP, logits.shape[1]), dim=1).indices.cpu())
    return torch.cat(first), torch.cat(among)
