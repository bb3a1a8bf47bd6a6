"""A temperature that oscillates during training, for long-tailed data."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveFloat

from isd_repro.config.fields import Count, Frozen


class TauSchedule(Frozen):
    """Cosine between `tau` and `max`, which begins near `max` and reaches `tau` after `half_period` epochs."""

    max: PositiveFloat
    half_period: Count  # in epochs


# Records made before this key existed lack it, so it is written only where it is given.
OptionalTauSchedule = Annotated[TauSchedule | None, Field(exclude_if=lambda schedule: schedule is None)]


def tau_at(step: int, steps_per_epoch: int, tau: float, schedule: TauSchedule | None) -> float:
    """tau + (max - tau) (1 + cos(pi epoch / half_period)) / 2 with the epoch counted from 1; `tau` where there is no schedule.

    Source: Kukleva et al., ICLR 2023, arXiv 2303.13664; Annusha/temperature_schedules at 4480930, train_simCLR.py.
    """
    if schedule is None:
        return tau
    epoch = step // steps_per_epoch + 1
    return tau + (schedule.max - tau) * (1 + math.cos(math.pi * epoch / schedule.half_period)) / 2
