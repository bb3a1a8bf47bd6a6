"""Many settings on one pass: that the heads are those trained alone, and that a wrong one is seen. No time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as commands
from benchmarks import linear, turns
from isd_repro.evaluations import linear as protocol
from isd_repro.runtime.errors import ConfigError

SMALL = linear.Sizes(images=24, batch=10, side=16, classes=5, settings=7, repeats=2, arch="resnet-narrow", width=4)


def test_the_grid_begins_with_the_paper_and_has_no_setting_twice() -> None:
    settings = linear.grid(50)
    assert (settings[0].lr, settings[0].weight_decay) == (0.01, 1e-4)
    assert len({(each.lr, each.weight_decay) for each in settings}) == 50


def test_heads_of_one_pass_are_bit_equal_to_heads_alone() -> None:
    found = linear.bench(SMALL)
    assert list(found.seconds) == ["one setting", "7 settings"]
    assert found.check["largest difference to a head alone"] == 0.0
    assert found.check["least difference of two heads"] > 0.0
    assert found.floor["s of the backbone alone"] > 0
    assert "7 settings" in "\n".join(turns.lines(found))


def test_a_rider_with_another_rate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if riders followed the rate of the one that they ride with."""
    right, first = protocol.rider, linear.grid(1)[0]
    monkeypatch.setattr(
        protocol,
        "rider",
        lambda name, title, task, own, device: right(name, title, task, own.model_copy(update={"lr": first.lr}), device),
    )
    assert linear.bench(SMALL).check["largest difference to a head alone"] > 1e-4


def test_the_pass_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear._Problem(SMALL, torch.device("cpu"))
    passes: list[int] = []
    problem.backbone.register_forward_hook(lambda *_: passes.append(1))
    assert len(problem.heads(linear.grid(7))) == 7
    assert len(passes) == len(problem.batches) == 3


def test_absurd_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot measure 51 settings"):
        linear.bench(linear.Sizes(settings=51))
    with pytest.raises(ConfigError, match="cannot measure"):
        linear.bench(linear.Sizes(images=0))
    with pytest.raises(ConfigError, match="'vgg' is none of resnet18"):
        linear.sizes_of(arch="vgg")


def test_the_command_line() -> None:
    words = ["linear", "--images", "8", "--batch", "4", "--side", "8", "--settings", "3", "--arch", "resnet-narrow"]
    done = CliRunner().invoke(commands.app, [*words, "--width", "2", "--n", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["what"] == "linear"
