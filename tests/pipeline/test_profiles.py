"""Every profile is valid, the paper's recipes have the paper's values, and the documents know every key and deviation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from isd_repro import evaluations, methods
from isd_repro.config import params
from isd_repro.config import reader as config
from isd_repro.config.fields import Frozen
from isd_repro.config.params import MethodBlock, View
from isd_repro.evaluations import linear

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
IMAGENET = ROOT / "pipelines" / "imagenet" / "params.yaml"
UNBALANCED = ROOT / "pipelines" / "imagenet-unbalanced" / "params.yaml"

STRONG = {
    "crop_min": 0.2,
    "crop_max": 1.0,
    "flip": 0.5,
    "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8},
    "grayscale": 0.2,
    "blur": {"sigma_min": 0.1, "sigma_max": 2.0, "p": 0.5},
}
WEAK = {"crop_min": 0.2, "crop_max": 1.0, "flip": 0.5, "jitter": None, "grayscale": 0.0, "blur": None}
STEP = {"name": "step", "milestones": (140, 180), "factor": 0.2}
COSINE = {"name": "cosine"}

# Method, rate, schedule, student view, teacher view, BatchNorm groups. All: SGD with momentum 0.9 and decay 1e-4, batch 256,
# 200 epochs, 224 px. Sources: UMBCvision/ISD at 4bdd603 (train_isd.py, train_isd_plus.py, train_byol.py and the README's
# commands) for ISD and BYOL; facebookresearch/moco's v2 command for MoCo.
ISD_R18 = {
    "tau_student": 0.02,
    "tau_teacher": 0.02,
    "momentum": 0.999,
    "bank_size": 128_000,
    "bank_init": "reference",
    "heads": "none",
}
ISD_R50 = {"tau_student": 0.1, "tau_teacher": 0.01, "momentum": 0.99, "bank_size": 128_000, "bank_init": "unit", "heads": "mlp"}
MOCO = {"tau": 0.2, "momentum": 0.999, "bank_size": 65_536, "dim": 128}
BYOL = {"momentum": 0.99}
PAPER: dict[str, tuple[str, str, dict[str, Any], float, dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "isd-r18": ("resnet18", "isd", ISD_R18, 0.01, STEP, STRONG, STRONG, 2),
    "isd-r50": ("resnet50", "isd", ISD_R50, 0.05, COSINE, STRONG, WEAK, 2),
    "moco-r18": ("resnet18", "moco", MOCO, 0.03, COSINE, STRONG, STRONG, 8),
    "moco-r50": ("resnet50", "moco", MOCO, 0.03, COSINE, STRONG, STRONG, 8),
    "byol-r18": ("resnet18", "byol", BYOL, 0.05, COSINE, STRONG, STRONG, 2),
    "byol-r50": ("resnet50", "byol", BYOL, 0.05, COSINE, STRONG, STRONG, 2),
}


def law(view: View) -> dict[str, Any]:
    return view.model_dump()


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_a_profile_stays_small_enough_for_dvc(path: Path) -> None:
    """DVC rewrites its lock after every stage, so its cost grows with the square of their number."""
    profile, _ = config.load(path)
    listed = [profile.linear_runs, profile.few_label_runs, profile.transfer_runs, profile.trajectory_runs]
    stages = len(profile.subsets) + 3 * len(profile.runs) + sum(map(len, listed)) + 1
    assert stages <= 300


def test_no_parameter_has_a_name_that_dvc_leaves_out() -> None:
    """DVC's run cache ignores keys of these names wherever they stand, so that a changed value would not run its stage again."""
    digest: Any = pytest.importorskip("dvc.stage.cache")._get_cache_hash
    keys = {key for model in models().values() for key in model.model_fields}
    assert [key for key in sorted({*keys, "size"}) if digest({"params": {key: 1}}) == digest({"params": {key: 2}})] == ["size"]


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_has_the_papers_values(name: str) -> None:
    arch, method, options, lr, schedule, student, teacher, groups = PAPER[name]
    run = config.load(IMAGENET)[0].runs[name]
    assert (run.backbone.arch, run.backbone.stem, run.backbone.width) == (arch, "imagenet", 64)
    assert (run.method.name, run.method.options) == (method, options)
    assert run.optim.model_dump() == {
        "epochs": 200,
        "batch_size": 256,
        "lr": lr,
        "sgd_momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": schedule,
    }
    assert (law(run.data.view_student), law(run.data.view_teacher)) == (student, teacher)
    assert (run.data.image_size, run.data.crop_ratio) == (224, 0.875)
    assert (run.data.mean, run.data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (run.numerics.bn_groups, run.numerics.precision, run.numerics.engine) == (groups, "bf16", "fast")  # DEV-24


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_a_record_agrees_with_what_the_methods_config_makes_of_a_block(path: Path) -> None:
    """`agree` reads a method's file without importing it; its Config is the oracle."""
    for name, run in config.load(path)[0].runs.items():
        block = run.method
        stated = methods.identity(block.name) | methods.config_of(name, block, path).model_dump(mode="json")
        assert methods.agree(block, stated), name
        for key in stated:
            assert not methods.agree(block, {**stated, key: "another"}), f"{name}: {key}"
        for key in ("name", *block.options):
            assert not methods.agree(block, {other: value for other, value in stated.items() if other != key}), f"{name}: {key}"
        assert not methods.agree(block, {**stated, "unknown": 1}), name


def test_linear_defaults_are_the_papers_protocol() -> None:
    assert linear.Config().model_dump(exclude={"seed"}) == {  # eval_linear.py
        "epochs": 40,
        "batch_size": 256,
        "lr": 0.01,
        "sgd_momentum": 0.9,
        "weight_decay": 1e-4,
        "milestones": (15, 30),
        "factor": 0.1,
        "crop_min": 0.08,
        "flip": 0.5,
        "protocol": "paper",
    }
    short = linear.Config().model_dump(exclude={"seed"})
    for path in PROFILES:
        found = config.load(path)[0].evaluation.linear
        assert (found.model_dump(exclude={"seed"}) == short) == (found.protocol == "paper"), path


def test_the_unbalanced_runs_differ_in_the_method_alone() -> None:
    """Each list has the same three runs, with equal network, views, budget and bank."""
    profile, _ = config.load(UNBALANCED)
    assert [subset.rule.model_dump()["list"] for subset in profile.subsets.values()] == [f"D{i}" for i in range(1, 11)]
    for i in range(1, 11):
        isd, moco, untrained = (profile.runs[f"{name}-d{i}"] for name in ("isd", "moco", "untrained"))
        assert isd.data == moco.data == untrained.data
        assert isd.data.subset == f"d{i}"
        assert law(isd.data.view_student) == law(isd.data.view_teacher) == STRONG
        assert (isd.backbone, isd.numerics) == (moco.backbone, moco.numerics) == (untrained.backbone, untrained.numerics)
        assert (isd.optim.epochs, isd.optim.batch_size) == (moco.optim.epochs, moco.optim.batch_size)
        assert isd.method.options["bank_size"] == moco.method.options["bank_size"]
        assert untrained.optim.epochs == 0
        assert {"DEV-10", "DEV-11", "DEV-12"} <= set(isd.notes) & set(moco.notes)
    assert profile.linear_runs == profile.few_label_runs == profile.transfer_runs == ()


# --- documents --------------------------------------------------------------------------------------------------------


def models() -> dict[str, type[BaseModel]]:
    """Every parameter model by the name that docs/params.md gives it."""
    shared = {
        name: value for name, value in vars(params).items() if isinstance(value, type) and issubclass(value, Frozen | MethodBlock)
    }
    shared.pop("Frozen")
    configs = {f"{name}.Config": methods.load(name).Config for name in methods.names()}
    configs |= {f"{name}.Config": evaluations.load(name).Config for name in evaluations.names()}
    return {**shared, **configs, "Evaluation": type(evaluations.settings({}))}


def documented() -> dict[str, dict[str, str]]:
    """Model -> key -> default, as docs/params.md has them; a row in bold begins the block of a model."""
    found: dict[str, dict[str, str]] = {"Params": {}}
    model = "Params"
    rows = re.findall(
        r"^\| (\*\*)?`([^|]+)` ?(?:\*\* )?\| *(.*?) *\| .*\|$", (ROOT / "docs" / "params.md").read_text("utf-8"), re.MULTILINE
    )
    for bold, key, default in rows:
        if bold:
            model = default.strip("`")
            assert model not in found
            found[model] = {}
        else:
            found[model][key] = default.strip("`")
    return found


def default_of(model: type[BaseModel], key: str) -> str:
    field = model.model_fields[key]
    if field.is_required():
        return ""
    default = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    return "defaults" if isinstance(default, BaseModel) or key == "evaluation" else repr(default)


def is_tag(annotation: Any) -> bool:
    """Whether a key only says which form a block has: the row in bold names that."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def test_every_key_is_documented_with_its_default() -> None:
    want = {
        name: {key: default_of(model, key) for key, field in model.model_fields.items() if not is_tag(field.annotation)}
        for name, model in models().items()
    }
    assert documented() == want


def test_every_cited_deviation_is_described_and_none_twice() -> None:
    described = re.findall(
        r"^\| <a id=\"dev-\d+\"></a>(DEV-\d+) \|", (ROOT / "DEVIATIONS.md").read_text("utf-8"), flags=re.MULTILINE
    )
    assert described == [f"DEV-{i:02d}" for i in range(1, len(described) + 1)]
    places = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PROFILES, *(ROOT / "isd_repro").rglob("*.py")]
    for path in places:
        cited = set(re.findall(r"\bDEV-\d+\b", path.read_text("utf-8")))
        assert cited <= set(described), f"{path} cites {sorted(cited - set(described))}"
