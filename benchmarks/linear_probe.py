"""Many settings of the linear probe on one pass of the backbone, against one setting alone.

Both variants train as the evaluation does: the backbone's forward passes over the batches of an epoch, a step of every head at
each batch, and the score on the queries. The settings are a grid of learning rates and weight decays. Making the views is left
out of both; it is done once for all heads, so with it the ratio would be smaller. The check trains every setting by itself on the
features of the same passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import harness
from isd_repro.config.params import BackboneConfig
from isd_repro.evaluations import linear_head as linear
from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.linear import Config as Linear
from isd_repro.evaluations.linear_head import LinearTask, PaperHead
from isd_repro.nn import backbones
from isd_repro.runtime.errors import ConfigError

LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
_NAME = "student"


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """One epoch of `images`, a tenth as many queries, and how many settings are trained together."""

    images: int = 512
    batch: int = 256
    side: int = 64
    classes: int = 38
    settings: int = 50
    arch: Literal["resnet18", "resnet-narrow"] = "resnet18"
    width: int = 64


CPU = {"linear": Sizes()}
CUDA = {"linear": Sizes(images=2048, side=224, repetitions=3)}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, images=20, batch=8, side=16, classes=3, settings=4, arch="resnet-narrow", width=2, repetitions=2)


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare one setting with many.

    Raises:
        ConfigError: more settings than the grid has.
    """
    device, settings = harness.device_of(), grid(sizes.settings)
    problem = _Problem(sizes, device)
    many = f"{len(settings)} settings"
    works: dict[str, Callable[[], object]] = {
        "one setting": lambda: problem.heads(settings[:1]),
        many: lambda: problem.heads(settings),
    }

    def check(name: str) -> dict[str, tuple[float, float]]:
        if name != many:
            return {}
        together = problem.heads(settings)
        gaps = [_gap(head, problem.alone(each)) for head, each in zip(together, settings, strict=True)]
        apart = min((_gap(one, other) for at, one in enumerate(together) for other in together[:at]), default=1.0)
        return {"largest difference to a head alone": (max(gaps), 1e-6), "pairs of equal heads": (float(apart == 0), 0.0)}

    def floor() -> dict[str, float]:
        passes = [harness.seconds_of(problem.features, device) for _ in range(3)]
        return {"s of the backbone alone": statistics.median(passes)}

    return harness.compare("linear", sizes, works, check=check, floor=floor, say=say)


def grid(count: int) -> list[Linear]:
    """The first settings of learning rates times weight decays, the paper's setting first of all."""
    paper = Linear(epochs=1, protocol="bench")
    pairs = [(rate, decay) for decay in WEIGHT_DECAYS for rate in LEARNING_RATES]
    if count > len(pairs):
        raise ConfigError(f"cannot measure {count} settings", f"there are {len(pairs)}")
    pairs.sort(key=lambda pair: pair != (paper.lr, paper.weight_decay))
    return [paper.model_copy(update={"lr": rate, "weight_decay": decay}) for rate, decay in pairs[:count]]


class _Problem:
    """A backbone, images with classes, and features that stand for those of the evaluation transform."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        draws = torch.Generator().manual_seed(0)
        shape = BackboneConfig(arch=sizes.arch, width=sizes.width)
        self.device = device
        self.backbone: nn.Module = backbones.build(shape, sizes.side).to(device).eval()
        images = torch.randn(sizes.images, 3, sizes.side, sizes.side, generator=draws)
        label = torch.randint(0, sizes.classes, (sizes.images,), generator=draws)
        self.batches = list(zip(images.split(sizes.batch), label.split(sizes.batch), strict=True))
        self.seen = self.features()
        search, count = torch.cat(self.seen).cpu(), -(-sizes.images // 10)
        query_label = torch.randint(0, sizes.classes, (count,), generator=draws)
        self.task = LinearTask({_NAME: search}, {_NAME: search[:count]}, query_label, sizes.classes, self.epoch)

    def epoch(self, _epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def features(self) -> list[Tensor]:
        """The backbone's passes alone."""
        with exact(self.device), torch.no_grad():
            return [self.backbone(images.to(self.device)) for images, _ in self.batches]

    def heads(self, settings: list[Linear]) -> list[nn.Linear]:
        """All settings on one pass of the backbone."""
        first, *others = settings
        riders = [
            PaperHead(_NAME, f"lr {each.lr}, weight decay {each.weight_decay}", self.task, each, self.device) for each in others
        ]
        found = linear.train({_NAME: self.backbone}, self.task, first, self.device, riders=riders)
        return [found[_NAME].head, *(rider.head for rider in riders)]

    def alone(self, settings: Linear) -> nn.Linear:
        """One setting by itself, from the features of the passes."""
        return linear.train({_NAME: _Remembered(self.seen)}, self.task, settings, self.device)[_NAME].head


class _Remembered(nn.Module):
    """Gives the features of the passes, batch after batch."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self._next = iter(features)

    def forward(self, _images: Tensor) -> Tensor:
        return next(self._next)


def _gap(one: nn.Linear, other: nn.Linear) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
