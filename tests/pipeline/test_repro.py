"""`dvc repro` from end to end on a handful of digits, in a repository of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
CARRIED = (".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitignore", "Makefile", "dvc.yaml", "isd_repro")
BIN = Path(sys.executable).parent
IDENTITY = ("-c", "user.name=test", "-c", "user.email=test@localhost")


def shell(folder: Path, *command: str, env: Mapping[str, str] | None = None) -> str:
    """Run a command where `isd-repro` and `dvc` are those of this environment; its whole output."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def ran(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}


def change(folder: Path, *keys: str, value: Any) -> None:
    yaml = YAML()
    tree = yaml.load((folder / "params.yaml").read_text("utf-8"))
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(tree, file)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of the demo with two runs of two epochs."""
    for name in CARRIED:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text("utf-8"))
    params["runs"] = {name: params["runs"][name] for name in ("untrained", "isd")}
    params["runs"]["isd"]["optim"] = {**params["runs"]["isd"]["optim"], "epochs": 2}
    params["linear_runs"] = ["isd"]
    params["report"].pop("pixels", None)
    params["evaluation"]["linear"]["epochs"] = 2
    params["evaluation"]["linear"]["milestones"] = [1]
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        yaml = YAML()
        yaml.representer.ignore_aliases = lambda _: True
        yaml.dump(params, file)
    shell(tmp_path, "git", "init", "--quiet")
    shell(tmp_path, "git", "add", ".")
    shell(tmp_path, "git", *IDENTITY, "commit", "--quiet", "-m", "start")
    return tmp_path


@pytest.mark.slow
def test_the_pipeline_runs_what_changed_and_nothing_else(clone: Path) -> None:
    everything = {f"{stage}@{run}" for stage in ("pretrain", "extract", "knn") for run in ("untrained", "isd")}
    assert ran(shell(clone, "dvc", "repro")) == {"prepare@digits", "linear@isd", "report", *everything}

    record = json.loads((clone / "reports/demo/records/isd/knn.json").read_text("utf-8"))
    pretrain = json.loads((clone / "reports/demo/records/isd/pretrain.json").read_text("utf-8"))
    assert record["encoder_sha256"] == pretrain["encoder_sha256"]
    assert record["manifest"]["sha256"] == pretrain["manifest"]["sha256"]
    assert len(pretrain["curve"]) == 2
    assert {score["n"] for score in record["scores"] if score["group"] == "all"} == {1000}
    assert any((clone / "reports/demo/tables").iterdir())
    changed = {line[3:] for line in shell(clone, "git", "status", "--porcelain").splitlines()}
    assert changed == {"dvc.lock", "reports/"}, "outputs must be ignored by git before DVC makes them"

    assert ran(shell(clone, "dvc", "repro")) == set()
    change(clone, "efficiency", "log_every", value=3)
    change(clone, "tracking", "project", value="another")
    assert ran(shell(clone, "dvc", "repro")) == set()
    change(clone, "runs", "isd", "method", "tau_teacher", value=0.03)
    assert ran(shell(clone, "dvc", "repro")) == {"pretrain@isd", "extract@isd", "knn@isd", "linear@isd", "report"}
    again = json.loads((clone / "reports/demo/records/isd/pretrain.json").read_text("utf-8"))
    assert again["fingerprint"] != pretrain["fingerprint"]
    assert again["encoder_sha256"] != pretrain["encoder_sha256"]

    features = clone / "runs/isd/features.safetensors"
    before = features.read_bytes()
    features.unlink()
    assert ran(shell(clone, "dvc", "repro")) == set(), "a cached output is restored, not made again"
    assert features.read_bytes() == before
    (clone / "reports/demo/records/isd/knn.json").unlink()
    assert ran(shell(clone, "dvc", "repro")) == {"knn@isd", "report"}, "a record is made again by its stage alone"


@pytest.mark.slow
def test_a_fresh_clone_adds_a_run_and_makes_none_again(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As reports/claim/FINDINGS.md says: a clone has records and lock, and neither images nor encoders."""
    shell(clone, "dvc", "repro")
    shell(clone, "git", "add", ".")
    shell(clone, "git", *IDENTITY, "commit", "--quiet", "-m", "done")
    fresh = tmp_path_factory.mktemp("fresh") / "clone"
    shell(clone, "git", "clone", "--quiet", str(clone), str(fresh))
    runs = YAML(typ="safe").load((fresh / "params.yaml").read_text("utf-8"))["runs"]
    change(fresh, "runs", "late", value={**runs["isd"], "label": "Late", "numerics": {**runs["isd"]["numerics"], "seed": 1}})
    assert ran(shell(fresh, "dvc", "repro", "-s", "dvc.yaml:prepare")) == {"prepare@digits"}
    assert ran(shell(fresh, "dvc", "repro", "--allow-missing")) == {"pretrain@late", "extract@late", "knn@late", "report"}
    assert "| Late |" in (fresh / "reports/demo/tables/table.md").read_text("utf-8")
