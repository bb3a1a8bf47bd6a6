"""A tiny problem for any method there is: its options come from the first run of a profile that uses it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn
from torch.optim import Optimizer

from isd_repro import methods
from isd_repro.config.params import BackboneConfig, Cosine, Efficiency, Numerics, Optim
from isd_repro.interfaces import Backbone, Batch, Setting
from isd_repro.nn import backbones, engine
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.runtime.errors import Preempted
from isd_repro.train import checkpoint, loop
from isd_repro.train.checkpoint import RunProgress

ROOT = Path(__file__).parents[2]
BATCH, CLASSES, SIDE, STEPS_PER_EPOCH, EPOCHS = 8, 4, 8, 4, 3
STEPS = STEPS_PER_EPOCH * EPOCHS
NUMERICS = Numerics()  # tests of both engines set the other one
BACKBONE = BackboneConfig(arch="resnet-narrow", width=4, channels=1)
OPTIM = Optim(epochs=EPOCHS, batch_size=BATCH, lr=0.03, schedule=Cosine(name="cosine"))

# Networks that a method can have and the first run with it has not.
VARIANTS: dict[str, dict[str, Any]] = {
    "isd-moco": {"heads": "moco", "dim": 6},
    "isd-none": {"heads": "none", "dim": None},
    "moco-mlp": {"heads": "mlp", "dim": 6},
    "moco-schedule": {"tau_schedule": {"max": 1.0, "half_period": 2}},
    "byol-symmetric": {"symmetric": True},
    "sce-mlp": {"heads": "mlp"},
}


# Of the methods that no profile uses.
UNUSED: dict[str, dict[str, Any]] = {
    "cmsf": {"momentum": 0.99, "neighbours": 3, "candidates": 6, "bank_size": 2 * BATCH},
    "compress": {"teacher": "resnet.pth", "sha256": 64 * "0", "tau": 0.04, "bank_size": 2 * BATCH},
}
PARAMS: list[Path] = []  # of `pytest --params`: only the methods outside the package that it names are tested


def names() -> list[str]:
    """The methods and variants under test."""
    outside = {block["name"] for path in PARAMS for block in _methods_of(path) if "/" in block["name"]}
    return sorted(outside) if PARAMS else [*methods.names(), *VARIANTS]


def has_fast_form(name: str) -> bool:
    """Whether a method reads `Setting.fast`; one that does not is the same with both engines."""
    return "setting.fast" in inspect.getsource(methods.load(name.partition("-")[0] if name in VARIANTS else name))


@cache
def _methods_of(path: Path) -> list[dict[str, Any]]:
    """The `method` block of every run of a profile; as plain YAML, because checking whole profiles takes seconds."""
    return [run["method"] for run in YAML(typ="safe").load(path.read_text("utf-8"))["runs"].values()]


@cache
def profile_options(name: str) -> dict[str, Any]:
    """Keys of the first run that uses a method, with a bank of two batches; a variant's with its own."""
    if name in VARIANTS:
        return {**profile_options(name.partition("-")[0]), **VARIANTS[name]}
    if name in UNUSED:
        return UNUSED[name]
    for path in (*PARAMS, ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))):
        for block in _methods_of(path) if f"name: {name}" in path.read_text("utf-8") else ():
            if block["name"] == name:
                options = {key: value for key, value in block.items() if key != "name"}
                return {**options, "bank_size": 2 * BATCH} if "bank_size" in options else options
    raise AssertionError(f"add a run with method {name} to a params.yaml, so that its tests know values for its keys")


