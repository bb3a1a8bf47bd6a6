"""The comparison itself: what it checks and reports. No time is asserted."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as commands
from benchmarks import knn
from benchmarks.knn import Sizes
from isd_repro.runtime.errors import ConfigError, UserError

SMALL = Sizes(bank=700, dim=16, queries=40, k=5, repeats=3)


def test_turns_ratios_and_agreement() -> None:
    turns: list[int] = []
    threads = torch.get_num_threads()
    found = knn.bench(SMALL, lambda turn, ours, faiss: turns.append(turn))
    assert torch.get_num_threads() == threads
    assert turns == [0, 1, 2]
    assert found.ratios == [ours / theirs for ours, theirs in zip(found.ours, found.faiss, strict=True)]
    assert found.neighbours > 0.99
    assert found.unexplained == 0
    assert found.votes == {1: 1.0, 5: 1.0}
    text = "\n".join(knn.lines(found))
    assert "700 x 16 float32, 40 queries, k=5, n=3 turns" in text
    kept = json.loads(json.dumps(found.as_json()))
    assert kept["ratio"] == sorted(found.ratios)[1]
    assert kept["faster"]["one search"]["median"] == sorted(found.twice)[1]
    assert kept["baseline"] == "faiss-cpu, two searches"
    assert min(two * one for two, one in zip(found.twice, found.cpu, strict=True)) > 1  # two searches cost more than one
    assert found.first > 0.99


def test_another_neighbour_is_noticed() -> None:
    bank = torch.eye(3)
    near, found = torch.tensor([[0, 1]]), torch.tensor([[0, 2]])
    assert knn._unexplained(bank, torch.tensor([[3.0, 2.0, 1.0]]), near, found) == 1
    assert knn._unexplained(bank, torch.tensor([[3.0, 2.0, 2.0]]), near, found) == 0


def test_without_faiss_and_with_absurd_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot search"):
        knn.bench(Sizes(bank=3, k=4))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss-cpu, which is not installed"):
        knn.bench(SMALL)


def test_the_command_line() -> None:
    words = ["knn", "--bank", "300", "--dim", "8", "--queries", "20", "--k", "3", "--n", "2", "--json"]
    done = CliRunner().invoke(commands.app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sizes"]["bank"] == 300
