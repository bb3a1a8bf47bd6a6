"""Writes the params.yaml of the profiles claim-2-gate, claim-2-tuning and claim-2 from PROTOCOL.md's settings and the trials.

    python reports/claim-2/make_profiles.py

points.csv has the trials; beyond.csv, finalists.csv and settings.csv say what tuning.py chose. The profile claim-2 is written
once settings.csv has both cells of the questions.

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


def rows(name: str) -> list[Settings]:
    """The rows of a CSV file of settings; none if nothing was chosen yet."""
    path = HERE / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    words, whole = ("cell", "view_teacher"), ("point", "trial", "dim")
    return [
        {key: value if key in words else int(value) if key in whole else float(value) for key, value in row.items()}
        for row in found
    ]


def points() -> list[Settings]:
    """The design of points.csv, the same for every cell."""
    return rows("points.csv")


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


def development() -> Settings:
    """Sets 9 and 10 of the first protocol, on which nothing was trained there."""
    return halves(
        {number: {**protocols.HALVES, "part": part} for number, part in ((9, "first"), (10, "second"))}, protocols.TINY_IMAGENET
    )


def confirmation() -> Settings:
    """Sets 1 to 10 of the other 76 classes."""
    source = {**protocols.TINY_IMAGENET, "root_env": "ISD_TINY_IMAGENET_76_ROOT"}
    order = [(halving, part) for halving in range(1, 6) for part in ("first", "second")]
    rules = {
        number: {**protocols.HALVES, "tuning": 0, "halving": halving, "part": part}
        for number, (halving, part) in enumerate(order, start=1)
    }
    return halves(rules, source)


def halves(rules: dict[int, Settings], source: Settings) -> Settings:
    """Each set unbalanced and balanced."""
    subsets = {}
    for number, rule in rules.items():
        subsets[f"s{number}"] = {"source": source, "rule": rule}
        subsets[f"s{number}-balanced"] = {"source": source, "rule": {**rule, "per_class": BALANCED}}
    return subsets


def profile(name: str, title: str, caption: str, notes: list[str], snapshots: int, subsets: Settings, runs: Settings) -> Settings:
    """A whole params.yaml; differences are shown against its first run."""
    report = {"title": title, "caption": caption, "notes": [*notes, protocols.ARITHMETIC], "reference": next(iter(runs))}
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
        development(),
        runs,
    )


def tuning() -> Settings:
    """Twelve points in each of the four cells, point by point; trials beyond the box, and finalists on both sets."""
    runs = {"untrained-9": untrained(9)}
    trial: Settings = {"subset": "s9", "seed": 9, "epochs": 50}
    for at in points():
        for cell, (_, _, words) in CELLS.items():
            runs[f"{cell}-{at['point']:02d}"] = run(cell, at, label=f"{words}, point {at['point']}", **trial)
    for at in rows("beyond.csv"):
        label = f"{CELLS[at['cell']][2]}, trial {at['trial']}"
        runs[f"{at['cell']}-{at['trial']:02d}"] = run(at["cell"], at, label=label, **trial)
    for at in rows("finalists.csv"):
        for number, seed in ((9, 109), (10, 10)):
            label = f"{CELLS[at['cell']][2]}, trial {at['trial']}, 100 epochs, set {number}, seed {seed}"
            name = f"{at['cell']}-{at['trial']:02d}-final-{number}"
            runs[name] = run(at["cell"], at, label=label, subset=f"s{number}", seed=seed, epochs=100)
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
        development(),
        runs,
    )


def confirm(settings: dict[str, Settings]) -> Settings:
    """Ten sets: the initial network, both cells of the questions unbalanced and balanced, other cells, if chosen, unbalanced."""
    runs: Settings = {}
    compared, later = ("isd", "moco"), [cell for cell in ("soft", "hard") if cell in settings]
    for number in range(1, 11):
        start = run("moco", settings["moco"], label="", subset=f"s{number}", seed=number, epochs=0)
        runs[f"untrained-{number}"] = protocols.untrained(start, f"Untrained, s{number}", notes=["DEV-25"])
        names = [(cell, words) for cell in compared for words in ("unbalanced", "balanced")]
        for cell, words in [*names, *((cell, "unbalanced") for cell in later)]:
            subset = f"s{number}" if words == "unbalanced" else f"s{number}-balanced"
            label = f"{CELLS[cell][2]}, {subset}"  # so that the report pools the sets
            name = f"{cell}-{words}-{number}"
            runs[name] = run(cell, settings[cell], label=label, subset=subset, seed=number, epochs=100)
    return profile(
        "claim-2",
        "The claim, second protocol: confirmation",
        "ISD and MoCo v2 with the settings chosen for each, on ten sets of 38 classes of Tiny-ImageNet that nothing here had"
        " touched: unbalanced (8 classes with 500 images, 30 with 38) and balanced (135 each), 100 epochs at 32 px on a CPU.",
        ["Questions, outcomes and rules are stated in reports/claim-2/PROTOCOL.md, committed before the first run (DEV-25)."],
        0,
        confirmation(),
        runs,
    )


def texts() -> dict[Path, str]:
    """Every generated file by its path."""
    settings = {at["cell"]: at for at in rows("settings.csv")}
    last = [confirm(settings)] if {"isd", "moco"} <= set(settings) else []
    return protocols.parameters(__file__, (gate(), tuning(), *last))


if __name__ == "__main__":
    protocols.write(texts())
