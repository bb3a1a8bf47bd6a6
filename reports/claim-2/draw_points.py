"""Writes points.csv: the twelve settings that every cell of the tuning tries. PROTOCOL.md says why and from which ranges.

python reports/claim-2/draw_points.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from scipy.stats import qmc

# The first seed with which every pair of view and bank, of view and dim and of decay and bank is drawn equally often.
SEED = 36


def digits(value: float) -> float:
    """The value with three significant digits."""
    return float(f"{value:.3g}")


def draw() -> list[dict[str, object]]:
    """A Latin hypercube of twelve points in eight dimensions, optimised for its centred discrepancy."""
    found: list[dict[str, object]] = []
    for number, unit in enumerate(qmc.LatinHypercube(8, optimization="random-cd", rng=SEED).random(12), start=1):
        view, rate, decay, momentum, dim, bank, tau, ratio = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "lr_at_tau_0.1": digits(0.015 * 8**rate),
                "weight_decay": (1e-4, 5e-4)[int(2 * decay)],
                "momentum": (0.9, 0.95, 0.97, 0.99, 0.996)[int(5 * momentum)],
                "dim": (64, 128, 256)[int(3 * dim)],
                "bank_over_images": (0.1, 0.3, 9.6)[int(3 * bank)],
                "tau_student": digits(0.05 * 4**tau),
                "tau_teacher_over_student": digits(0.1 + 0.5 * ratio),
            }
        )
    return found


if __name__ == "__main__":
    with Path(__file__).with_name("points.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, list(draw()[0]), lineterminator="\n")
        rows.writeheader()
        rows.writerows(draw())
