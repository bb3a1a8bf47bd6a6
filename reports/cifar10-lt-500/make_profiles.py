"""Writes points.csv and the params.yaml of the profiles cifar10-lt-500-tuning and cifar10-lt-500 from PROTOCOL.md's settings.

    python reports/cifar10-lt-500/make_profiles.py

The profile `cifar10-lt-500` needs chosen.csv, the number of the trial that was taken for each method.
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
NOTES = ["DEV-01", "DEV-02", "DEV-06", "DEV-26"]
LABELS = {"moco": "MoCo v2", "isd": "ISD"}
EPOCHS = {10: 14, 50: 21, 100: 23}  # by imbalance: 434, 441 and 437 steps
SEEDS = (0, 1, 2)
WEAK = {"crop_min": 0.2, "flip": 0.5}
STRONG = {  # MoCo v2's augmentation without its blur  # DEV-06
    **WEAK,
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8},
    "grayscale": 0.2,
}
Settings = dict[str, Any]


def digits(value: float) -> float:
    """The value with three significant digits."""
    return float(f"{value:.3g}")


def points() -> list[Settings]:
    """Four points of a Latin hypercube in five dimensions, optimised for its centred discrepancy."""
    found: list[Settings] = []
    for number, unit in enumerate(qmc.LatinHypercube(5, optimization="random-cd", rng=0).random(4), start=1):
        rate, view, momentum, tau, ratio = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "lr": digits(0.03 * 10**rate),
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "momentum": digits(1 - 0.1 * 10**-momentum),
                "tau_student": digits(0.05 * 6**tau),
                "tau_teacher_over_student": digits(0.1 + 0.5 * ratio),
            }
        )
    return found


def method(name: str, at: Settings) -> Settings:
    """A run's `method` block at a point."""
    tau, bank = at["tau_student"], {"momentum": at["momentum"], "bank_size": 256}
    if name == "moco":
        return {"name": "moco", "tau": tau, **bank, "dim": 128}
    soft = {"tau_student": tau, "tau_teacher": digits(tau * at["tau_teacher_over_student"])}
    return {"name": "isd", **soft, **bank, "bank_init": "unit", "heads": "mlp", "dim": 128}


def run(label: str, imbalance: int, seed: int, block: Settings, *, lr: float, teacher: Settings = STRONG) -> Settings:
    """One run; a method that learns from labels sees the weak view."""
    return {
        "label": label,
        "notes": NOTES,
        "backbone": {"arch": "resnet-narrow", "width": 8},
        "method": block,
        "optim": {
            "epochs": EPOCHS[imbalance],
            "batch_size": 64,
            "lr": lr,
            "sgd_momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": {"name": "cosine"},
        },
        "data": {
            "subset": f"r{imbalance}",
            "image_size": 32,
            "crop_ratio": 1.0,
            "view_student": WEAK if block["name"] == "supervised" else STRONG,
            "view_teacher": teacher,
        },
        "numerics": {"seed": seed, "bn_groups": 2, "precision": "float32", "threads": 1},
    }


def trained(name: str, at: Settings, label: str, imbalance: int, seed: int) -> Settings:
    """A method at a point."""
    views = {"weak": WEAK, "strong": STRONG}
    return run(label, imbalance, seed, method(name, at), lr=at["lr"], teacher=views[at["view_teacher"]])


def references(imbalance: int) -> dict[str, Settings]:
    """Raw pixels, the untrained network, and one that learns from the labels of the subset."""
    supervised = run(f"Supervised (r{imbalance})", imbalance, 0, {"name": "supervised"}, lr=0.1, teacher=WEAK)
    untrained = {**supervised, "label": f"Untrained (r{imbalance})", "optim": {**supervised["optim"], "epochs": 0}}
    pixels = {**untrained, "label": f"Raw pixels (r{imbalance})", "backbone": {"arch": "pixels"}}
    named = {"pixels": pixels, "untrained": untrained, "supervised": supervised}
    return {f"{name}-r{imbalance}": one for name, one in named.items()}


