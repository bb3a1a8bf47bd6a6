"""The comparison itself: what it runs and reports. No time is asserted."""

from __future__ import annotations

import inspect
import json

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as commands
from benchmarks import tracking
from benchmarks.tracking import Sizes
from isd_repro.methods import isd
from isd_repro.nn.health import health
from isd_repro.runtime.errors import ConfigError, UserError

SMALL = Sizes(batch=4, side=8, width=4, bank=8, steps=3, epochs=2, repeats=2)


def test_turns_ratios_and_equal_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened: list[str] = []
    plain = vars(tracking)["open_tracker"]

    def watched(*path: object, **options: object) -> object:
        opened.append(options["tracking"].wandb)  # type: ignore[attr-defined]
        return plain(*path, **options)

    monkeypatch.setattr(tracking, "open_tracker", watched)
    measured = vars(isd)["health"]
    found = tracking.bench(SMALL)
    assert vars(isd)["health"] is measured
    assert opened == ["off", *("off", "off", "offline"), *("off", "offline", "off")]  # the order rotates
    assert {arm: len(values) for arm, values in found.speed.items()} == {"bare": 2, "off": 2, "on": 2}
    assert found.ratios("off") == [on / off for on, off in zip(found.speed["on"], found.speed["off"], strict=True)]
    assert found.losses
    assert len(found.ends) == 2
    text = "\n".join(tracking.lines(found))
    assert "ISD, batch 4 of 8 px, width 4, bank 8, 2 epochs of 3 steps, n=2 turns" in text
    assert "bit-equal in all turns" in text
    assert json.loads(json.dumps(found.as_json()))["ratio"] == sum(found.ratios("off")) / 2


def test_bare_measures_no_health() -> None:
    with tracking._without_health(True):
        assert vars(isd)["health"]() == {}
    with tracking._without_health(False):
        assert vars(isd)["health"] is health


def test_without_wandb_and_with_absurd_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs W&B"):
        tracking.bench(SMALL)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="cannot train"):
        tracking.bench(Sizes(batch=3, bank=4))


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["tracking", "--n", "1", "--steps", "2", "--epochs", "1", "--batch", "4", "--json"]
    done = CliRunner().invoke(commands.app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sizes"]["steps"] == 2


def test_the_defaults_are_turns_that_mean_something() -> None:
    """At the speed of one slow core a turn lasts ten seconds and more; W&B's start beside it takes about one."""
    given = {name: parameter.default for name, parameter in inspect.signature(commands.bench_tracking).parameters.items()}
    sizes = Sizes()
    assert (given["n"], given["steps"], given["epochs"], given["batch"]) == (9, 80, 2, 64)
    assert (sizes.repeats, sizes.steps, sizes.epochs, sizes.batch) == (9, 80, 2, 64)
