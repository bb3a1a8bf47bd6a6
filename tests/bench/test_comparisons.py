"""The comparisons of loss, views and step: what they check and report. No time is asserted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as commands
from benchmarks import every, growth, loss, peers, plain, plot, step, table, turns, views
from benchmarks.turns import Comparison
from isd_repro.methods.isd import isd_loss
from isd_repro.methods.moco import moco_loss
from isd_repro.nn import bank_attention, products
from isd_repro.runtime.errors import ConfigError, UserError

LOSS = loss.Sizes(batch=20, bank=500, dim=16, repeats=3)
STEP = step.Sizes(batch=8, side=16, bank=32, repeats=2, arch="resnet-narrow", width=4)


def test_loss_arms_agree_with_the_equations_and_memory_is_of_processes_of_their_own() -> None:
    said: list[str] = []
    threads = torch.get_num_threads()
    found = loss.bench(loss.Sizes(batch=64, bank=40_000, dim=16, repeats=3), say=said.append)
    assert torch.get_num_threads() == threads
    assert len(said) == 3
    assert list(found.seconds) == ["plain", "attention", "attention, float16 bank"]
    assert found.check["gradient error of plain"] < 1e-4
    assert found.check["gradient error of attention"] < 1e-4
    assert 1e-5 < found.check["gradient error of attention, float16 bank"] < 2e-3
    assert found.memory_mib["plain"] > 5 * 64 * 40_000 * 4 / 2**20  # several matrices of the batch and the bank
    assert found.memory_mib["attention"] < found.memory_mib["plain"] / 3
    ratios = [base / own for base, own in zip(found.seconds["plain"], found.seconds["attention"], strict=True)]
    assert found.ratios("attention") == ratios
    kept = json.loads(json.dumps(found.as_json()))
    assert kept["faster"]["attention"]["median"] == sorted(ratios)[1]
    assert kept["less_memory"]["attention"] == found.memory_mib["plain"] / found.memory_mib["attention"]
    assert kept["n"] == 3
    text = "\n".join(turns.lines(found))
    assert "bank 40000, dim 16" in text
    assert "MiB extra" in text


def test_a_wrong_arm_is_seen_in_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = {**loss._ARMS["isd"], "attention": (lambda q, k, x, s, t: isd_loss(q, k, x, 2 * s, t), torch.float32)}
    monkeypatch.setitem(loss._ARMS, "isd", wrong)
    found = loss.bench(LOSS, memory=False)
    assert found.check["gradient error of attention"] > 0.1
    assert found.wrong == ["gradient error of attention"]
    assert "WRONG    beyond its limit: gradient error of attention" in turns.lines(found)
    monkeypatch.setattr(every, "comparisons", lambda repeats, say: {"loss-d128": found.as_json})
    with pytest.raises(UserError, match="do not: loss-d128: gradient error of attention"):
        every.bench(tmp_path, 1)
    assert "| **wrong**: gradient error of attention |" in (tmp_path / "README.md").read_text("utf-8")
    words = ["loss", "--batch", "20", "--bank", "500", "--dim", "16", "--n", "1", "--no-memory"]
    assert CliRunner().invoke(commands.app, words).exit_code == 1


def test_no_number_is_beyond_every_limit() -> None:
    found = Comparison("x", {}, {"a": (1.0,)}, {"error": math.nan, "other": 0.5}, {}, limits={"error": 1.0, "other": 1.0})
    assert found.wrong == ["error"]
    assert found.as_json()["check"] == {"error": None, "other": 0.5}


def test_memory_of_no_page_is_no_division_by_zero() -> None:
    found = Comparison("x", {}, {"a": (1.0,), "b": (1.0,)}, {}, {}, {"a": 1.0, "b": 0.0})
    assert found.as_json()["less_memory"]["b"] == 1.0 / turns.PAGE


def test_a_process_that_cannot_measure_memory_says_why() -> None:
    with pytest.raises(UserError, match=r"peak memory could not be measured: .*ValueError"):
        turns.peak_in_process("benchmarks.loss", "isd", "attention", "no number", 64, 8, 1)


def test_the_kernel_of_each_arm_is_told() -> None:
    kernel = bank_attention.kernel_of(torch.zeros(4, 4))
    assert loss.bench(LOSS, memory=False).how == {"attention": kernel, "attention, float16 bank": kernel}
    assert step.bench(STEP).how["fast"] == f"bank attention {kernel} on float32"


def test_arms_of_moco_agree_with_the_equations_and_a_peer_stands_beside_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = replace(LOSS, method="moco", tau_student=0.2)
    alone = loss.bench(sizes, memory=False)
    assert set(alone.seconds) - {loss.LIGHTLY} == {"plain", "attention", "attention, float16 bank"}

    class Loss(torch.nn.Module):  # what is called of lightly's, with a bank that is its own
        def __init__(self, temperature: float, memory_bank_size: tuple[int, int]) -> None:
            super().__init__()
            self.temperature, self.memory_bank = temperature, torch.nn.Module()
            self.memory_bank.register_buffer("bank", torch.zeros(memory_bank_size))

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            one = torch.nn.functional.normalize(one, dim=1)
            return moco_loss(one, other, self.memory_bank.get_buffer("bank"), self.temperature)

    monkeypatch.setattr(peers, "module", lambda name: SimpleNamespace(NTXentLoss=Loss))
    monkeypatch.setattr(peers, "version", lambda package: "9.9")
    found = loss.bench(sizes, memory=False)
    assert list(found.seconds)[-1] == loss.LIGHTLY
    assert found.versions[loss.LIGHTLY] == "9.9"
    assert 0 < max(error for arm, error in found.check.items() if "float16" not in arm) < 1e-5, found.check
    monkeypatch.setattr(peers, "module", lambda name: SimpleNamespace(NTXentLoss=lambda tau, **other: Loss(2 * tau, **other)))
    assert loss.bench(sizes, memory=False).check["gradient error of lightly"] > 0.1


def test_no_peer_no_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "module", lambda name: None)
    assert list(views.bench(views.Sizes(batch=8, side=16, repeats=1)).seconds) == ["PIL", "batched"]
    assert loss.LIGHTLY not in loss.bench(replace(LOSS, method="moco"), memory=False).seconds
    with pytest.raises(ConfigError, match="'byol' is none of isd, moco"):
        loss.sizes_of(method="byol")


@pytest.mark.skipif(peers.module("kornia") is None, reason="kornia is not installed")
def test_views_of_kornia_are_of_the_same_law() -> None:
    found = views.bench(views.Sizes(batch=256, side=24, repeats=1))
    assert list(found.seconds)[-1] == "kornia"
    assert found.versions["kornia"]
    assert max(found.check.values()) < 0.1, found.check


def test_the_plain_losses_and_average_are_the_equations() -> None:
    student, teacher, bank = loss.inputs(LOSS)
    ours, theirs = (float(function(student, teacher, bank, 0.1)) for function in (plain.moco_loss, moco_loss))
    assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = (float(function(student, teacher, bank, 0.1, 0.05)) for function in (plain.isd_loss, isd_loss))
    assert ours == pytest.approx(theirs, rel=1e-5)
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    want = 0.9 * one.weight + 0.1 * other.weight
    plain.average(one, other, 0.9)
    torch.testing.assert_close(one.weight, want)


def test_views_of_both_sides_have_like_pixels() -> None:
    found = views.bench(views.Sizes(batch=64, side=24, repeats=2))
    assert list(found.seconds)[:2] == ["PIL", "batched"]
    assert len(found.check) == 4 * (len(found.seconds) - 1)
    assert max(found.check.values()) < 0.1, found.check  # of deviations of about 1


def test_steps_of_all_arms_have_the_same_first_loss() -> None:
    found = step.bench(STEP)
    ladder = ["plain", "+ batched views", "+ channels_last", "reference", "fast"]
    assert list(found.seconds) == [*ladder, "fast, bf16"] if products.multiplies_bf16() else ladder
    errors = list(found.check.values())
    assert max(errors[: len(ladder)]) < 1e-4, found.check
    assert all(0 < error < 5e-2 for error in errors[len(ladder) :]), found.check  # 8 bits; equal would be another network
    assert found.floor["GFLOP"] > 0


def test_arms_alternate_in_a_rotating_order() -> None:
    seen: list[str] = []
    arms = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    turns.compare("order", LOSS, arms, floor=dict, check={})
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab"


def test_absurd_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot measure"):
        loss.bench(loss.Sizes(bank=0))
    with pytest.raises(ConfigError, match="cannot measure"):
        views.bench(views.Sizes(side=0))
    for sizes in (step.Sizes(batch=3, bank=4), step.Sizes(batch=1, bank=4)):
        with pytest.raises(ConfigError, match="cannot measure"):
            step.bench(sizes)
    with pytest.raises(ConfigError, match="'vgg' is none of resnet18"):
        step.sizes_of(arch="vgg")


@pytest.mark.parametrize(
    "words",
    [
        ["loss", "--batch", "4", "--bank", "100", "--dim", "8", "--n", "1", "--no-memory"],
        ["views", "--batch", "4", "--side", "8", "--n", "1"],
        ["step", "--batch", "4", "--side", "8", "--bank", "8", "--arch", "resnet-narrow", "--width", "2", "--n", "1"],
    ],
    ids=lambda words: words[0],
)
def test_the_command_line(words: list[str]) -> None:
    done = CliRunner().invoke(commands.app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["what"] == words[0]
    done = CliRunner().invoke(commands.app, [*words])
    assert "machine" in done.stdout


def test_all_writes_a_file_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made = Comparison("x", {}, {"plain": (2.0,), "ours": (1.0,)}, {}, {})

    def missing() -> None:
        raise UserError("a peer is not installed")

    monkeypatch.setattr(every, "comparisons", lambda repeats, say: {"x": made.as_json, "peer": missing, "y": made.as_json})
    written = every.bench(tmp_path / "bench", 1, say=said.append)
    assert [path.name for path in written] == ["x.json", "y.json"]
    assert json.loads(written[0].read_text("utf-8"))["faster"]["ours"]["median"] == 2.0
    assert "| `y` | ours | 2.00 (2.00 to 2.00) |" in (tmp_path / "bench" / "README.md").read_text("utf-8")
    assert "peer: left out: a peer is not installed" in said
    assert [path.name for path in every.bench(tmp_path, 1, ("y",))] == ["y.json"]
    with pytest.raises(UserError, match="not installed"):  # asked for by name
        every.bench(tmp_path, 1, ("peer",))
    with pytest.raises(UserError, match="no comparison z"):
        every.bench(tmp_path, 1, ("z",))


def test_all_has_every_size_of_the_page() -> None:
    names = ["loss-d128", "loss-d512", "loss-moco", "loss-growth", "views-32", "views-64", "views-224", "step-32", "step-64"]
    names += ["knn", "knn-growth", "epoch-growth", "linear", "loader"]
    assert list(every.comparisons(1, print)) == names


def test_the_table_says_which_targets_were_met(tmp_path: Path) -> None:
    made = Comparison(
        "loss",
        {"bank": 9},
        {"plain": (3.0, 4.0, 5.0), "attention": (1.0, 1.0, 1.0)},
        {"error": 0.5},
        {"s": 0.1},
        {"plain": 100.0, "attention": 4.0},
        load=(1.0, 2.0),
    )
    (tmp_path / "loss-d128.json").write_text(json.dumps(made.as_json()), encoding="utf-8")
    ours = Comparison("growth", {}, {"attention": (1.0, 1.0, 1.0)}, {}, {}, {"attention": 4.0})
    (tmp_path / "loss-growth.json").write_text(
        json.dumps([{**ours.as_json(), "sizes": {"bank": 1024, "dim": 8}}]), encoding="utf-8"
    )
    text = table.page(tmp_path)
    assert (
        "| `loss-d128` | attention | 4.00 (3.00 to 5.00) | 3, met | 25 times less (4.0 MiB) | 50, missed | 3 | 1.0 to 2.0 |"
        in text
    )
    assert "plain 4.000, attention 1.000. Floor: s 0.1. Check: error 0.5." in text
    assert (
        "[`loss-growth`](loss-growth.svg), by rows of the bank (dim 8; processor seconds): 1,024 1.000 s, 4.0 MiB extra." in text
    )
    assert set(table.TARGETS) <= set(every.comparisons(1, print))


@pytest.mark.parametrize(("cost", "want"), [(1.25, "met"), (1.5, "missed")])
def test_the_table_says_what_many_settings_cost(tmp_path: Path, cost: float, want: str) -> None:
    made = Comparison("linear", {"images": 9}, {"one setting": (2.0,), "50 settings": (2.0 * cost,)}, {}, {})
    (tmp_path / "linear.json").write_text(json.dumps(made.as_json()), encoding="utf-8")
    text = table.page(tmp_path)
    assert f"| `linear` | 50 settings | {cost:.2f} ({cost:.2f} to {cost:.2f}) times its time | at most 1.3, {want} |" in text
    assert f"50 settings            {2 * cost:.3f}" in "\n".join(turns.lines(made))
    assert f"x{cost:.2f} ({cost:.2f} to {cost:.2f}) its time" in "\n".join(turns.lines(made))


def test_what_grows_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `bench all`: the files, the figures, and the table that links them."""
    monkeypatch.setattr(growth.of_loss, "__defaults__", ((256, 512), 8, 2, print))
    monkeypatch.setattr(growth.of_search, "__defaults__", ((500, 1000), 8, 2, print))
    monkeypatch.setattr(growth.of_epoch, "__defaults__", ((64, 128), 1, print))
    names = tuple(plot.GROWS)
    assert len(every.bench(tmp_path, 1, names)) == 3
    page = (tmp_path / "README.md").read_text("utf-8")
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        assert [len(each["seconds"]) for each in found] == [1, 1]
        assert f"[`{name}`]({name}.svg)" in page
        drawn = (tmp_path / f"{name}.svg").read_bytes()
        assert drawn == plot.svg(name, found)
        assert ET.fromstring(drawn).tag.endswith("svg")
    assert '"images": 128' in (tmp_path / "epoch-growth.json").read_text("utf-8")


def test_a_point_stands_where_its_numbers_are() -> None:
    made = [
        Comparison("growth", {"bank": bank}, {"search": (low, low, 2 * low)}, {}, {}).as_json()
        for bank, low in ((1024, 0.1), (2048, 1.0))
    ]
    (ax,) = plot.figure("knn-growth", made).axes
    medians, proportion = ([tuple(point) for point in line.get_xydata()] for line in ax.lines)
    assert medians == [(1024, 0.1), (2048, 1.0)]
    assert proportion == [(1024, 0.5), (2048, 1.0)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1k", "2k"]
    assert [path.vertices[:, 1].tolist() for path in ax.collections[0].get_paths()] == [[0.1, 0.2], [1.0, 2.0]]


def test_the_committed_table_is_that_of_the_committed_files() -> None:
    folder = Path(__file__).parents[2] / "reports" / "bench"
    assert (folder / "README.md").read_text("utf-8") == table.page(folder)
