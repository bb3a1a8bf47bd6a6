"""Writes the params.yaml of the profiles claim-2-gate and claim-2-tuning from PROTOCOL.md's settings and points.csv.

    python reports/claim-2/make_profiles.py

The files are written out in full, without YAML anchors, so that every run can be read, and overridden, by itself.
"""

from __future__ import annotations

import csv
from pathlib import Path

from reports import protocols
from reports.protocols import BATCH, STRONG, VIEWS, Settings, rounded

HERE = Path(__file__).parent
TRAIN_IMAGES = 5140  # of a set: 8 x 500 + 30 x 38
BALANCED = 135  # images of each of the 38 classes, 5,130 in all
NOTES = ["DEV-01", "DEV-02", "DEV-06", "DEV-25"]
# Loss and networks of the four cells.
CELLS = {
    "isd": ("isd", "mlp", "ISD"),
    "soft": ("isd", "moco", "ISD with MoCo's head"),
    "hard": ("moco", "mlp", "MoCo's loss on ISD's networks"),
    "moco": ("moco", "moco", "MoCo v2"),
}


def bank_size(ratio: float) -> int:
    """K for a ratio of K to the train images of a set: the nearest whole number of batches."""
    return round(ratio * TRAIN_IMAGES / BATCH) * BATCH


