"""The training loop: it drives any method and knows none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from isd_repro.config.params import Efficiency, Numerics, Optim
from isd_repro.interfaces import Batch, StepOutput
from isd_repro.nn.batchnorm import statistics
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import Preempted
from isd_repro.train import monitor
from isd_repro.train.checkpoint import RunProgress
from isd_repro.train.lars import LARS
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

    save: Callable[[RunProgress], None]  # write a checkpoint
    epoch: Callable[[dict[str, float]], None]  # an epoch's row of the curve
    tick: Callable[[int, float], None]  # step and loss, every log interval
    stopped: Callable[[], bool]  # has a signal asked to stop?


def optimizer_of(method: nn.Module, optim: Optim, numerics: Numerics | None = None) -> Optimizer:
    """SGD over every parameter that takes a gradient, BatchNorm and biases included (UMBCvision/ISD at 4bdd603); or `optim.name`.

    With `optim.exclude_norm_and_bias` vectors get no weight decay. Modules in a method's `fixed_lr` keep the first learning
    rate.

    With engine `fast` SGD and AdamW are one kernel on CUDA (DEV-24). Not on a CPU, where it is the slower one for weights in
    channels_last.
    """
    fixed = {id(parameter) for module in getattr(method, "fixed_lr", ()) for parameter in module.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in method.parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 or not optim.exclude_norm_and_bias
            groups.setdefault((decays, id(parameter) in fixed), []).append(parameter)
    on_cuda = any(parameter.is_cuda for members in groups.values() for parameter in members)
    fused = True if numerics and numerics.engine == "fast" and on_cuda else None
    named = [
        {"params": members, "weight_decay": optim.weight_decay if decays else 0.0, "fixed_lr": is_fixed}
        for (decays, is_fixed), members in groups.items()
    ]
    if optim.name == "lars":
        return LARS(named, lr=optim.lr, momentum=optim.sgd_momentum)
    if optim.name == "adamw":
        return AdamW(named, lr=optim.lr, fused=fused)
    return SGD(named, lr=optim.lr, momentum=optim.sgd_momentum, fused=fused)


def train(
    method: nn.Module,
    optimizer: Optimizer,
    batches: BatchSource,
    optim: Optim,
    numerics: Numerics,
    efficiency: Efficiency,
    progress: RunProgress,
    hooks: Hooks,
) -> None:
    """Train from `progress.step` to the end, updating `progress` in place; with several ranks, all of them together.

    Raises:
        Preempted: a signal asked to stop; the checkpoint is written.
        Diverged: a number is not finite; no checkpoint is written after it.
    """
    method.train()
    device = next(method.parameters()).device
    started = time.monotonic() - progress.seconds
    finite = progress.step  # the last step after which everything was checked and finite
    for step in range(progress.step, optim.epochs * batches.steps_per_epoch):
        epoch = step // batches.steps_per_epoch + 1
        _set_lr(optimizer, lr_at(epoch, optim))
        batch = batches.at(step)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=numerics.precision == "bf16"):
            out: StepOutput = method(batch)
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        _average_step(method)
        optimizer.step()
        _add(progress.sums, {"loss": out.loss.detach(), **out.metrics})
        progress.step = step + 1
        ends_epoch = progress.step % batches.steps_per_epoch == 0
        look = ends_epoch or progress.step % efficiency.log_every == 0
        stopping = _stopping(hooks.stopped(), look=look)
        if stopping or look:  # no state is saved unchecked
            loss, progress.sums = _average_metrics(out.loss, progress.sums)
            _check(method, loss, progress, epoch, finite, whole=stopping or ends_epoch)
            finite = progress.step if stopping or ends_epoch else finite
            hooks.tick(progress.step, loss)
        progress.seconds = time.monotonic() - started
        if ends_epoch:
            _end_epoch(progress, epoch, optim, batches.steps_per_epoch, hooks.epoch)
        due = ends_epoch and epoch % efficiency.checkpoint_every == 0
        if (due or stopping) and progress.step < optim.epochs * batches.steps_per_epoch:
            hooks.save(progress)
            if stopping:
                raise Preempted(f"stopped after step {progress.step}; the state is saved", "run the same command again to resume")


def _check(method: nn.Module, loss: float, progress: RunProgress, epoch: int, before: int, *, whole: bool) -> None:
    """Stop where a number is not finite. Loss and gradient are cheap; weights and buffers are read only where `whole`."""
    total = float(progress.sums["loss"])
    all_finite = math.isfinite(loss) and math.isfinite(total) and math.isfinite(monitor.gradient_norm(method))
    if not ranks.anywhere(not (all_finite and (not whole or monitor.is_finite(method)))):
        return
    raise monitor.Diverged(
        f"step {progress.step} (epoch {epoch}): {monitor.causes(method, loss, total)}; all was finite after step {before}",
        "lower optim.lr or raise the temperatures; the checkpoint is kept until a parameter changes",
    )


def _end_epoch(progress: RunProgress, epoch: int, optim: Optim, steps: int, report: Callable[[dict[str, float]], None]) -> None:
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
        if not group.get("fixed_lr"):
            group["lr"] = lr


# --- several ranks ----------------------------------------------------------------------------------------------------------
#
# Every rank holds the whole method and steps through the same batches, each with its part of the rows. After the backward pass
# gradients become their mean over the ranks, so that all take the same step; banks are filled with all ranks' embeddings,
# teachers follow their own student, and nothing else is exchanged.
#
# `DistributedDataParallel` would average gradients too, a part of them during the backward pass. It rearranges its buckets after
# a process's first step, and the order of a sum over ranks follows the place in a bucket: a resumed run would differ from an
# undisturbed one in the last bits. It also sends rank 0's buffers to all (a bank of 131 MB), where BatchNorm's must be averaged.
# So there is one message after the backward pass instead, in the order of the parameters.


def _average_step(method: nn.Module) -> None:
    """Gradients and BatchNorm statistics of this rank's rows become those of the whole batch."""
    if ranks.world() > 1:
        gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
        ranks.average_([*gradients, *statistics(method)])


def _average_metrics(loss: Tensor, sums: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """A step's loss, and sums of metrics since the epoch began, as means over ranks; linear, so at any step."""
    if ranks.world() == 1:
        return float(loss.detach()), dict(sums)
    values = [loss.detach().clone(), *(value.clone() for value in sums.values())]
    ranks.average_(values)
    return float(values[0]), dict(zip(sums, values[1:], strict=True))


def _stopping(asked: bool, *, look: bool) -> bool:
    """Whether to stop after this step: alone at once, else when all look at it together and one of them was asked to."""
    return asked if ranks.world() == 1 else look and ranks.anywhere(asked)
