"""`bench tracking`: what tracking costs a training loop, in turns within one process.

One turn trains the same method from the same seed three times for some epochs: bare (no health metric, no row), with W&B off
(health metrics, monitor, `metrics.jsonl`), and with W&B on (the same and a real offline or online W&B run beside it). The order
rotates, so that a machine that gets slower slows all. Starting and ending a W&B run is timed apart: it is paid once a stage.
Inputs lie ready in memory, so that the loop is as fast, and tracking's share as large, as it can be.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from isd_repro.config.params import BackboneConfig, Cosine, Efficiency, Numerics, Optim, Tracking
from isd_repro.interfaces import Batch, Setting
from isd_repro.methods import isd
from isd_repro.nn import backbones
from isd_repro.provenance import describe
from isd_repro.runtime.errors import ConfigError, UserError
from isd_repro.tracking import RunTracker, open_tracker, session
from isd_repro.tracking.names import StageRun
from isd_repro.train import loop
from isd_repro.train.checkpoint import Progress
from isd_repro.train.monitor import Monitor

Arm = Literal["bare", "off", "on"]
ARMS: tuple[Arm, ...] = get_args(Arm)
_OTHERS: tuple[Arm, Arm] = ("off", "bare")


_Taken = tuple[tuple[float, float], float, tuple[float, ...]]


@dataclass(frozen=True)
class Sizes:
    """What is trained, and how often."""

    batch: int = 64
    side: int = 32
    width: int = 16
    bank: int = 1024
    steps: int = 80  # W&B's own process starts beside the first steps, and a turn of seconds would measure that
    epochs: int = 2
    repeats: int = 9


@dataclass(frozen=True)
class Result:
    """Images per second of every turn by arm, and what W&B's start and end took.

    Attributes:
        speed: images/s of the loop by the clock, by arm, one a turn.
        cpu: the same by this process's time on the processor, which is steadier where other programs run.
        ends: seconds of opening and closing the tracker with W&B on, one a turn.
        mode: what W&B was.
        losses: whether all arms of all turns gave the same losses bit for bit.
    """

    sizes: Sizes
    speed: dict[Arm, tuple[float, ...]]
    cpu: dict[Arm, tuple[float, ...]]
    ends: tuple[float, ...]
    mode: str
    losses: bool
    machine: str
    versions: dict[str, str]

    def ratios(self, over: Arm, by: Literal["speed", "cpu"] = "speed") -> list[float]:
        """Speed with W&B on over that of another arm, turn by turn."""
        speed: dict[Arm, tuple[float, ...]] = getattr(self, by)
        return [on / other for on, other in zip(speed["on"], speed[over], strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratios computed."""
        ratios = {f"on_over_{arm}": self.ratios(arm) for arm in _OTHERS}
        medians = {"ratio": statistics.median(self.ratios("off")), "cpu_ratio": statistics.median(self.ratios("off", "cpu"))}
        return {**asdict(self), **ratios, **medians}