def points() -> list[Settings]:
    """The design of points.csv, the same for every cell."""
    with (HERE / "points.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    whole = ("point", "dim")
    return [
        {key: value if key == "view_teacher" else int(value) if key in whole else float(value) for key, value in row.items()}
        for row in rows
    ]


def run(cell: str, at: Settings, *, label: str, subset: str, seed: int, epochs: int, strided: bool = False) -> Settings:
    """One run of a cell at a point, in float32; with the stem of stride 1 or 2."""
    name, heads, _ = CELLS[cell]
    tau = at["tau_student"]
    method: Settings = {"name": name, "heads": heads, "dim": at["dim"]}
    if name == "isd":
        method |= {"tau_student": tau, "tau_teacher": rounded(tau * at["tau_teacher_over_student"], 4), "bank_init": "unit"}
    else:
        method |= {"tau": tau}
    method |= {"momentum": at["momentum"], "bank_size": bank_size(at["bank_over_images"])}
    return protocols.run(
        label,
        NOTES,
        {"width": 16, **({"stem": "strided"} if strided else {})},
        method,
        protocols.natural_data(subset, STRONG, VIEWS[at["view_teacher"]]),
        epochs=epochs,
        lr=rounded(at["lr_at_tau_0.1"] * tau / 0.1, 4),
        seed=seed,
        weight_decay=at["weight_decay"],
        numerics={"precision": "float32"},
    )


def untrained(number: int, *, strided: bool = False) -> Settings:
    """The initial network on a set."""
    start = run("moco", MOCO, label="", subset=f"s{number}", seed=number, epochs=0, strided=strided)
    return protocols.untrained(start, f"Untrained, set {number}" + (", strided stem" if strided else ""), notes=["DEV-25"])


def profile(name: str, title: str, caption: str, notes: list[str], snapshots: int, runs: Settings) -> Settings:
    """A whole params.yaml over the development sets."""
    subsets = {}
    for number, part in ((9, "first"), (10, "second")):
        rule = {**protocols.HALVES, "part": part}
        subsets[f"s{number}"] = {"source": protocols.TINY_IMAGENET, "rule": rule}
        subsets[f"s{number}-balanced"] = {"source": protocols.TINY_IMAGENET, "rule": {**rule, "per_class": BALANCED}}
    report = {"title": title, "caption": caption, "notes": [*notes, protocols.ARITHMETIC], "reference": "untrained-9"}
    efficiency = {"log_every": 20, "checkpoint_every": 2, "snapshot_every": snapshots}
    return protocols.profile(name, report, subsets, runs, efficiency, knn_dense={"k": [1, 20], "trained": BALANCED})


# The settings of the gate: MoCo v2 as the first protocol chose it, ISD as its pilots left it.
MOCO: Settings = {
    "view_teacher": "strong",
    "lr_at_tau_0.1": 0.06,
    "weight_decay": 1e-4,
    "momentum": 0.99,
    "dim": 128,
    "bank_over_images": 0.3,
    "tau_student": 0.1,
}
ISD: Settings = {**MOCO, "view_teacher": "weak", "lr_at_tau_0.1": 0.03, "momentum": 0.97, "tau_teacher_over_student": 0.1}


def gate() -> Settings:
    """Precision, imbalance, bank and stem: seventeen runs and three untrained networks."""
    runs = {f"untrained-{number}": untrained(number) for number in (9, 10)}

    for number in (9, 10):
        for seed in (number, number + 100):
            for subset, words in ((f"s{number}", "unbalanced"), (f"s{number}-balanced", "balanced")):
                name = f"moco-{words}-{number}" + ("-again" if seed > 100 else "")
                label = f"MoCo v2, set {number} {words}, seed {seed}, float32"
                runs[f"{name}-float32"] = run("moco", MOCO, label=label, subset=subset, seed=seed, epochs=100)
    alike: Settings = {"subset": "s9", "seed": 9, "epochs": 100}
    runs["isd-unbalanced-9-float32"] = run("isd", ISD, label="ISD, set 9 unbalanced, seed 9, float32", **alike)
    for cell, at in (("moco", MOCO), ("isd", ISD)):
        label = f"{CELLS[cell][2]}, set 9 unbalanced, seed 9, bank 9.6 times the images, float32"
        runs[f"{cell}-unbalanced-9-bank-float32"] = run(cell, {**at, "bank_over_images": 9.6}, label=label, **alike)
    for name in ("moco-unbalanced-9", "isd-unbalanced-9", "moco-balanced-10"):
        twin = runs[f"{name}-float32"]
        numerics = {**twin["numerics"], "precision": "bf16"}
        runs[name] = {**twin, "label": twin["label"].removesuffix(", float32"), "numerics": numerics}
    runs["untrained-9-strided"] = untrained(9, strided=True)
    for cell, at, words in (("moco", MOCO, "unbalanced"), ("moco", MOCO, "balanced"), ("isd", ISD, "unbalanced")):
        subset = "s9" if words == "unbalanced" else "s9-balanced"
        label = f"{CELLS[cell][2]}, set 9 {words}, seed 9, strided stem, float32"
        runs[f"{cell}-{words}-9-strided"] = run(cell, at, label=label, subset=subset, seed=9, epochs=100, strided=True)
    return profile(
        "claim-2-gate",
        "The claim, second protocol: the gate",
        "What is decided before settings are chosen: the precision of training, whether the imbalance matters, the size of the"
        " bank, and the stride of the network's stem. Two development sets of 38 classes of Tiny-ImageNet at 32 px on a CPU.",
        ["Rules and settings are stated in reports/claim-2/PROTOCOL.md, committed before the first run (DEV-25)."],
        20,
        runs,
    )


def tuning() -> Settings:
    """Twelve points in each of the four cells, point by point."""
    runs = {"untrained-9": untrained(9)}
    for at in points():
        for cell, (_, _, words) in CELLS.items():
            label = f"{words}, point {at['point']}"
            runs[f"{cell}-{at['point']:02d}"] = run(cell, at, label=label, subset="s9", seed=9, epochs=50)
    return profile(
        "claim-2-tuning",
        "The claim, second protocol: choice of settings",
        "The same twelve points in each cell of loss and networks, 50 epochs on development set 9: 38 classes of Tiny-ImageNet,"
        " 8 large with 500 images and 30 rare with 38, at 32 px on a CPU.",
        [
            "No number here says which method is better: settings are chosen on these very images, so the best is optimistic.",
            "Design and rule are stated in reports/claim-2/PROTOCOL.md, committed before the first run (DEV-25).",
        ],
        0,
        runs,
    )


def texts() -> dict[Path, str]:
    """Every generated file by its path."""
    return protocols.parameters(__file__, (gate(), tuning()))


if __name__ == "__main__":
    protocols.write(texts())