def frozen(path: str, sha256: str) -> Backbone:
    """The same encoder at every call, as a file is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return backbones.build(BACKBONE, SIDE).eval()


def build(
    name: str, *, seed: int = 0, groups: int = 1, options: dict[str, Any] | None = None, batch_size: int = BATCH
) -> nn.Module:
    """A method or one of its variants on a narrow ResNet, as `pretrain` builds it."""
    module = methods.load(name.partition("-")[0] if name in VARIANTS else name)
    values = module.Config.model_validate(profile_options(name) if options is None else options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = STEPS_PER_EPOCH * batch_size
        setting = Setting(
            classes=CLASSES,
            images=images,
            batch_size=batch_size,
            steps=STEPS,
            frozen=frozen,
            **engine.setting_of(NUMERICS),
        )
        method: nn.Module = module.Method(values, lambda: backbones.build(BACKBONE, SIDE), setting)
    set_bn_groups(method, groups)
    return method.train()


class Noise:
    """Batches by step: a pattern of the label under noise, two views of it."""

    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(
        self,
        seed: int = 0,
        batch_size: int = BATCH,
        side: int = SIDE,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seed, self.batch_size, self.side, self.device, self.dtype = seed, batch_size, side, device, dtype

    def at(self, step: int) -> Batch:
        count, shape = self.batch_size, (1, self.side, self.side)
        draws = torch.Generator().manual_seed(10_000 * self.seed + step)
        label = torch.randperm(count, generator=draws) % CLASSES
        pattern = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(99))[label]
        views = [(pattern + 0.5 * torch.randn(count, *shape, generator=draws)).to(self.dtype) for _ in range(2)]
        shuffle = torch.randperm(count, generator=draws)
        one, other, index, label, shuffle = (each.to(self.device) for each in (*views, torch.arange(count), label, shuffle))
        return Batch(one, other, index, label, shuffle, step)


def optimizer_of(method: nn.Module) -> Optimizer:
    optimizer = loop.optimizer_of(method, OPTIM, NUMERICS)
    assert optimizer is not None
    return optimizer


def nothing(*_: object) -> None:
    """A hook that does nothing."""


def train(
    method: nn.Module,
    optimizer: Optimizer | None = None,
    progress: RunProgress | None = None,
    *,
    seed: int = 0,
    efficiency: Efficiency | None = None,
    save: Callable[[RunProgress], None] = nothing,
    stop_after: int | None = None,
    device: str = "cpu",
) -> RunProgress:
    """Through the real loop, to the end or until it is asked to stop after a step."""
    progress = progress or RunProgress()
    hooks = loop.Hooks(
        save=save, epoch=nothing, tick=nothing, stopped=lambda: stop_after is not None and progress.step >= stop_after
    )
    optimizer = optimizer or optimizer_of(method)
    batches = Noise(seed, device=device)
    loop.train(method, optimizer, batches, OPTIM, NUMERICS, efficiency or Efficiency(), progress, hooks)
    return progress


def losses(method: nn.Module, first: int, last: int, optimizer: Optimizer | None = None, *, seed: int = 0) -> list[float]:
    """Plain steps, and the loss of each."""
    return steps(method, [Noise(seed).at(step) for step in range(first, last)], optimizer or optimizer_of(method))


def steps(method: nn.Module, batches: list[Batch], optimizer: Optimizer) -> list[float]:
    """One step on each batch, without the loop."""
    found = []
    for batch in batches:
        loss: Tensor = method(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A state dict's tensors; nested dictionaries by joined names."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


def assert_equal_states(one: nn.Module | Optimizer, other: nn.Module | Optimizer) -> None:
    """Bit for bit."""
    ours, theirs = flat(one.state_dict()), flat(other.state_dict())
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert different == []


def assert_resumes_exactly(name: str, path: Path, device: str = "cpu", groups: int = 1) -> None:
    """Stopped in the second epoch, with the bank's pointer in mid-bank, and gone on with from a file at `path`."""
    stop, where = STEPS_PER_EPOCH + 2, torch.device(device)
    layout = torch.preserve_format if device == "cpu" else torch.channels_last

    def made(seed: int = 0) -> tuple[nn.Module, Optimizer]:
        method = build(name, seed=seed, groups=groups).to(device=where, memory_format=layout)  # type: ignore[call-overload]
        return method, optimizer_of(method)

    whole, optimizer = made()
    undisturbed = train(whole, optimizer, device=device)
    stopped, first = made()
    with pytest.raises(Preempted, match=f"after step {stop};"):
        train(stopped, first, save=lambda now: checkpoint.save(path, "0123", stopped, first, now), stop_after=stop, device=device)
    resumed, second = made(seed=5)
    progress = checkpoint.load(path, "0123", resumed, second, where)
    assert progress.step == stop
    train(resumed, second, progress, device=device)
    assert (progress.step, progress.curve) == (undisturbed.step, undisturbed.curve)
    assert len(progress.curve) == EPOCHS
    assert_equal_states(whole, resumed)
    assert_equal_states(optimizer, second)
