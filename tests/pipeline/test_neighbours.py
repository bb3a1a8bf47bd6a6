"""Every one of ISD's relatives has the same tuning budget."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from isd_repro.config import reader

ROOT = Path(__file__).parents[2]


def test_every_method_tries_the_same_eight_points() -> None:
    runs = reader.load(ROOT / "pipelines" / "neighbours-tuning" / "params.yaml")[0].runs
    trials = {name: run for name, run in runs.items() if run.optim.epochs}
    assert set(Counter(name.rpartition("-")[0] for name in trials).values()) == {8}
    for point in range(1, 9):
        alike = [run for name, run in trials.items() if name.endswith(f"-{point}")]
        for run in alike:
            assert (run.optim, run.backbone, run.numerics) == (alike[0].optim, alike[0].backbone, alike[0].numerics)
            assert run.data.view_student == alike[0].data.view_student
