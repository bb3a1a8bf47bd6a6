"""Writes points.csv: the twelve settings that every cell of the tuning tries. PROTOCOL.md says why and from which ranges.

python reports/claim-2/draw_points.py
"""

from __future__ import annotations

from pathlib import Path

from scipy.stats import qmc

from reports import protocols
from reports.protocols import Settings, rounded

# The first seed with which every pair of view and bank, of view and dim and of decay and bank is drawn equally often.
SEED = 36


def draw() -> list[Settings]:
    """A Latin hypercube of twelve points in eight dimensions, optimised for its centred discrepancy."""
    found: list[Settings] = []
    for number, unit in enumerate(qmc.LatinHypercube(8, optimization="random-cd", rng=SEED).random(12), start=1):
        view, rate, decay, momentum, dim, bank, tau, ratio = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "lr_at_tau_0.1": rounded(0.015 * 8**rate),
                "weight_decay": (1e-4, 5e-4)[int(2 * decay)],
                "momentum": (0.9, 0.95, 0.97, 0.99, 0.996)[int(5 * momentum)],
                "dim": (64, 128, 256)[int(3 * dim)],
                "bank_over_images": (0.1, 0.3, 9.6)[int(3 * bank)],
                "tau_student": rounded(0.05 * 4**tau),
                "tau_teacher_over_student": rounded(0.1 + 0.5 * ratio),
            }
        )
    return found


if __name__ == "__main__":
    protocols.write({Path(__file__).with_name("points.csv"): protocols.table(draw())})
