"""Writes points.csv and the params.yaml of the profiles cifar10-lt-500-tuning and cifar10-lt-500 from PROTOCOL.md's settings.

    python reports/cifar10-lt-500/make_profiles.py

The profile `cifar10-lt-500` needs chosen.csv, the number of the trial that was taken for each method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scipy.stats import qmc

from reports import protocols
from reports.protocols import STRONG, VIEWS, WEAK, Settings, rounded

HERE = Path(__file__).parent
NOTES = ["DEV-01", "DEV-02", "DEV-06", "DEV-26"]
LABELS = {"moco": "MoCo v2", "isd": "ISD"}
EPOCHS = {10: 14, 50: 21, 100: 23}  # by imbalance: 434, 441 and 437 steps
SEEDS = (0, 1, 2)


def points() -> list[Settings]:
    """Four points of a Latin hypercube in five dimensions, optimised for its centred discrepancy."""
    found: list[Settings] = []
    for number, unit in enumerate(qmc.LatinHypercube(5, optimization="random-cd", rng=0).random(4), start=1):
        rate, view, momentum, tau, ratio = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "lr": rounded(0.03 * 10**rate),
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "momentum": rounded(1 - 0.1 * 10**-momentum),
                "tau_student": rounded(0.05 * 6**tau),
                "tau_teacher_over_student": rounded(0.1 + 0.5 * ratio),
            }
        )
    return found


def method(name: str, at: Settings) -> Settings:
    """A run's `method` block at a point."""
    tau, bank = at["tau_student"], {"momentum": at["momentum"], "bank_size": 256}
    if name == "moco":
        return {"name": "moco", "tau": tau, **bank, "dim": 128}
    soft = {"tau_student": tau, "tau_teacher": rounded(tau * at["tau_teacher_over_student"])}
    return {"name": "isd", **soft, **bank, "bank_init": "unit", "heads": "mlp", "dim": 128}


def run(label: str, imbalance: int, seed: int, block: Settings, *, lr: float, student: Settings, teacher: Settings) -> Settings:
    """One run with its two views."""
    data = protocols.natural_data(f"r{imbalance}", student, teacher)
    return protocols.run(label, NOTES, {"width": 8}, block, data, epochs=EPOCHS[imbalance], lr=lr, seed=seed)


def trained(name: str, at: Settings, label: str, imbalance: int, seed: int) -> Settings:
    """A method at a point."""
    teacher = VIEWS[at["view_teacher"]]
    return run(label, imbalance, seed, method(name, at), lr=at["lr"], student=STRONG, teacher=teacher)


def references(imbalance: int) -> dict[str, Settings]:
    """Raw pixels, the untrained network, and one that learns from the labels of the subset."""
    label, block = f"Supervised (r{imbalance})", {"name": "supervised"}
    supervised = run(label, imbalance, 0, block, lr=0.1, student=WEAK, teacher=WEAK)
    untrained = protocols.untrained(supervised, f"Untrained (r{imbalance})")
    pixels = protocols.pixels(untrained, f"Raw pixels (r{imbalance})")
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
        protocols.ARITHMETIC,
    ]
    first = imbalances[0]
    references = {"reference": f"untrained-r{first}", "pixels": f"pixels-r{first}"}
    head = {"title": title, "caption": caption, "notes": notes, **references, **report}
    source = {"name": "image-folder", "dataset": "CIFAR-10 (500 training images a class)", "root_env": "ISD_CIFAR_ROOT"}
    subsets = {
        f"r{imbalance}": {
            "source": source,
            "rule": {"name": "exponential", "imbalance": imbalance, "seed": 0},
            "shots": {"many_above": 100, "few_below": 20},
        }
        for imbalance in imbalances
    }
    return protocols.profile(name, head, subsets, runs, {"log_every": 20, "checkpoint_every": 25})


def tuning() -> Settings:
    """Four trials of each method at an imbalance of 50."""
    runs = {name: one for name, one in references(50).items() if not name.startswith("supervised")}
    for name, label in LABELS.items():
        for at in points():
            runs[f"{name}-{at['point']}"] = trained(name, at, f"{label}, trial {at['point']}", 50, 100)
    caption = "Four trials of each method at an imbalance of 50; the one with the highest 1-NN accuracy on all queries is taken."
    title = "CIFAR-10-LT from 500 images a class: choice of settings"
    return profile("cifar10-lt-500-tuning", title, caption, (50,), runs, trials={"group": "all", "k": 1})


def comparison() -> Settings:
    """Both methods at their chosen settings, three imbalances, three seeds."""
    chosen = protocols.chosen(HERE / "chosen.csv", points())
    runs: dict[str, Settings] = {}
    for imbalance in EPOCHS:
        runs |= references(imbalance)
    for seed in SEEDS:
        for imbalance in EPOCHS:
            for name, at in chosen.items():
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
    profiles = [tuning(), *([comparison()] if (HERE / "chosen.csv").exists() else [])]
    return {HERE / "points.csv": protocols.table(points()), **protocols.parameters(__file__, profiles)}


if __name__ == "__main__":
    protocols.write(texts())
