"""The training loop: it drives any method and knows none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from isd_repro.errors import Preempted, UserError
from isd_repro.params import Efficiency, Numerics, Optim
from isd_repro.protocols import Batch, StepOutput
from isd_repro.train.checkpoint import Progress
from isd_repro.train.schedule import lr_at


class BatchSource(Protocol):
    """Batches by step number."""

    steps_per_epoch: int

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; all of it may be slow, none of it changes a number."""

    save: Callable[[Progress], None]  # write a resume point
    epoch: Callable[[dict[str, float]], None]  # an epoch's row of the curve
    tick: Callable[[int, float], None]  # step and loss, every log interval
    stopped: Callable[[], bool]  # has a signal asked to stop?


def optimizer_of(method: nn.Module, optim: Optim) -> Optimizer:
    """SGD over every parameter that takes a gradient, BatchNorm and biases included (paper.md 1.2)."""
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return SGD(parameters, lr=optim.lr, momentum=optim.sgd_momentum, weight_decay=optim.weight_decay)


def train(
    method: nn.Module,
    optimizer: Optimizer,
    batches: BatchSource,
    optim: Optim,
    numerics: Numerics,
    efficiency: Efficiency,
    progress: Progress,
    hooks: Hooks,
) -> None:
    """Train from `progress.step` to the end, updating `progress` in place.

    Raises:
        Preempted: a signal asked to stop; the resume point is written.
        UserError: the loss is not finite; the last resume point is from before that step.
    """
    method.train()
    device = next(method.parameters()).device
    started = time.monotonic() - progress.seconds
    for step in range(progress.step, optim.epochs * batches.steps_per_epoch):
        epoch = step // batches.steps_per_epoch + 1
        _set_lr(optimizer, lr_at(epoch, optim))
        batch = batches.at(step)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=numerics.precision == "bf16"):
            out: StepOutput = method(batch)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        optimizer.step()
        _add(progress.sums, {"loss": out.loss.detach(), **out.metrics})
        progress.step = step + 1
        ends_epoch = progress.step % batches.steps_per_epoch == 0
        stopping = hooks.stopped()
        if stopping or ends_epoch or progress.step % efficiency.log_every == 0:  # no state is saved unchecked
            loss = float(out.loss.detach())
            if not math.isfinite(loss) or not math.isfinite(float(progress.sums["loss"])):
                raise UserError(
                    f"step {step} (epoch {epoch}): the loss is {loss}; the last resume point is from before it",
                    "lower optim.lr or raise the temperatures; the resume point is kept until a parameter changes",
                )
            hooks.tick(progress.step, loss)
        progress.seconds = time.monotonic() - started
        if ends_epoch:
            _end_epoch(progress, epoch, optim, batches.steps_per_epoch, hooks.epoch)
            if epoch % efficiency.checkpoint_every == 0 and epoch < optim.epochs:
                hooks.save(progress)
        if stopping and progress.step < optim.epochs * batches.steps_per_epoch:
            hooks.save(progress)
            raise Preempted(f"stopped after step {progress.step}; the state is saved", "run the same command again to resume")


def _end_epoch(progress: Progress, epoch: int, optim: Optim, steps: int, report: Callable[[dict[str, float]], None]) -> None:
    means = {name: float(total) / steps for name, total in progress.sums.items()}
    row = {"epoch": float(epoch), "lr": lr_at(epoch, optim), **means}
    progress.sums = {}
    progress.curve.append(row)
    report(row)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Accumulate on the device: no host sync."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value.clone()


def _set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
