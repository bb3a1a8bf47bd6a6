"""The profile of `world` with every protocol: dense queries, few labels, another data set, snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.verify import world

PARAMS = (
    world.PARAMS.replace("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}")
    .replace("{epochs: 1, batch_size", "{epochs: 3, batch_size")
    .replace(
        "  linear: {protocol",
        "  knn_dense: {k: [1, 5]}\n"
        "  few_label: {fractions: [0.25, 0.5], seed: 3}\n"
        "  transfer: {sets: [cifar10-folder], c_min: 0.01, c_max: 100.0, c_values: 5}\n"
        "  linear: {protocol",
    )
    .replace(
        "linear_runs: [isd]",
        "linear_runs: [isd]\nknn_dense_runs: [isd]\nfew_label_runs: [isd]\ntransfer_runs: [moco, isd]\ntrajectory_runs: [isd]",
    )
)
NAMES = ("bird", "cat", "dog")
SIDE = 24


def write_target(root: Path) -> None:
    """Stripes of a direction for each class under noise, grey, PNG so that pixels are exact."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 8)):
        for label, cls in enumerate(NAMES):
            (root / part / cls).mkdir(parents=True)
            for number in range(count):
                pattern = np.indices((SIDE, SIDE))[label % 2] * (1 + label // 2) % 2 * 60.0
                pixels = (pattern + draw.normal(90, 60, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / cls / f"{number:02d}.png")
