"""Monitoring of training: finite numbers and speed. It does not change the training."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from isd_repro.nn.bank import Bank
from isd_repro.nn.health import purity
from isd_repro.runtime.errors import UserError

_SHOWN = 3  # names that a message lists


# --- finite numbers -------------------------------------------------------------------------------------------------------


class Diverged(UserError):
    """Training produced numbers or features that are not finite."""


def gradient_norm(method: nn.Module) -> float:
    """Euclidean norm of all gradients together; one wait for the device."""
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0


def is_finite(method: nn.Module) -> bool:
    """Whether every weight and buffer is finite; one wait for the device."""
    # One pass over each: a NaN is both ends. isfinite of everything makes five, and a bank is large.
    flags = [torch.isfinite(torch.stack(value.aminmax())).all() for _, value in _values(method) if value.numel()]
    return bool(torch.stack(flags).all()) if flags else True


def causes(method: nn.Module, loss: float, total: float) -> str:
    """What is not finite after a step, in the order in which it comes about; empty where everything is finite.

    Args:
        method: the module, its gradients those of the step.
        loss: the step's loss.
        total: the sum of the losses since the epoch began.
    """
    found = []
    if not math.isfinite(loss):
        found.append(f"the loss is {loss}")
    elif not math.isfinite(total):
        found.append(f"a loss earlier in the epoch was {total}")
    gradients = [(name, value.grad) for name, value in method.named_parameters() if value.grad is not None]
    found += _named("gradient", gradients)
    found += _named("value", _values(method))
    if not found and not math.isfinite(norm := gradient_norm(method)):
        found.append(f"the norm of the gradient is {norm}")
    return "; ".join(found)


def _values(method: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers of floating point."""
    for values in (method.named_parameters(), method.named_buffers()):
        yield from ((name, value.detach()) for name, value in values if value.is_floating_point())


def _named(what: str, values: Iterable[tuple[str, Tensor]]) -> list[str]:
    bad = [name for name, value in values if not bool(torch.isfinite(value).all())]
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return [f"no finite {what} in {', '.join(bad[:_SHOWN])}{more}"] if bad else []


@torch.inference_mode()
def check_features(encoders: Mapping[str, nn.Module], images: Tensor) -> None:
    """Pass one batch (B x C x H x W) through every encoder as an evaluation would.

    Raises:
        Diverged: features that are not finite: the weights may be, but nothing can be made of them.
    """
    for name, encoder in encoders.items():
        training = encoder.training
        encoder.eval()
        features = encoder(images)
        encoder.train(training)
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        if bad:
            message = (
                f"after the last step encoder {name!r} produces features that are not finite for {bad} of {len(images)} images"
            )
            raise Diverged(message, "the weights have grown without bound; lower optim.lr")


# --- an epoch's row -------------------------------------------------------------------------------------------------------
#
# Purity needs labels, which a method does not see, and no memory of its own: the bank holds the last K images in the order of
# their steps, and the images of a step are known from its number.


class Labels(Protocol):
    """Labels by step number."""

    steps_per_epoch: int
    batch_size: int

    def labels_at(self, step: int) -> Tensor:
        """Classes of a step's images, int64, B, in the order of its batch."""
        ...


class Monitor:
    """Measures speed and memory of one process's epochs; the first may continue an epoch that another process began."""

    def __init__(self, method: nn.Module, labels: Labels, first_step: int) -> None:
        self._bank = next((part for part in method.modules() if isinstance(part, Bank)), None)
        self._labels = labels
        self._step, self._since = first_step, time.monotonic()

    def epoch(self, step: int) -> dict[str, float]:
        """To be called when an epoch is done, with the number of steps done since the run began."""
        now = time.monotonic()
        images = (step - self._step) * self._labels.batch_size
        row = {"images_per_second": round(images / max(now - self._since, 1e-9), 1), "memory_mib": round(peak_memory_mib(), 1)}
        if self._bank is not None:
            row["purity"] = bank_purity(self._bank, self._labels, step)
        self._step, self._since = step, time.monotonic()
        return row


def bank_purity(bank: Bank, labels: Labels, step: int) -> float:
    """`health.purity` of a bank after `step` steps, the images of the last of them asking; NaN before there are older ones."""
    rows, batch = len(bank.rows), labels.batch_size
    label = torch.full((rows,), -1)
    steps = range(max(0, step - rows // batch), step)
    for done in steps:
        start = done * batch % rows
        label[start : start + batch] = labels.labels_at(done)
    newest = torch.arange(batch) + (step - 1) * batch % rows
    device = bank.rows.device
    return float(purity(bank.rows, label.to(device), newest.to(device))) if steps else float("nan")


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB: on the GPU if there is one, else resident; NaN on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
