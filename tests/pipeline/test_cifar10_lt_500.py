"""Both methods of the small CIFAR-10-LT are tuned and trained alike."""

from __future__ import annotations

import runpy
from pathlib import Path

from isd_repro.config import reader
from isd_repro.data.subsets import exponential_sizes

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "reports" / "cifar10-lt-500" / "make_profiles.py"))


def test_both_methods_try_the_same_four_points() -> None:
    runs = reader.load(ROOT / "pipelines" / "cifar10-lt-500-tuning" / "params.yaml")[0].runs
    for point in range(1, 5):
        moco, isd = runs[f"moco-{point}"], runs[f"isd-{point}"]
        assert (moco.optim, moco.backbone, moco.numerics, moco.data) == (isd.optim, isd.backbone, isd.numerics, isd.data)
        for key in ("momentum", "bank_size", "dim"):
            assert moco.method.options[key] == isd.method.options[key]
        assert moco.method.options["tau"] == isd.method.options["tau_student"]


def test_every_imbalance_has_about_the_same_number_of_steps() -> None:
    steps = [epochs * (sum(exponential_sizes(10, 500, imbalance)) // 64) for imbalance, epochs in SCRIPT["EPOCHS"].items()]
    assert steps == [434, 441, 437]
