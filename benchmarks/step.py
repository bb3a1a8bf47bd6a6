"""`bench step`: whole ISD steps from bytes in memory to updated weights, by the plain recipe and by both engines, in turns.

The arms are a ladder, each but the last has what the one before it has and something more:

    plain               the published recipe in its straightforward form (bench/plain.py): PIL views, contiguous weights, a copy
                        of the bank, B x K logits, one operation per tensor of the teacher, the loss read at every step
    + batched views     the whole batch's views on the device
    + channels_last     weights and images in that layout
    reference           our method and loop: the teacher in one operation, nothing read between two log lines
    fast                the bank's loss without B x K logits; on CUDA also SGD as one kernel and compiled networks and colours
    fast, bf16          networks in bf16, bank in float16; on CUDA, and on CPUs that multiply bf16 (AVX512_BF16, AMX)
    fast, bf16, eager   the same less the compiler, on CUDA alone

All start from the same weights and bank. `check` feeds one batch to all and compares their losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain, turns
from benchmarks.turns import Comparison
from benchmarks.views import Images
from isd_repro.config.params import BackboneConfig, Cosine, Efficiency, Numerics, Optim
from isd_repro.data import augment
from isd_repro.interfaces import Batch, Setting
from isd_repro.methods import isd
from isd_repro.nn import backbones, engine, products
from isd_repro.runtime.errors import ConfigError
from isd_repro.train import loop
from isd_repro.train.checkpoint import Progress


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often. The embedding of ResNet-18 without a projector has 512 numbers."""

    batch: int = 256
    side: int = 32
    bank: int = 128_000
    steps: int = 2  # of a turn; the last is the end of an epoch, where ours looks at every weight
    repeats: int = 3
    threads: int = 1
    arch: Literal["resnet18", "resnet50", "resnet-narrow"] = "resnet18"
    stem: Literal["imagenet", "small"] = "imagenet"
    width: int = 64


def sizes_of(**values: int | str) -> Sizes:
    """Sizes with an encoder that there is, or `ConfigError`."""
    known = {"arch": ("resnet18", "resnet50", "resnet-narrow"), "stem": ("imagenet", "small")}
    for key, choices in known.items():
        if values.get(key, choices[0]) not in choices:
            raise ConfigError(f"--{key}: {values[key]!r} is none of {', '.join(choices)}")
    return Sizes(**values)  # type: ignore[arg-type]


class _Source:
    """Batches of the same images, their views made when they are asked for."""

    def __init__(self, images: Images, make: Callable[[], list[Tensor]], steps: int = 1) -> None:
        self.images, self.make, self.steps_per_epoch = images, make, steps
        self.shuffle = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(1)).to(images.pixels.device)

    def at(self, _step: int) -> Batch:
        one, other = (view.to(self.images.pixels.device) for view in self.make())
        rows = torch.arange(len(one), device=one.device)
        return Batch(one, other, rows, rows, self.shuffle)


def bench(sizes: Sizes, *, say: turns.Say = lambda line: None) -> Comparison:
    """Measure; `ConfigError` for sizes that are none."""
    numbers = {name: value for name, value in vars(sizes).items() if isinstance(value, int)}
    if min(numbers.values()) < 1 or sizes.bank % sizes.batch or sizes.batch < 2:
        hint = "every size must be 1 or more, the batch 2 or more, for its statistics, and the bank a multiple of it"
        raise ConfigError(f"cannot measure {sizes}", hint)
    device = turns.device_of()
    with turns.threads(sizes.threads), torch.random.fork_rng():
        torch.manual_seed(0)
        images = Images(sizes.batch, sizes.side)
        half = Numerics(engine="fast", precision="bf16")
        how: dict[str, str] = {}
        arms = {
            "plain": _plain(sizes, images.plain_views, images, device),
            "+ batched views": _plain(sizes, images.views, images, device),
            "+ channels_last": _plain(sizes, images.views, images, device, torch.channels_last),
            "reference": _ours(sizes, images, device, Numerics()),
            "fast": _ours(sizes, images, device, Numerics(engine="fast"), partial(how.__setitem__, "fast")),
        }
        if device.type == "cuda" or products.multiplies_bf16():
            arms["fast, bf16"] = _ours(sizes, images, device, half, partial(how.__setitem__, "fast, bf16"))
        if device.type == "cuda":
            arms["fast, bf16, eager"] = _ours(sizes, images, device, half, compiled=False)
        fixed = images.views()
        losses = {arm: run(fixed) for arm, run in arms.items()}
        check = {f"{arm}: loss over plain's, less 1": abs(loss / losses["plain"] - 1) for arm, loss in losses.items()}
        limits = {name: 5e-2 if "bf16" in name else 1e-4 for name in check}

        def floor() -> dict[str, float]:
            flop = _flop(sizes, device) * sizes.steps
            found = {"GFLOP": flop / 1e9}
            for dtype, words in ((torch.float32, ""), (torch.bfloat16, " in bf16")):
                rate = max(turns.multiply_rate(2 * sizes.batch, 512, 1024, device, dtype), turns.convolve_rate(device, dtype))
                found |= {f"GFLOP/s{words}": rate / 1e9, f"s at that rate{words}": flop / rate}
            return found

        works = {arm: (lambda run=run: run(None)) for arm, run in arms.items()}
        return turns.compare("step", sizes, works, floor=floor, check=check, limits=limits, how=how, say=say)


