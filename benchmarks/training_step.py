"""Whole training steps from bytes in memory to updated weights: the plain recipe, and both engines of this project.

The variants are a ladder. On a CPU:

    plain               the published recipe in its straightforward form (plain_recipe.py): PIL views, contiguous weights, a copy
                        of the bank, B x K logits, one operation per tensor of the teacher, the loss read at every step
    + batched views     the views of the whole batch at once, on the device
    + channels_last     weights and images in that layout
    reference           our method and loop: the teacher in one operation, no number read between two log lines
    fast                the bank's loss without B x K logits
    fast, bf16          networks in bf16, bank in float16; only on CPUs that multiply bf16

On a CUDA device every variant has batched views of images that lie on the device, and the ladder goes on: `reference, bf16` with
contiguous weights and with channels_last, `fast, bf16`, then compiled networks and colours, the whole step as one CUDA graph,
cuDNN's own choice of kernels, and BatchNorm in two groups. All variants start from the same weights and bank, and the check
compares their losses on one batch. The memory of a CUDA graph is allocated when it is captured, so its extra memory does not
show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, plain_recipe
from benchmarks.views import STRONG, WEAK, Images
from isd_repro import methods
from isd_repro.config.params import BackboneConfig, Cosine, Efficiency, Numerics, Optim
from isd_repro.data import augment
from isd_repro.interfaces import Batch, Setting
from isd_repro.nn import backbones, engine, products
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.runtime.errors import ConfigError
from isd_repro.train import loop
from isd_repro.train.checkpoint import RunProgress

FAST, HALF = Numerics(engine="fast"), Numerics(engine="fast", precision="bf16")
OPTIONS: dict[str, dict[str, Any]] = {
    "isd": {"tau_student": 0.02, "tau_teacher": 0.02, "momentum": 0.999},
    "moco": {"tau": 0.2, "momentum": 0.999},
    "byol": {"momentum": 0.99},
    "msf": {"momentum": 0.99},
    "cmsf": {"momentum": 0.99},
    "compress": {"teacher": "", "sha256": 64 * "0", "tau": 0.04},
    "sce": {"lam": 0.5, "tau_student": 0.1, "tau_teacher": 0.05, "momentum": 0.999},
    "simclr": {"tau": 0.2},
}
# Passes over the output of each convolution that remain with one operator at a time. Student's forward: write it, read it for
# the statistics, read it again and write the activation, read that (5); backward: the same in reverse, twice where gradients of
# weights and of inputs both read (8); teacher's forward (5).
_PASSES = 18


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """One step, and how many of them a call makes; the last one ends an epoch, where ours checks every weight."""

    method: str = "isd"
    arch: Literal["resnet18", "resnet50", "resnet-narrow"] = "resnet18"
    stem: Literal["imagenet", "small"] = "imagenet"
    heads: str = "default"
    width: int = 64  # of resnet-narrow
    batch: int = 256
    side: int = 32
    source: int = 1
    bank: int = 128_000
    steps: int = 2


SHORT = ("reference", "fast, bf16", "+ compiled", "+ CUDA graph")
CPU = {
    "step-32": Sizes(),
    "step-64": Sizes(batch=64, side=64, bank=16_384, steps=4),
}
CUDA = {
    "step-224": Sizes(side=224, source=256, steps=10),
    "step-64": Sizes(stem="small", heads="mlp", side=64, bank=16_384, steps=10, only=SHORT),
    "step-64-moco": Sizes(method="moco", stem="small", side=64, bank=16_384, steps=10, only=SHORT),
    "step-224-resnet50": Sizes(arch="resnet50", heads="mlp", side=224, source=256, steps=10, only=SHORT),
}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, arch="resnet-narrow", width=4, batch=8, side=16, source=20, bank=32, steps=2, repetitions=2)


@dataclass(frozen=True)
class Variant:
    """One way to make the steps."""

    numerics: Numerics = field(default_factory=Numerics)
    layout: torch.memory_format = torch.channels_last
    plain: bool = False  # the plain recipe's step in place of our method and loop
    pil: bool = False
    compiled: bool = False
    graph: bool = False
    choose_kernels: bool = False  # cuDNN's benchmark mode
    groups: int = 1


def ladder(device: torch.device) -> dict[str, Variant]:
    """Variants by name, the baseline first."""
    wide = torch.contiguous_format
    if device.type == "cuda":
        graph = Variant(HALF, compiled=True, graph=True)
        return {
            "plain": Variant(plain=True, layout=wide),
            "reference": Variant(),
            "reference, bf16, contiguous": Variant(Numerics(precision="bf16"), layout=wide),
            "reference, bf16": Variant(Numerics(precision="bf16")),
            "fast, bf16": Variant(HALF),
            "+ compiled": Variant(HALF, compiled=True),
            "+ CUDA graph": graph,
            "+ cuDNN benchmark": replace(graph, choose_kernels=True),
            "compiled, 2 BatchNorm groups": Variant(HALF, compiled=True, groups=2),
        }
    found = {
        "plain": Variant(plain=True, pil=True, layout=wide),
        "+ batched views": Variant(plain=True, layout=wide),
        "+ channels_last": Variant(plain=True),
        "reference": Variant(),
        "fast": Variant(FAST),
    }
    return found | ({"fast, bf16": Variant(HALF)} if products.multiplies_bf16() else {})


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare all variants that this device has.

    Raises:
        ConfigError: the bank is not a multiple of the batch, or a batch of 1, which has no statistics.
    """
    if sizes.bank % sizes.batch or sizes.batch < 2:
        raise ConfigError(f"cannot measure {sizes}", "the batch must be 2 or more, and the bank a multiple of it")
    device = harness.device_of()
    images = images_of(sizes)
    fixed = batch_of(images, images.batched())
    trainers = {name: Trainer(sizes, variant, images) for name, variant in ladder(device).items()}
    losses: dict[str, float] = {}

    def check(name: str) -> dict[str, tuple[float, float]]:
        losses[name] = trainers[name].first_loss(fixed)
        if name.endswith("groups"):  # another computation
            return {}
        want = next(iter(losses.values()))
        half = trainers[name].variant.numerics.precision == "bf16"
        return {"first loss over the baseline's, less 1": (abs(losses[name] / want - 1), 5e-2 if half else 1e-4)}

    def floor() -> dict[str, float]:
        flop, written = work_of(sizes)
        found = {"GFLOP": sizes.steps * flop / 1e9}
        copied = harness.copy_rate(device)
        for dtype, words, size in ((torch.float32, "", 4), (torch.bfloat16, " in bf16", 2)):
            rate = max(harness.multiply_rate(device, dtype), harness.convolve_rate(device, dtype))
            found |= {f"GFLOP/s{words}": rate / 1e9, f"s at that rate{words}": sizes.steps * flop / rate}
            found[f"s of memory traffic{words}"] = sizes.steps * _PASSES * written * size / copied
        return found

    found = harness.compare("step", sizes, trainers, check=check, floor=floor, how=lambda name: trainers[name].words, say=say)
    least = {}
    for name in found.seconds:
        words = " in bf16" if trainers[name].variant.numerics.precision == "bf16" else ""
        least[name] = max(found.floor[f"s at that rate{words}"], found.floor[f"s of memory traffic{words}"])
    return replace(found, images=sizes.steps * sizes.batch, least=least)


