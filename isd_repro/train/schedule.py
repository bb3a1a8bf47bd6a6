"""Learning rates as pure functions of the epoch."""

from __future__ import annotations

import math

from isd_repro.config.params import Optim, Step


def lr_at(epoch: int, optim: Optim) -> float:
    """Learning rate of an epoch counted from 1.

    Step: lr * factor ** (milestones before this epoch). Cosine: lr * (1 + cos(pi * (epoch - 1) / epochs)) / 2, constant
    within an epoch (train_isd.py of UMBCvision/ISD at 4bdd603).

    With `warmup_epochs` W the first W epochs have lr / W, 2 lr / W, ..., lr, and the cosine covers the epochs after them.
    """
    warmup = optim.warmup_epochs
    if epoch <= warmup:
        return optim.lr * epoch / warmup
    if isinstance(optim.schedule, Step):
        return optim.lr * optim.schedule.factor ** sum(epoch > milestone for milestone in optim.schedule.milestones)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1 - warmup) / (optim.epochs - warmup)))