def _method(sizes: Sizes, device: torch.device, numerics: Numerics) -> isd.Method:
    options = isd.Config(tau_student=0.02, tau_teacher=0.02, momentum=0.999, bank_size=sizes.bank)
    shape = BackboneConfig(arch=sizes.arch, stem=sizes.stem, width=sizes.width)
    torch.manual_seed(0)
    setting = Setting(1, sizes.batch, **engine.setting_of(numerics))
    return isd.Method(options, lambda: backbones.build(shape, sizes.side), setting).to(device).train()


def _plain(
    sizes: Sizes,
    make: Callable[[], list[Tensor]],
    images: Images,
    device: torch.device,
    layout: torch.memory_format = torch.contiguous_format,
) -> Callable[[list[Tensor] | None], float]:
    method = _method(sizes, device, Numerics()).to(memory_format=layout)
    weights = [weight for weight in method.parameters() if weight.requires_grad]
    optimizer = SGD(weights, lr=0.01, momentum=0.9, weight_decay=1e-4)
    source = _Source(images, make)

    def run(views: list[Tensor] | None) -> float:
        loss = 0.0
        for _ in range(1 if views else sizes.steps):
            one, other = (view.to(device).contiguous(memory_format=layout) for view in (views or source.make()))
            loss = plain.step(method, optimizer, one, other, source.shuffle)
        return loss

    return run


def _ours(
    sizes: Sizes,
    images: Images,
    device: torch.device,
    numerics: Numerics,
    tell: Callable[[str], object] = lambda words: None,
    *,
    compiled: bool = True,
) -> Callable[[list[Tensor] | None], float]:
    method = _method(sizes, device, numerics).to(memory_format=torch.channels_last)
    optim = Optim(epochs=1, batch_size=sizes.batch, lr=0.01, schedule=Cosine(name="cosine"))
    optimizer = loop.optimizer_of(method, optim, numerics)
    changes = augment.CHANGES
    if compiled:
        changes = engine.changes_of(changes, device, numerics)
        words = engine.compile_(dict(method.encoders), lambda: images.views(changes)[0], device, numerics)
        tell((engine.kernels_of(method, numerics) + words).removeprefix(", "))
    make = partial(images.views, changes)
    hooks = loop.Hooks(save=lambda now: None, epoch=lambda row: None, tick=lambda step, loss: None, stopped=lambda: False)

    def run(views: list[Tensor] | None) -> float:
        source = _Source(images, make, sizes.steps) if views is None else _Source(images, lambda: views)
        progress = Progress()
        loop.train(method, optimizer, source, optim, numerics, Efficiency(log_every=10), progress, hooks)
        return progress.curve[0]["loss"]

    return run


def _flop(sizes: Sizes, device: torch.device) -> float:
    """Of one step's products: the student's forward and backward, the teacher's forward, and 8 B K D of the bank's loss.

    A convolution's border counts as work, which oneDNN leaves out: at 32 px that is most of a ResNet-18's last stage.
    """
    method = _method(replace(sizes, bank=sizes.batch), device, Numerics())
    images = torch.rand(2, 3, sizes.side, sizes.side, device=device)
    counter = FlopCounterMode(display=False)
    with counter:
        embedding: Tensor = method.predictor(method.student(images))
        embedding.sum().backward()
        with torch.no_grad():
            method.teacher(images)
    return counter.get_total_flops() / 2 * sizes.batch + 8.0 * sizes.batch * sizes.bank * embedding.shape[1]
