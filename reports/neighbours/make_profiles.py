"""Writes points.csv and the params.yaml of the three profiles from PROTOCOL.md's settings.

    python reports/neighbours/make_profiles.py

The profile `neighbours` needs chosen.csv, the number of the trial that was taken for each method.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scipy.stats import qmc

from reports import protocols
from reports.protocols import STRONG, VIEWS, Settings, rounded

HERE = Path(__file__).parent
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


def points() -> list[Settings]:
    """Eight points of a Latin hypercube in seven dimensions, optimised for its centred discrepancy."""
    found: list[Settings] = []
    for number, unit in enumerate(qmc.LatinHypercube(7, optimization="random-cd", rng=0).random(8), start=1):
        rate, crop, view, momentum, tau, ratio, bank = (float(value) for value in unit)
        found.append(
            {
                "point": number,
                "lr": rounded(0.03 * 10**rate),
                "crop_min": (0.3, 0.5)[int(2 * crop)],
                "view_teacher": ("weak", "strong")[int(2 * view)],
                "momentum": (0.9, 0.95, 0.99)[int(3 * momentum)],
                "tau_student": rounded(0.05 * 6**tau),
                "tau_teacher_over_student": rounded(0.1 + 0.5 * ratio),
                "bank_size": (256, 512)[int(2 * bank)],
            }
        )
    return found


def method(name: str, at: Settings) -> Settings:
    """A run's `method` block at a point."""
    tau, bank = at["tau_student"], {"momentum": at["momentum"], "bank_size": at["bank_size"]}
    soft = {"tau_student": tau, "tau_teacher": rounded(tau * at["tau_teacher_over_student"])}
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


def run(name: str, at: Settings, label: str, seed: int) -> Settings:
    """One run of a method at a point."""
    weak, strong = {"crop_min": 0.8, "flip": 0.0}, {"crop_min": at["crop_min"], "flip": 0.0}
    teacher = weak if at["view_teacher"] == "weak" or name == "ressl" else strong
    return protocols.run(
        label,
        NOTES,
        {"width": 8, "pool": 2, "channels": 1},
        method(name, at),
        protocols.digits_data(strong, teacher),
        epochs=25,
        lr=at["lr"],
        seed=seed,
    )


def report(title: str, caption: str, **more: Any) -> Settings:
    """The `report` block of a profile."""
    notes = [
        "The protocol is reports/neighbours/PROTOCOL.md, committed before the runs.",
        "Settings are chosen on the queries that are scored, for every method alike.",
        "No number on this page can be compared with a paper: other data, another network, seconds instead of days.",
        protocols.ARITHMETIC,
    ]
    return {"title": title, "caption": caption, "notes": notes, "reference": "untrained", "pixels": "pixels", **more}


def profile(name: str, title: str, caption: str, runs: dict[str, Settings], **more: Any) -> Settings:
    """A whole params.yaml on the digits, with raw pixels and the untrained network."""
    untrained = protocols.untrained(run("byol", points()[0], "", 0))
    runs = {"pixels": protocols.pixels(untrained), "untrained": untrained, **runs}
    efficiency = {"log_every": 16, "checkpoint_every": 25}
    return protocols.profile(name, report(title, caption, **more), {"digits": protocols.DIGITS}, runs, efficiency)


def tuning() -> Settings:
    """Eight trials of each method."""
    runs = {
        f"{name}-{at['point']}": run(name, at, f"{label}, trial {at['point']}", 100)
        for name, label in LABELS.items()
        for at in points()
    }
    caption = "Eight trials of each method on unbalanced digits; the one with the highest 1-NN accuracy on all queries is taken."
    return profile("neighbours-tuning", "ISD's relatives: choice of settings", caption, runs, trials={"group": "all", "k": 1})


def comparison() -> Settings:
    """Every method at its chosen setting, and the two dials from a hard to a soft target; three seeds."""
    chosen = protocols.chosen(HERE / "chosen.csv", points())
    runs: dict[str, Settings] = {}
    for seed in SEEDS:
        for name, at in chosen.items():
            runs[f"{name}-{seed}"] = run(name, at, f"{LABELS[name]}, seed {seed}", seed)
    for seed in SEEDS:
        for lam in LAMS:
            at = {**chosen["sce"], "lam": lam}
            runs[f"sce-lam{round(100 * lam):03d}-{seed}"] = run("sce", at, f"SCE, lam {lam:g}, seed {seed}", seed)
        for ratio in RATIOS:
            at = {**chosen["isd"], "tau_teacher_over_student": ratio}
            runs[f"isd-ratio{round(100 * ratio):02d}-{seed}"] = run("isd", at, f"ISD, ratio {ratio:g}, seed {seed}", seed)
    caption = (
        "Eight self-supervised methods on 1,040 unbalanced digits, each at the best of eight settings, with three"
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

    def of(label: str, method: Settings, teacher: Settings, rate: float) -> Settings:
        notes = ["DEV-01", "DEV-02", "DEV-06"]
        data = protocols.natural_data("unbalanced", STRONG, teacher)
        return protocols.run(label, notes, {"width": 16}, method, data, epochs=15, lr=rate, seed=0)

    untrained = protocols.untrained(of("", {}, STRONG, RATES[0]))
    runs = {"pixels": protocols.pixels(untrained), "untrained": untrained}
    for name, (block, view) in NATURAL.items():
        for rate in RATES:
            label = f"{LABELS[name]}, learning rate {rate:g}"
            runs[f"{name}-lr{round(100 * rate):02d}"] = of(label, block, VIEWS[view], rate)
    caption = (
        "Eight self-supervised methods on 38 unbalanced classes of Tiny-ImageNet at 32 px, each at two learning rates, with one"
        " seed and 1,200 steps. A difference of one seed is no ranking."
    )
    head = report("ISD's relatives on natural images", caption)
    head["notes"] = [note for note in head["notes"] if not note.startswith("Settings are chosen")]
    subsets = {"unbalanced": {"source": protocols.TINY_IMAGENET, "rule": {**protocols.HALVES, "part": "first"}}}
    return protocols.profile("neighbours-tiny-imagenet", head, subsets, runs, {"log_every": 20, "checkpoint_every": 5})


def texts() -> dict[Path, str]:
    """The content of each file."""
    profiles = [tuning(), natural(), *([comparison()] if (HERE / "chosen.csv").exists() else [])]
    return {HERE / "points.csv": protocols.table(points()), **protocols.parameters(__file__, profiles)}


if __name__ == "__main__":
    protocols.write(texts())