def images_of(sizes: Sizes) -> Images:
    """Images in memory; on a CUDA device more than a batch, and both views strong."""
    cuda = harness.device_of().type == "cuda"
    return Images(
        sizes.batch, sizes.side, (STRONG, STRONG if cuda else WEAK), source=sizes.source, count=4096 if cuda else sizes.batch
    )


def batch_of(images: Images, views: list[Tensor]) -> Batch:
    """A batch of these views; index and label say nothing."""
    one, other = (view.to(images.device) for view in views)
    rows = torch.arange(len(one), device=images.device)
    return Batch(one, other, rows, torch.zeros_like(rows), images.shuffle)


def build(sizes: Sizes, device: torch.device, numerics: Numerics, groups: int = 1) -> Any:
    """A method as `pretrain` builds it, with random weights that depend on nothing but the sizes."""
    module = methods.load(sizes.method)
    options = {**OPTIONS.get(sizes.method, {}), "bank_size": sizes.bank}
    if sizes.heads != "default":
        options["heads"] = sizes.heads
    config = module.Config.model_validate({key: value for key, value in options.items() if key in module.Config.model_fields})
    shape = BackboneConfig(arch=sizes.arch, stem=sizes.stem, width=sizes.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = lambda *_: backbones.build(shape, sizes.side)  # noqa: E731
        arithmetic = engine.setting_of(numerics)
        setting = Setting(classes=1, images=sizes.batch, batch_size=sizes.batch, steps=sizes.steps, frozen=make, **arithmetic)
        method = module.Method(config, make, setting)
    set_bn_groups(method, groups)
    return method.to(device).train()


class Trainer:
    """A method and its optimizer as one variant trains them; built at the first use."""

    def __init__(self, sizes: Sizes, variant: Variant, images: Images) -> None:
        self.sizes, self.variant, self.images, self.words = sizes, variant, images, ""
        self.optim = Optim(epochs=1, batch_size=sizes.batch, lr=0.01, schedule=Cosine(name="cosine"))
        self._changes = augment.CHANGES

    @cached_property
    def method(self) -> Any:
        """The method, compiled if the variant is."""
        variant, device = self.variant, self.images.device
        method = build(self.sizes, device, variant.numerics, variant.groups).to(memory_format=variant.layout)
        self.words = engine.kernels_of(method, variant.numerics)
        if variant.compiled:
            self._changes = engine.changes_of(augment.CHANGES, device, variant.numerics)
            with patch.object(torch.compiler, "reset", lambda: None):  # what other variants compiled stays
                self.words += engine.compile_(dict(method.encoders), lambda: self.views()[0], device, variant.numerics)
        self.words = self.words.removeprefix(", ")
        return method

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """SGD as the variant's recipe has it."""
        if not self.variant.plain:
            return loop.optimizer_of(self.method, self.optim, self.variant.numerics)
        weights = [weight for weight in self.method.parameters() if weight.requires_grad]
        return SGD(weights, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def views(self) -> list[Tensor]:
        """Both views of another batch."""
        return self.images.by_pil() if self.variant.pil else self.images.batched(self._changes)

    def first_loss(self, batch: Batch) -> float:
        """The loss of a first step on this batch."""
        return self._steps(1, lambda: batch)

    def __call__(self) -> float:
        """Make the steps; the mean loss, or the last one."""
        return self._steps(self.sizes.steps, lambda: batch_of(self.images, self.views()))

    def _steps(self, steps: int, make: Callable[[], Batch]) -> float:
        flags = torch.backends.cudnn.flags(
            enabled=True, benchmark=self.variant.choose_kernels, deterministic=False, allow_tf32=True
        )
        with flags if self.variant.choose_kernels else nullcontext():
            if self.variant.plain:
                return [self._plain_step(make()) for _ in range(steps)][-1]
            if self.variant.graph:
                return float([self._replay(make()) for _ in range(steps)][-1])
            return self.train(steps, make)

    def _plain_step(self, batch: Batch) -> float:
        one, other = (view.contiguous(memory_format=self.variant.layout) for view in (batch.view_student, batch.view_teacher))
        return plain_recipe.step(self.method, self.optimizer, one, other, batch.shuffle)

    def train(self, steps: int, make: Callable[[], Batch]) -> float:
        """Make the steps through the training loop; the mean loss."""
        source, progress = _Source(steps, make), RunProgress()
        hooks = loop.Hooks(save=_nothing, epoch=_nothing, tick=_nothing, stopped=lambda: False)
        efficiency = Efficiency(log_every=50)
        loop.train(self.method, self.optimizer, source, self.optim, self.variant.numerics, efficiency, progress, hooks)
        return progress.curve[0]["loss"]

    # --- a step as a CUDA graph: everything but the views, which the host draws -------------------------------------------

    def _replay(self, batch: Batch) -> Tensor:
        for name, mine in _tensors(self._captured.batch).items():
            mine.copy_(getattr(batch, name))
        self._captured.graph.replay()
        return self._captured.loss

    @cached_property
    def _captured(self) -> _Captured:
        """One step, captured after three on a stream of its own; weights, bank and momenta are then put back."""
        batch = Batch(**{name: value.clone() for name, value in _tensors(batch_of(self.images, self.views())).items()})
        before = {name: value.clone() for name, value in self.method.state_dict().items()}
        bank: Any = getattr(self.method, "bank", None)
        place = torch.arange(self.sizes.batch, device=self.images.device)
        start = place.clone()

        @torch.no_grad()
        def push(embedding_BD: Tensor) -> None:  # a graph cannot follow the bank's pointer, which is the host's
            bank.rows.index_copy_(0, place, embedding_BD.to(bank.rows.dtype))
            place.add_(len(place)).remainder_(len(bank.rows))

        step = partial(step_of, self.method, self.optimizer, batch, self.variant.numerics)
        if bank is not None:
            bank.push = push
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        self.method.load_state_dict(before)
        place.copy_(start)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        return _Captured(graph, batch, loss)


def _tensors(batch: Batch) -> dict[str, Any]:
    """The tensors of a batch by their names."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


@dataclass
class _Captured:
    """A graph, the batch that it reads and the loss that it writes."""

    graph: Any
    batch: Batch
    loss: Tensor


@dataclass
class _Source:
    """Batches, made when they are asked for."""

    steps_per_epoch: int
    make: Callable[[], Batch]

    def at(self, step: int) -> Batch:
        """The next batch, whatever the step."""
        return self.make()


def step_of(method: Any, optimizer: torch.optim.Optimizer, batch: Batch, numerics: Numerics) -> Tensor:
    """One step without the loop; its loss, still on the device."""
    with torch.autocast(batch.view_student.device.type, dtype=torch.bfloat16, enabled=numerics.precision == "bf16"):
        out = method(batch)
    optimizer.zero_grad(set_to_none=True)
    out.loss.backward()
    optimizer.step()
    loss: Tensor = out.loss.detach()
    return loss


def work_of(sizes: Sizes) -> tuple[float, float]:
    """FLOP of one step, and elements that the convolutions of one pass over one view write.

    The student's forward and backward pass, the teacher's forward pass, and 8 B K D of the bank's loss. A convolution's border
    counts as work although oneDNN skips it: at 32 px that is most of a ResNet-18's last stage.
    """
    method = build(replace(sizes, bank=sizes.batch), torch.device("cpu"), Numerics())
    written: list[int] = []
    for part in method.student.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _module, _given, out: written.append(out.numel()))
    images = torch.rand(2, 3, sizes.side, sizes.side)
    with FlopCounterMode(display=False) as counter:
        embedding: Tensor = method.student(images)
        embedding = method.predictor(embedding) if hasattr(method, "predictor") else embedding
        embedding.sum().backward()
        with torch.no_grad():
            method.teacher(images)
    network = counter.get_total_flops() / 2 * sizes.batch
    return network + 8.0 * sizes.batch * sizes.bank * embedding.shape[1], math.fsum(written) / 2 * sizes.batch


def _nothing(*_: object) -> None:
    """For hooks."""
