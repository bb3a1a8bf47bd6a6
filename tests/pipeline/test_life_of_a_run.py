"""Runs are added, renamed, removed and imported, and parameters, lock and files stay consistent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from scipy.stats import qmc

from isd_repro.config import reader
from tests.faults import chain
from tests.pipeline.test_repro import clone as clone
from tests.pipeline.test_repro import ran, shell

ROOT = Path(__file__).parents[2]


def tree(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text("utf-8"))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(ROOT / "dvc.lock", tmp_path)
    return tmp_path


def call(folder: Path, *arguments: str) -> chain.Result:
    done = chain.call(folder, *arguments)
    assert done.code == 0, done
    return done


def test_a_variant_is_a_whole_run_and_changes_no_other(demo: Path) -> None:
    before, text = tree(demo / "params.yaml"), (demo / "params.yaml").read_text("utf-8")
    call(demo, "variant", "isd-warm", "--from", "isd", "-S", "method.tau_student=0.2", "-S", "optim.epochs=5")
    after = tree(demo / "params.yaml")
    added = after["runs"].pop("isd-warm")
    assert after["linear_runs"].pop() == "isd-warm"
    assert after == before
    wanted = before["runs"]["isd"] | {"label": "ISD (tau_student 0.2, epochs 5), seed 0"}
    wanted["method"], wanted["optim"] = wanted["method"] | {"tau_student": 0.2}, wanted["optim"] | {"epochs": 5}
    assert added == wanted
    kept = (demo / "params.yaml").read_text("utf-8").splitlines()
    assert all(line in kept for line in text.splitlines())  # comments, too
    assert tree(demo / "params.yaml")["runs"]["isd"] == before["runs"]["isd"]


def test_seeds_are_repetitions_of_their_source(demo: Path) -> None:
    from isd_repro.report.repetitions import repetitions

    call(demo, "variant", "isd-s", "--from", "isd", "--seeds", "2")
    call(demo, "variant", "isd-t", "--from", "isd", "-S", "numerics.seed=7", "--seeds", "2")
    params = reader.load(demo / "params.yaml")[0]
    seeds = {"isd": 0, "isd-1": 1, "isd-2": 2, "isd-s-s3": 3, "isd-s-s4": 4, "isd-t-s7": 7, "isd-t-s8": 8}
    assert {run: params.runs[run].numerics.seed for run in params.runs if run.startswith("isd")} == seeds
    assert list(seeds) in repetitions(params, list(params.runs))


def test_a_grid_is_every_combination(demo: Path) -> None:
    grid = ("--grid", "method.tau_student=0.05,0.2", "--grid", "optim.lr=0.01,0.1", "--seeds", "2")
    call(demo, "variant", "isd-g", "--from", "isd", *grid)
    runs = {name: run for name, run in tree(demo / "params.yaml")["runs"].items() if name.startswith("isd-g-")}
    found = {(run["method"]["tau_student"], run["optim"]["lr"], run["numerics"]["seed"]) for run in runs.values()}
    assert len(runs) == 8
    assert found == {(tau, lr, seed) for tau in (0.05, 0.2) for lr in (0.01, 0.1) for seed in (0, 1)}


def test_a_sobol_design_fills_its_ranges(demo: Path) -> None:
    """The points of scipy's sequence; a range of more than a factor of 10 is logarithmic, whole ends give whole numbers."""
    ranges = ("--range", "method.tau_student=0.02..0.5", "--range", "optim.epochs=5..20")
    done = call(demo, "variant", "isd-q", "--from", "isd", "--sobol", "4", *ranges)
    after = tree(demo / "params.yaml")
    found = [(run["method"]["tau_student"], run["optim"]["epochs"]) for name, run in after["runs"].items() if "isd-q" in name]
    unit = qmc.Sobol(2, seed=0).random_base2(2)
    assert found == [(float(f"{0.02 * 25 ** row[0]:.4g}"), round(5 + 15 * row[1])) for row in unit]
    assert "trials" not in after["report"]
    assert "fair comparison" not in done.out


