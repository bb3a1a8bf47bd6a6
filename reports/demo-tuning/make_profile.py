"""Writes points.csv and the params.yaml of the profile demo-tuning from PROTOCOL.md's settings.

python reports/demo-tuning/make_profile.py
"""

from __future__ import annotations

from pathlib import Path

from scipy.stats import qmc

from reports import protocols
from reports.protocols import Settings, rounded

HERE = Path(__file__).parent
LABELS = {"isd": "ISD", "moco": "MoCo v2"}
FINALISTS = {"isd": (17, 18, 24, 19), "moco": (22, 20, 7, 5)}  # the four best trials of each


def points() -> list[Settings]:
    """Sixteen points of a scrambled Sobol sequence in seven dimensions, and eight of a second one in the narrower ranges."""
    units = [(unit, False) for unit in qmc.Sobol(7, rng=0).random_base2(4)]
    units += [(unit, True) for unit in qmc.Sobol(7, rng=1).random_base2(3)]
    found: list[Settings] = []
    for number, (unit, second) in enumerate(units, start=1):
        lr, crop, view, momentum, tau, ratio, bank = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "lr": rounded(0.015 * 4**lr if second else 0.02 * 7.5**lr),
                "crop_min": (0.3, 0.45, 0.6, 0.75)[int(4 * crop)],
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "momentum": rounded(1 - 0.01 * 10**momentum),
                "tau_student": rounded(0.05 * 4**tau),
                "tau_teacher_over_student": rounded(0.05 + 0.15 * ratio if second else 0.1 + 0.4 * ratio),
                "bank_size": (256, 512)[int(2 * bank)],
                "pool": 4 if second else 2,
            }
        )
    return found


def run(name: str, at: Settings, seed: int = 100) -> Settings:
    """A trial of a method at a point."""
    tau, bank = at["tau_student"], {"momentum": at["momentum"], "bank_size": at["bank_size"], "dim": 64}
    soft = {"tau_student": tau, "tau_teacher": rounded(tau * at["tau_teacher_over_student"]), **bank}
    strong = {"crop_min": at["crop_min"], "flip": 0.0}
    return protocols.run(
        f"{LABELS[name]}, trial {at['point']}" + (f", seed {seed}" if seed != 100 else ""),
        ["DEV-01", "DEV-02", "DEV-07"],
        {"width": 8, "pool": at["pool"], "channels": 1},
        {"name": "isd", "heads": "mlp", **soft} if name == "isd" else {"name": "moco", "tau": tau, **bank},
        protocols.digits_data(strong, strong if at["view_teacher"] == "strong" else {"crop_min": 0.8, "flip": 0.0}),
        epochs=25,
        lr=at["lr"],
        seed=seed,
    )


def profile() -> Settings:
    """The whole params.yaml."""
    trials = {f"{name}-{at['point']}": run(name, at) for name in LABELS for at in points()}
    for name, numbers in FINALISTS.items():
        trials |= {f"{name}-{number}-{seed}": run(name, points()[number - 1], seed) for number in numbers for seed in (101, 102)}
    untrained = protocols.untrained(trials["isd-1"], notes=[])
    report = {
        "title": "Demo: choice of settings",
        "caption": "Twenty-four trials each of ISD and MoCo v2 on centred digits; the best of each is the demo's setting.",
        "notes": [
            "The protocol is reports/demo-tuning/PROTOCOL.md, committed before the runs.",
            "Settings are chosen on the queries that are scored, for both methods alike; the demo scores them shifted.",
            protocols.ARITHMETIC,
        ],
        "reference": "untrained",
        "pixels": "pixels",
        "trials": {"group": "all", "k": 1},
    }
    runs = {"pixels": protocols.pixels(untrained), "untrained": untrained, **trials}
    efficiency = {"log_every": 16, "checkpoint_every": 25}
    return protocols.profile("demo-tuning", report, {"digits": protocols.DIGITS}, runs, efficiency)


def texts() -> dict[Path, str]:
    """The content of each file."""
    return {HERE / "points.csv": protocols.table(points()), **protocols.parameters(__file__, [profile()])}


if __name__ == "__main__":
    protocols.write(texts())
