"""What tracking costs a training loop.

Each call trains the same method from the same seed for some epochs: `bare` (no health metrics, no row), `W&B off` (health
metrics, monitor, `metrics.jsonl`), and `W&B offline` or `W&B online` (the same and a real W&B run). Only the loop is timed:
starting and ending a W&B run is paid once a stage. Inputs lie ready in memory, so that the loop is as fast, and tracking's share
as large, as it can be. The check is that all variants have the same losses, bit for bit.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import harness
from isd_repro.config.params import BackboneConfig, Cosine, Efficiency, Numerics, Optim, Tracking
from isd_repro.interfaces import Batch, Setting
from isd_repro.methods import isd
from isd_repro.nn import backbones
from isd_repro.runtime.errors import ConfigError, UserError
from isd_repro.tracking import open_tracker, session
from isd_repro.tracking.names import StageRun
from isd_repro.train import loop
from isd_repro.train.checkpoint import RunProgress
from isd_repro.train.monitor import Monitor


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """What is trained."""

    batch: int = 64
    side: int = 32
    width: int = 16
    bank: int = 1024
    steps: int = 80  # W&B's own process starts beside the first steps; fewer would measure that
    epochs: int = 2


CPU = {"tracking": Sizes(repetitions=9)}
CUDA = CPU


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, batch=8, side=16, width=2, bank=16, steps=2, repetitions=1)


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare.

    Raises:
        UserError: W&B is not installed, or is switched off.
        ConfigError: the bank is not a multiple of the batch.
    """
    mode = session.wanted_mode("offline")
    if not session.installed() or mode == "off":
        raise UserError("this comparison needs W&B", "install the extra `tracking`, and set WANDB_MODE to offline")
    if sizes.bank % sizes.batch:
        raise ConfigError(f"cannot train {sizes}", "the bank must be a multiple of the batch")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    source = _Source(sizes, harness.device_of())
    losses: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def work(name: str) -> Callable[[], harness.Seconds]:
            return lambda: _train(name, sizes, source, Path(folder), losses)

        def check(name: str) -> dict[str, tuple[float, float]]:
            works[name]()
            same = losses[name] == losses["bare"] if "bare" in losses else True
            return {"losses differ": (float(not same), 0.0)}

        works = {name: work(name) for name in ("bare", "W&B off", f"W&B {mode}")}
        return harness.compare("tracking", sizes, works, check=check, say=say)


def _train(name: str, sizes: Sizes, source: _Source, folder: Path, losses: dict[str, tuple[float, ...]]) -> harness.Seconds:
    """Train once; seconds of the loop."""
    optim = Optim(epochs=sizes.epochs, batch_size=sizes.batch, lr=0.03, schedule=Cosine(name="cosine"))
    options = isd.Config(tau_student=0.1, tau_teacher=0.02, momentum=0.99, bank_size=sizes.bank)
    backbone = BackboneConfig(arch="resnet-narrow", width=sizes.width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        setting = Setting(classes=10, images=sizes.batch, batch_size=sizes.batch, steps=1)
        method = isd.Method(options, lambda: backbones.build(backbone, sizes.side), setting)
    method = method.to(device=source.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress, bare = RunProgress(), name == "bare"
    run = StageRun(f"bench-{time.monotonic_ns()}", "bench", "bench", "pretrain", (), {})
    tracking = Tracking(wandb="off" if bare or name.endswith("off") else "offline", project="isd-repro-bench")
    tracker = open_tracker(folder / "metrics.jsonl", run, tracking=tracking, root=folder)
    with patch.object(isd, "health", lambda *_: {}) if bare else nullcontext(), tracker as opened:
        monitor = Monitor(method, source, 0)

        def epoch(row: dict[str, float]) -> None:
            if not bare:
                opened.log({**row, **monitor.epoch(progress.step)})

        hooks = loop.Hooks(save=lambda now: None, epoch=epoch, tick=lambda step, loss: None, stopped=lambda: False)

        def work() -> None:
            loop.train(method, loop.optimizer_of(method, optim), source, optim, Numerics(), Efficiency(), progress, hooks)

        seconds = harness.Seconds(harness.seconds_of(work, source.device))
    losses[name] = tuple(row["loss"] for row in progress.curve)
    return seconds


class _Source:
    """The same four batches over and over."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.steps_per_epoch, self.batch_size, self.device = sizes.steps, sizes.batch, device
        draws, shape = torch.Generator().manual_seed(0), (sizes.batch, 3, sizes.side, sizes.side)
        self._batches = []
        for _ in range(4):
            one, other = (torch.randn(shape, generator=draws).to(memory_format=torch.channels_last) for _ in range(2))
            label = torch.randint(0, 10, (sizes.batch,), generator=draws)
            index, shuffle = torch.arange(sizes.batch), torch.randperm(sizes.batch, generator=draws)
            one, other, index, label, shuffle = (value.to(device) for value in (one, other, index, label, shuffle))
            self._batches.append(Batch(one, other, index, label, shuffle))

    def at(self, step: int) -> Batch:
        return self._batches[step % len(self._batches)]

    def labels_at(self, step: int) -> Tensor:
        return self.at(step).label.cpu()