class _Source:
    """The same few batches over and over."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.steps_per_epoch, self.batch_size = sizes.steps, sizes.batch
        draw = torch.Generator().manual_seed(0)
        shape = (sizes.batch, 3, sizes.side, sizes.side)
        self._batches = [
            Batch(
                torch.randn(shape, generator=draw).to(device, memory_format=torch.channels_last),
                torch.randn(shape, generator=draw).to(device, memory_format=torch.channels_last),
                torch.arange(sizes.batch, device=device),
                torch.randint(0, 10, (sizes.batch,), generator=draw).to(device),
                torch.randperm(sizes.batch, generator=draw).to(device),
            )
            for _ in range(4)
        ]

    def at(self, step: int) -> Batch:
        return self._batches[step % len(self._batches)]

    def labels_at(self, step: int) -> Tensor:
        return self.at(step).label.cpu()


def bench(sizes: Sizes, on_turn: Callable[[int, dict[Arm, float]], object] = lambda turn, speed: None) -> Result:
    """Measure.

    Raises:
        UserError: W&B is not installed, or is switched off.
        ConfigError: sizes that cannot be trained.
    """
    mode = session.wanted_mode("offline")
    if not session.installed() or mode == "off":
        raise UserError("`bench tracking` needs W&B", "install the extra `tracking`, and set WANDB_MODE to offline")
    if min(asdict(sizes).values()) < 1 or sizes.bank % sizes.batch:
        raise ConfigError(f"cannot train {sizes}", "every size must be 1 or more, and the bank a multiple of the batch")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = _Source(sizes, device)
    speed: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    cpu: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    ends: list[float] = []
    losses: set[tuple[float, ...]] = set()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        _turn("bare", sizes, source, Path(folder), device)  # warms up
        for turn in range(sizes.repeats):
            for arm in (ARMS[(turn + at) % len(ARMS)] for at in range(len(ARMS))):
                taken, around, curve = _turn(arm, sizes, source, Path(folder), device)
                images = sizes.batch * sizes.steps * sizes.epochs
                speed[arm].append(images / taken[0])
                cpu[arm].append(images / taken[1])
                losses.add(curve)
                if arm == "on":
                    ends.append(around)
            on_turn(turn, {arm: values[-1] for arm, values in speed.items()})
    found = describe(0.0)
    place = found.machine
    machine = f"{place.gpu or place.cpu}, {place.threads} of {place.cores} threads, {place.system}"
    return Result(
        sizes=sizes,
        speed={arm: tuple(values) for arm, values in speed.items()},
        cpu={arm: tuple(values) for arm, values in cpu.items()},
        ends=tuple(ends),
        mode=mode,
        losses=len(losses) == 1,
        machine=machine,
        versions=found.versions,
    )


def _turn(arm: Arm, sizes: Sizes, source: _Source, folder: Path, device: torch.device) -> _Taken:
    """Seconds of the loop (clock, processor), seconds of the tracker's start and end, and the losses."""
    optim = Optim(epochs=sizes.epochs, batch_size=sizes.batch, lr=0.03, schedule=Cosine(name="cosine"))
    options = isd.Config(tau_student=0.1, tau_teacher=0.02, momentum=0.99, bank_size=sizes.bank)
    backbone = BackboneConfig(arch="resnet-narrow", width=sizes.width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = isd.Method(options, lambda: backbones.build(backbone, sizes.side), Setting(10, sizes.batch))
    method = method.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    progress = Progress()
    began = time.perf_counter()
    with _without_health(arm == "bare"), _tracker(arm, folder) as tracker:
        monitor = Monitor(method, source, 0)

        def epoch(row: dict[str, float]) -> None:
            if arm != "bare":
                tracker.log({**row, **monitor.epoch(progress.step)})

        hooks = loop.Hooks(save=lambda now: None, epoch=epoch, tick=lambda step, loss: None, stopped=lambda: False)
        started = time.perf_counter(), time.process_time()
        loop.train(method, loop.optimizer_of(method, optim), source, optim, Numerics(), Efficiency(), progress, hooks)
        taken = time.perf_counter() - started[0], time.process_time() - started[1]
    around = time.perf_counter() - began - taken[0]
    return taken, around, tuple(row["loss"] for row in progress.curve)


def _tracker(arm: Arm, folder: Path) -> RunTracker:
    run = StageRun(f"bench-{time.monotonic_ns()}", "bench", "bench", "pretrain", (), {})
    tracking = Tracking(wandb="offline" if arm == "on" else "off", project="isd-repro-bench")
    return open_tracker(folder / "metrics.jsonl", run, tracking=tracking, root=folder)


@contextmanager
def _without_health(wanted: bool) -> Iterator[None]:
    """Within the block the method measures nothing beside its loss."""
    names = vars(isd)
    before = names["health"]
    if wanted:
        names["health"] = lambda *_: {}
    try:
        yield
    finally:
        names["health"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """W&B's chatter at each of many starts stays out of the table."""
    logger = logging.getLogger("wandb")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def lines(result: Result) -> list[str]:
    """What was measured, for a reader."""
    sizes = result.sizes
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    names = {"bare": "bare", "off": "W&B off", "on": f"W&B {result.mode}"}
    loop_size = f"ISD, batch {sizes.batch} of {sizes.side} px, width {sizes.width}, bank {sizes.bank}"
    return [
        f"machine   {result.machine}; {versions}",
        f"loop      {loop_size}, {sizes.epochs} epochs of {sizes.steps} steps, n={sizes.repeats} turns",
        *(f"{names[arm]:<9} {_spread(values, '.1f')} images/s" for arm, values in result.speed.items()),
        f"ratio     {_spread(result.ratios('off'), '.3f')} of the speed with W&B off by the clock,",
        f"          {_spread(result.ratios('off', 'cpu'), '.3f')} by processor time",
        f"ratio     {_spread(result.ratios('bare'), '.3f')} of the bare speed by the clock,",
        f"          {_spread(result.ratios('bare', 'cpu'), '.3f')} by processor time",
        f"once      {_spread(result.ends, '.2f')} s to start and end a W&B run",
        f"losses    {'bit-equal in all turns' if result.losses else 'NOT equal'}",
    ]


def _spread(values: tuple[float, ...] | list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