def profile(
    name: str, title: str, caption: str, imbalances: tuple[int, ...], runs: dict[str, Settings], **report: Any
) -> Settings:
    """A whole params.yaml on 500 images a class."""
    notes = [
        "The protocol is reports/cifar10-lt-500/PROTOCOL.md, committed before the runs.",
        "Settings were chosen on the queries that are scored, for both methods alike.",
        "One draw of the images; the three seeds vary weights, order and views.",
        "The first class by name is the largest in every set: the size of a class is confounded with what it shows.",
        "Runs are a few hundred steps long. No number here can be compared with a paper's.",
        "Evaluation departs from the released code where it breaks ties and in its arithmetic (DEV-04).",
    ]
    head = {"title": title, "caption": caption, "notes": notes}
    first = imbalances[0]
    return {
        "profile": name,
        "root": "../..",
        "report": {**head, "reference": f"untrained-r{first}", "pixels": f"pixels-r{first}", **report},
        "evaluation": {"knn": {"k": [1, 20]}},
        "efficiency": {"log_every": 20, "checkpoint_every": 25},
        "tracking": {"wandb": "auto", "project": "isd-repro"},
        "subsets": {
            f"r{imbalance}": {
                "source": {
                    "name": "image-folder",
                    "dataset": "CIFAR-10 (500 training images a class)",
                    "root_env": "ISD_CIFAR_ROOT",
                },
                "rule": {"name": "exponential", "imbalance": imbalance, "seed": 0},
                "shots": {"many_above": 100, "few_below": 20},
            }
            for imbalance in imbalances
        },
        **{f"{evaluation}_runs": [] for evaluation in ("linear", "knn_dense", "few_label", "transfer", "trajectory")},
        "runs": runs,
    }


def tuning() -> Settings:
    """Four trials of each method at an imbalance of 50."""
    runs = {name: one for name, one in references(50).items() if not name.startswith("supervised")}
    for name, label in LABELS.items():
        for at in points():
            runs[f"{name}-{at['point']}"] = trained(name, at, f"{label}, trial {at['point']}", 50, 100)
    caption = "Four trials of each method at an imbalance of 50; the one with the highest 1-NN accuracy on all queries is taken."
    title = "CIFAR-10-LT from 500 images a class: choice of settings"
    return profile("cifar10-lt-500-tuning", title, caption, (50,), runs, trials={"group": "all", "k": 1})


def chosen() -> dict[str, Settings]:
    """The settings of the trial that was taken for each method."""
    with (HERE / "chosen.csv").open(newline="", encoding="utf-8") as file:
        return {row["method"]: points()[int(row["trial"]) - 1] for row in csv.DictReader(file)}


def comparison() -> Settings:
    """Both methods at their chosen settings, three imbalances, three seeds."""
    runs: dict[str, Settings] = {}
    for imbalance in EPOCHS:
        runs |= references(imbalance)
    for seed in SEEDS:
        for imbalance in EPOCHS:
            for name, at in chosen().items():
                label = f"{LABELS[name]} (r{imbalance}, seed {seed})"
                runs[f"{name}-r{imbalance}-s{seed}"] = trained(name, at, label, imbalance, seed)
    caption = (
        "Pretraining without labels on class sizes that fall exponentially from 500 images to 50 (r10), 10 (r50) or 5 (r100)."
        " Nearest neighbours of 1,000 test images among all 5,000 training images, whose classes are of equal size."
    )
    title = "CIFAR-10-LT from 500 images a class: imbalances of 10, 50 and 100"
    return profile("cifar10-lt-500", title, caption, tuple(EPOCHS), runs)


def texts() -> dict[Path, str]:
    """The content of each file."""
    found = {}
    table = io.StringIO()
    rows = csv.DictWriter(table, list(points()[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(points())
    found[HERE / "points.csv"] = table.getvalue()
    profiles = [tuning()]
    if (HERE / "chosen.csv").exists():
        profiles.append(comparison())
    head = "# Made by reports/cifar10-lt-500/make_profiles.py; what it is for stands in reports/cifar10-lt-500/PROTOCOL.md.\n"
    return found | {PIPELINES / each["profile"] / "params.yaml": head + dump(styled(each)) for each in profiles}


if __name__ == "__main__":
    for path, text in texts().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
