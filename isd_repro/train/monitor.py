"""What an epoch's row says beside losses: speed, memory and the bank's purity. It watches the loop and changes no number.

Purity needs labels, which a method does not see, and it needs none of its own memory: the bank holds the last K images in
the order of their steps, and the images of a step are known from its number.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Protocol

import torch
from torch import Tensor, nn

from isd_repro.nn.bank import Bank
from isd_repro.nn.health import purity


class Labels(Protocol):
    """Labels by step number."""

    steps_per_epoch: int
    batch_size: int

    def labels_at(self, step: int) -> Tensor:
        """Classes of a step's images, int64, B, in the order of its batch."""
        ...


class Monitor:
    """Measures one process's epochs; the first may be the rest of an epoch that another process began."""

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
    """Most memory that this process has held, in MiB: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
