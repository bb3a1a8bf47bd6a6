"""`bench linear`: many settings of the linear protocol on one pass of the backbone, and one setting alone, in turns.

Both arms are `evals.linear.train` as the stage calls it: the backbone's forward passes over the batches of an epoch, a step of
every head at each batch, and a look at the queries. The settings are a grid of rates and weight decays. Making the views is
left out of both arms; it is done once for all heads, so with it the ratio would be smaller still. The floor is the backbone's
forward passes and nothing else. `check` trains every setting by itself on the features of the same passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from benchmarks import turns
from benchmarks.turns import Comparison
from isd_repro.config.params import BackboneConfig, Linear
from isd_repro.evaluations import linear
from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.linear import Task
from isd_repro.nn import backbones
from isd_repro.runtime.errors import ConfigError

RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
_NAME = "student"
_APART = "largest difference to a head alone"
Arch = Literal["resnet18", "resnet-narrow"]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often: one epoch, with a tenth as many queries as images."""

    images: int = 512
    batch: int = 256
    side: int = 64
    classes: int = 38
    settings: int = 50
    repeats: int = 5
    threads: int = 1
    arch: Arch = "resnet18"
    width: int = 64


def sizes_of(*, arch: str, **values: int) -> Sizes:
    """Sizes with a backbone that there is, or `ConfigError`."""
    known = get_args(Arch)
    if arch not in known:
        raise ConfigError(f"--arch: {arch!r} is none of {', '.join(known)}")
    return Sizes(arch=cast("Arch", arch), **values)


def grid(count: int) -> list[Linear]:
    """The first `count` of rates times weight decays, the paper's setting first of all."""
    paper = Linear(epochs=1, protocol="bench")
    every = [(rate, decay) for decay in DECAYS for rate in RATES]
    every.sort(key=lambda pair: pair != (paper.lr, paper.weight_decay))
    return [paper.model_copy(update={"lr": rate, "weight_decay": decay}) for rate, decay in every[:count]]


class _Problem:
    """A backbone, images with classes, and features that stand for those of the evaluation transform."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        draws = torch.Generator().manual_seed(0)
        shape = BackboneConfig(arch=sizes.arch, width=sizes.width)
        self.sizes, self.device = sizes, device
        self.backbone: nn.Module = backbones.build(shape, sizes.side).to(device).eval()
        images = torch.randn(sizes.images, 3, sizes.side, sizes.side, generator=draws)
        label = torch.randint(0, sizes.classes, (sizes.images,), generator=draws)
        self.batches = list(zip(images.split(sizes.batch), label.split(sizes.batch), strict=True))
        self.seen = self.features()
        search, count = torch.cat(self.seen).cpu(), -(-sizes.images // 10)
        query_label = torch.randint(0, sizes.classes, (count,), generator=draws)
        self.task = Task({_NAME: search}, {_NAME: search[:count]}, query_label, sizes.classes, self.epoch)

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
            linear.rider(_NAME, f"{_NAME} lr {each.lr} decay {each.weight_decay}", self.task, each, self.device)
            for each in others
        ]
        found = linear.train({_NAME: self.backbone}, self.task, first, self.device, riders=riders)
        return [found[_NAME].head, *(rider.outcome().head for rider in riders)]

    def alone(self, settings: Linear) -> nn.Linear:
        """One setting by itself, from the features of the passes."""
        remembered = {_NAME: _Remembered(self.seen)}
        return linear.train(remembered, self.task, settings, self.device)[_NAME].head


class _Remembered(nn.Module):
    """Gives features that are there already, batch after batch."""

    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()
        self._next = iter(features)

    def forward(self, _images: Tensor) -> Tensor:
        return next(self._next)


def bench(sizes: Sizes, *, say: turns.Say = lambda line: None) -> Comparison:
    """Measure; `ConfigError` for sizes that are none."""
    turns.check_sizes(sizes)
    most = len(RATES) * len(DECAYS)
    if sizes.settings > most:
        raise ConfigError(f"cannot measure {sizes.settings} settings", f"there are {most}")
    device = turns.device_of()
    with turns.threads(sizes.threads), torch.random.fork_rng():
        torch.manual_seed(0)
        problem, settings = _Problem(sizes, device), grid(sizes.settings)
        works: dict[str, Callable[[], object]] = {
            "one setting": lambda: problem.heads(settings[:1]),
            f"{len(settings)} settings": lambda: problem.heads(settings),
        }
        check = _check(problem, settings)

        def floor() -> dict[str, float]:
            return {"s of the backbone alone": statistics.median(turns.seconds_of(problem.features, device) for _ in range(3))}

        limits = {_APART: 1e-6}
        return turns.compare("linear", sizes, works, floor=floor, check=check, limits=limits, say=say)


def _check(problem: _Problem, settings: list[Linear]) -> dict[str, float]:
    """How far the heads of one pass are from those trained alone, and how far apart those of two settings are at least."""
    together = problem.heads(settings)
    gaps = [_gap(head, problem.alone(each)) for head, each in zip(together, settings, strict=True)]
    apart = [_gap(one, other) for at, one in enumerate(together) for other in together[:at]]
    return {_APART: max(gaps), "least difference of two heads": min(apart, default=0.0)}


def _gap(one: nn.Linear, other: nn.Linear) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
