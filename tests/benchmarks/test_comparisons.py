"""The comparisons: what they check, report and keep. No time is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import bank_loss, cases, harness, knn, linear_probe, loader, plain_recipe, table, training_step
from benchmarks.__main__ import app
from benchmarks.harness import Comparison
from isd_repro.methods.isd import isd_loss
from isd_repro.methods.moco import moco_loss
from isd_repro.nn import bank_attention, products
from isd_repro.runtime.errors import ConfigError, UserError

REPORTS = Path(__file__).parents[2] / "reports" / "bench"
LOSS = bank_loss.toy(bank_loss.Sizes())
TOYS = cases.cases(toy=True)


def silent(line: str) -> None:
    """Say nothing."""


FIRST = {next(iter(subject.CPU)) for subject in cases.SUBJECTS} - {
    "tracking",
    "step-32",
}  # a comparison of each subject; those of steps are tested below
NAMES = [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in TOYS]


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_computes_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        found = cases.measure(TOYS[name], silent)
    except UserError as error:
        pytest.skip(error.message)
    assert found.wrong == []
    assert all(len(values) == found.sizes["repetitions"] for values in found.seconds.values())
    assert found.what in "\n".join(found.lines())
    assert json.loads(cases.keep(tmp_path, name, found).read_text("utf-8"))["seconds"]
    assert f"`{name}`" in (tmp_path / "README.md").read_text("utf-8")


# --- the harness ----------------------------------------------------------------------------------------------------------


def compared(**works: Callable[[], object]) -> Comparison:
    """A comparison of these works."""
    return harness.compare("it", harness.Sizes(repetitions=3), works)


def test_repetitions_are_interleaved_in_a_rotating_order() -> None:
    seen: list[str] = []
    compared(**{name: (lambda name=name: seen.append(name)) for name in "abc"})
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"


def test_a_variant_that_fails_leaves_the_others_running() -> None:
    found = compared(a=lambda: harness.Seconds(4), b=lambda: 1 / 0, c=lambda: harness.Seconds(2))
    assert found.seconds == {"a": (4.0,) * 3, "c": (2.0,) * 3}
    assert found.failed == {"b": "ZeroDivisionError: division by zero"}
    assert found.wrong == ["b failed"]
    assert "FAILED: ZeroDivisionError" in "\n".join(found.lines())
    assert found.as_json()["faster"]["c"] == {"median": 2.0, "turns": [2.0, 2.0, 2.0]}


def test_no_repetition_begins_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.Clock, "end", 0.0)
    found = compared(a=lambda: None, b=lambda: None)
    assert {name: len(values) for name, values in found.seconds.items()} == {"a": 1}
    assert "no time" in found.failed["b"]


def test_what_is_no_number_is_wrong_and_no_memory_divides_nothing() -> None:
    seconds = {"a": (1.0,), "b": (1.0,)}
    found = Comparison("x", {}, seconds, {"e": math.nan, "f": 0.5}, limits={"e": 1.0, "f": 1.0}, memory_mib={"a": 1.0, "b": 0.0})
    assert found.wrong == ["e"]
    assert found.as_json()["check"] == {"e": None, "f": 0.5}
    assert found.as_json()["less_memory"]["b"] == 1.0 / harness.PAGE


# --- the subjects ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_that_of_processes_of_their_own() -> None:
    sizes = bank_loss.Sizes(batch=64, bank=40_000, dim=16, repetitions=1, only=("plain", "attention"))
    found = bank_loss.measure(sizes, silent)
    assert found.memory_mib["plain"] > 5 * 64 * 40_000 * 4 / 2**20  # several matrices of the batch and the bank
    assert found.memory_mib["attention"] < found.memory_mib["plain"] / 3
    assert found.how == {"attention": bank_attention.kernel_of(torch.zeros(4, 4))}
    with pytest.raises(UserError, match=r"peak memory could not be measured: .*JSONDecodeError"):
        harness.peak_in_process("benchmarks.bank_loss", "no sizes", "plain")


def test_a_wrong_variant_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bank_loss, "attended_isd_loss", lambda q, k, x, s, t: isd_loss(q, k, x.float(), 2 * s, t))
    words: dict[str, Any] = {"toy": True, "settings": {}, "only": (), "say": silent, "show": silent}
    with pytest.raises(UserError, match="something else: loss-d128: attention: gradient error"):
        cases.run(("loss-d128",), out=tmp_path, **words)
    assert "| **wrong**: attention: gradient error" in (tmp_path / "README.md").read_text("utf-8")


def test_the_plain_recipe_is_the_equations() -> None:
    student, teacher, bank = bank_loss.inputs(LOSS)
    ours, theirs = (float(loss(student, teacher, bank, 0.1)) for loss in (plain_recipe.moco_loss, moco_loss))
    assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (float(loss(student, teacher, bank, 0.1, 0.05)) for loss in (plain_recipe.isd_loss, isd_loss))
    assert ours == pytest.approx(theirs, rel=1e-5)
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    want = 0.9 * one.weight + 0.1 * other.weight
    plain_recipe.average(one, other, 0.9)
    torch.testing.assert_close(one.weight, want)


def test_the_ladder_of_steps() -> None:
    found = training_step.measure(training_step.toy(training_step.CPU["step-32"]), silent)
    names = ["plain", "+ batched views", "+ channels_last", "reference", "fast"]
    assert list(found.seconds) == [*names, "fast, bf16"] if products.multiplies_bf16() else names
    half = [value for name, value in found.check.items() if "bf16" in name]
    assert all(value > 0 for value in half)  # 8 bits; equal losses would be those of float32 networks
    assert found.floor["GFLOP"] > 0
    for sizes in (training_step.Sizes(batch=3, bank=4), training_step.Sizes(batch=1, bank=4)):
        with pytest.raises(ConfigError, match="cannot measure"):
            training_step.measure(sizes, silent)


def test_a_neighbour_that_is_no_near_tie_is_counted() -> None:
    bank, label, query = knn.clustered(knn.Sizes(bank=200, dim=8, queries=4))
    near = torch.arange(12).reshape(4, 3)
    other = near.clone()
    other[1, 2] = 100
    assert knn._compared(bank, label, query, near, near)["neighbours that are no near-ties"] == (0.0, 0.0)
    found = knn._compared(bank, label, query, other, near)
    assert found["neighbours that are no near-ties"][0] == 1.0
    assert found["share of other neighbours"][0] == 1 / 12


def test_heads_that_influence_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = linear_probe._Problem.alone

    def other(self: linear_probe._Problem, settings: Any) -> torch.nn.Linear:
        return alone(self, settings.model_copy(update={"lr": 2 * settings.lr}))

    monkeypatch.setattr(linear_probe._Problem, "alone", other)
    found = linear_probe.measure(linear_probe.toy(linear_probe.Sizes()), silent)
    assert found.wrong == ["4 settings: largest difference to a head alone"]
    with pytest.raises(ConfigError, match="cannot measure 51 settings"):
        linear_probe.grid(51)


def test_a_pixel_that_is_not_pillows_is_counted(tmp_path: Path) -> None:
    sizes = loader.toy(loader.Sizes())
    files = loader._write_images(tmp_path / "train", sizes)
    store = loader._pack(tmp_path / "raw", files, None, 1)
    assert loader._wrong(store, files) == 0
    Image.new("RGB", (sizes.width, sizes.height)).save(files[1], "JPEG")
    assert loader._wrong(store, files) > 1000


# --- what is kept and shown -----------------------------------------------------------------------------------------------


def test_committed_results_stay_readable() -> None:
    files = sorted(REPORTS.glob("*.json"))
    text = table.page(REPORTS)
    assert len(files) > 10
    for path in files:
        for variant, faster in json.loads(path.read_bytes())["faster"].items():
            row = f"| `{path.stem}` | {variant} | {harness.spread(faster['turns'], '.2f')} |"
            assert row in text or "times its time" in text


def test_the_table_says_which_targets_were_met(tmp_path: Path) -> None:
    def written(name: str, made: Comparison) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(made.as_json()), encoding="utf-8")
        return table.page(tmp_path)

    seconds = {"plain": (3.0, 4.0, 5.0), "attention": (1.0, 1.0, 1.0)}
    memory = {"plain": 100.0, "attention": 4.0}
    made = Comparison("loss", {"bank": 9}, seconds, {"error": 0.5}, {"s": 0.1}, memory, load=(1.0, 2.0))
    text = written("loss-d128", made)
    assert "| attention | 4.00 (3.00 to 5.00) | 3, met | 25 times less (4.0 MiB) | 50, missed | 3 | 1.0 to 2.0 |" in text
    assert "Processor seconds: plain 4, attention 1. Floor: s 0.1. Check: error 0.5." in text
    for cost, want in ((1.25, "met"), (1.5, "missed")):
        made = Comparison("linear", {}, {"one setting": (2.0,), "50 settings": (2.0 * cost,)})
        row = f"| 50 settings | {cost:.2f} ({cost:.2f} to {cost:.2f}) times its time | at most 1.3, {want} |"
        assert row in written("linear", made)
    made = Comparison("views", {}, {"PIL": (1.0,), "batched, compiled": (0.01,)}, clock="seconds between CUDA events")
    assert "at most 8 ms, missed (10)" in written("views-224", made)


def test_every_target_is_of_a_comparison() -> None:
    known = {name for subject in cases.SUBJECTS for name in {**subject.CPU, **subject.CUDA}}
    assert {*table.CPU, *table.CUDA} <= known
    assert {path.stem for path in REPORTS.glob("*.json")} <= known


def test_the_command(tmp_path: Path) -> None:
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, words)

    assert "loss-d128" in call().stdout
    done = call("loss-d128", "--toy", "--set", "dim=8", "--set", "memory=false", "--only", "attention", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "loss-d128.json").read_text("utf-8"))
    assert (found["sizes"]["dim"], list(found["seconds"])) == (8, ["attention"])
    for words, message in (
        (["nothing"], "no comparison nothing"),
        (["loss-d128", "--set", "width=3"], "these sizes have no width"),
        (["loss-d128", "--set", "dim=wide"], "'wide' is no int"),
        (["loss-d128", "--toy", "--set", "bank=-1"], "bank must be positive"),
    ):
        error: Any = call(*words).exception
        assert isinstance(error, UserError)
        assert message in f"{error.message} {error.hint}"