def test_the_report_takes_the_best_of_the_trials(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All trials are one method, also those that a second command adds; their numbers go on."""
    from isd_repro.report import trials
    from isd_repro.report.cells import Cell

    call(demo, "variant", "isd-g", "--from", "isd", "--grid", "method.tau_student=0.05,0.2", "--seeds", "2", "--trials")
    done = call(demo, "variant", "isd-h", "--from", "isd-g-1-s0", "-S", "optim.lr=0.1", "--trials")
    assert "isd 8; a fair comparison gives each method the same number" in done.out
    params = reader.load(demo / "params.yaml")[0]
    labels = [run.label for name, run in params.runs.items() if name.startswith(("isd-g", "isd-h"))]
    assert labels == [f"ISD, trial {at}" for at in (1, 2, 3, 4, 5)]
    assert params.report.trials

    def scored(_: Any, runs: list[str], *__: Any) -> Cell:
        return Cell("score", tuple(runs), value=float("isd-g-2-s0" in runs))

    monkeypatch.setattr(trials, "method_cell", scored)
    records: Any = None
    best = trials.chosen(params, records, params.report.trials)
    assert best["ISD"].runs == ("isd-g-2-s0",)
    assert not [method for method in best if "trial" in method]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("isd-x", "--from", "isd", "-S", "method.tau=1"), "runs.isd-x.method.tau: unknown key"),
        (("isd-x", "--from", "isd", "-S", "method.bank_size=100"), "bank_size: 100 is not a multiple"),
        (("isd-x", "--from", "isdd"), "did you mean 'isd'?"),
        (("isd", "--from", "isd", "-S", "optim.lr=1"), "run 'isd' exists already"),
        (("isd-x", "--from", "isd", "-S", "optim.lr"), "expected key=value"),
        (("isd-x", "--from", "isd", "-S", "optim.lr.x=1"), "is not a group of keys"),
        (("isd-x", "--from", "isd", "--grid", "numerics.seed=3,5", "--seeds", "2"), "--seeds counts up from one seed"),
        (("isd-x", "--from", "isd", "--sobol", "2"), "--sobol and --range go together"),
        (("isd-x", "--from", "isd", "--sobol", "2", "--range", "optim.lr=2..1"), "low below high"),
        (("Isd", "--from", "isd", "-S", "optim.lr=1"), "is not a valid name of a run"),
    ],
)
def test_what_would_be_wrong_is_not_written(demo: Path, arguments: tuple[str, ...], says: str) -> None:
    text = (demo / "params.yaml").read_bytes()
    chain.refused(chain.call(demo, "variant", *arguments), says, code=3)
    assert (demo / "params.yaml").read_bytes() == text
    assert not list(demo.glob(".new-*"))


def test_a_run_that_comes_and_goes_leaves_nothing(demo: Path) -> None:
    before = {name: (demo / name).read_text("utf-8") for name in ("params.yaml", "dvc.lock")}
    call(demo, "variant", "isd-a", "--from", "isd", "-S", "optim.lr=0.1")
    call(demo, "run", "rename", "isd-a", "isd-b")
    params = reader.load(demo / "params.yaml")[0]
    assert "isd-a" not in params.runs
    assert params.linear_runs[-1] == "isd-b"
    call(demo, "run", "remove", "isd-b", "isd-b")
    assert {name: (demo / name).read_text("utf-8") for name in before} == before


def test_a_run_with_results_goes_with_all_of_them(demo: Path) -> None:
    """Records, encoder, logs, card, resume state, lock entries and every place of the parameters that names the run."""
    state = demo / ".state" / "abc"
    places = [
        "reports/demo/records/isd/knn.json",
        "runs/isd/encoder.safetensors",
        "runs/.log/knn/isd/metrics.jsonl",
        "reports/demo/cards/isd.md",
    ]
    for place in [*map(demo.joinpath, places), state / "run.json"]:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"profile": "demo", "run": "isd"}), "utf-8")
    chain.refused(chain.call(demo, "run", "remove", "isd"), "run 'isd' has results", "reports/demo/records/isd", "--force")
    chain.refused(chain.call(demo, "run", "rename", "isd", "other"), "whose hashes cover its name")
    assert state.exists()
    assert "pretrain@isd" in tree(demo / "dvc.lock")["stages"]
    call(demo, "run", "remove", "isd", "--force")
    assert not any((demo / place).exists() for place in places)
    assert not state.exists()
    assert not [key for key in tree(demo / "dvc.lock")["stages"] if key.endswith("@isd")]
    assert "pretrain@moco" in tree(demo / "dvc.lock")["stages"]
    call(demo, "check", "params.yaml")
    assert "isd" not in tree(demo / "params.yaml")["linear_runs"]


def test_a_profile_for_other_images(demo: Path) -> None:
    call(
        demo,
        "new",
        "mine",
        "--from",
        ".",
        "--images",
        "ISD_MY_ROOT",
        "--dataset",
        "My images",
        "-S",
        "subsets.digits.search_per_class=5",
    )
    folder = demo / "pipelines" / "mine"
    assert (folder / "dvc.yaml").read_bytes() == (demo / "dvc.yaml").read_bytes()
    params, layout = reader.load(folder)
    assert (params.profile, layout.root) == ("mine", demo.resolve())
    assert {subset.source.root_env for subset in params.subsets.values()} == {"ISD_MY_ROOT"}
    assert params.runs == reader.load(demo)[0].runs
    assert [subset.search_per_class for subset in params.subsets.values()] == [5]
    chain.refused(chain.call(demo, "new", "mine", "--from", "."), "profile 'mine' exists already", code=3)
    chain.refused(chain.call(demo, "new", "other", "--from", ".", "--images", "X"), "--images and --dataset go together", code=3)


@pytest.mark.slow
def test_a_run_trained_elsewhere_is_not_trained_again(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trained without DVC in one clone, imported into another: `dvc repro` goes on with what comes after."""
    there = tmp_path_factory.mktemp("there") / "clone"
    shutil.copytree(clone, there, symlinks=True)
    for command in (("prepare", "digits"), ("pretrain", "isd")):
        shell(there, "isd-repro", *command)
    kept = there / "runs" / "isd"
    shutil.copy(there / "reports" / "demo" / "records" / "isd" / "pretrain.json", kept)
    shell(clone, "dvc", "repro", "--quiet", "prepare@digits")
    before = (clone / "dvc.lock").read_text("utf-8")
    for damage, says in (("encoder.safetensors", "has sha256"), ("metrics.jsonl", "epochs are not the 2 of the record")):
        copied = tmp_path_factory.mktemp("damaged") / "run"
        shutil.copytree(kept, copied)
        content = (copied / damage).read_bytes()
        (copied / damage).write_bytes(
            content[: len(content) // 2] if damage.endswith("safetensors") else content.splitlines(True)[0]
        )
        chain.refused(chain.call(clone, "run", "import", str(copied)), says)
    assert (clone / "dvc.lock").read_text("utf-8") == before
    assert not (clone / "runs" / "isd").exists()
    stale = clone / "runs" / "isd" / "snapshots" / "epoch-00009.safetensors"
    stale.parent.mkdir(parents=True)
    stale.touch()
    done = shell(clone, "isd-repro", "run", "import", str(kept))
    assert "imported" in done
    assert not stale.exists(), "a snapshot of another training of this run"
    again = ran(shell(clone, "dvc", "repro"))
    assert "pretrain@isd" not in again
    assert {"extract@isd", "knn@isd", "pretrain@untrained", "report"} <= again
    assert "up to date" in shell(clone, "dvc", "repro")
    changed = (clone / "params.yaml").read_text("utf-8").replace("tau_student: 0.102", "tau_student: 0.3")
    (clone / "params.yaml").write_text(changed, "utf-8")
    chain.refused(chain.call(clone, "run", "import", str(there)), "method.tau_student is 0.102, the profile has 0.3")
