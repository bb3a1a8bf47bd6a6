"""Numbers that are not finite stop a run with step, cause and last good checkpoint; a collapse is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isd_repro.interfaces import Batch, StepOutput
from isd_repro.methods import isd
from isd_repro.train import monitor
from tests.faults import chain, world

Change = Callable[[isd.Method, StepOutput], StepOutput]


def at_step(patch: pytest.MonkeyPatch, step: int, change: Change) -> None:
    """Change the method and what it returns at one step, counted from 1."""
    real, count = isd.Method.forward, iter(range(1, 10**9))

    def forward(self: isd.Method, batch: Batch) -> StepOutput:
        out = real(self, batch)
        return change(self, out) if next(count) == step else out

    patch.setattr(isd.Method, "forward", forward)


def bad_loss(value: float) -> Change:
    return lambda method, out: StepOutput(out.loss * value, out.metrics)


class Spoilt(torch.autograd.Function):
    """The number that goes in, with a gradient that is none."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def bad_gradient(method: isd.Method, out: StepOutput) -> StepOutput:
    return StepOutput(Spoilt.apply(out.loss), out.metrics)


def bad_bank(method: isd.Method, out: StepOutput) -> StepOutput:
    method.bank.rows[5, 1] = torch.inf
    return out


def bad_statistics(method: isd.Method, out: StepOutput) -> StepOutput:
    norm = next(module for module in method.teacher.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.running_var is not None
    norm.running_var[0] = torch.nan
    return out


def diverged(folder: Path, step: int, change: Change) -> str:
    """What is said when the change ends the run."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, change)
        result = chain.call(folder, "pretrain", "isd")
    assert result.code == 1, result
    return result.err


# step of the fault, step at which it is seen, what is said; log_every is 2 and an epoch 5 steps
CASES: dict[str, tuple[int, Change, int, str]] = {
    "loss nan": (3, bad_loss(float("nan")), 4, r"a loss earlier in the epoch was nan|the loss is nan"),
    "gradient": (8, bad_gradient, 8, r"no finite gradient in student\.backbone\.\S+, .* and \d+ more; no finite value in"),
    "bank": (10, bad_bank, 10, r"no finite value in bank\.rows"),
    "statistics": (15, bad_statistics, 15, r"no finite value in teacher\.backbone\.\S+running_var"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_run_stops_before_anything_is_saved(folder: Path, kind: str) -> None:
    fault, change, seen, words = CASES[kind]
    error, sound = diverged(folder, fault, change), (fault - 1) // 5 * 5
    found = re.search(
        r"error: step (\d+) \(epoch (\d)\): (.*); all was finite after step (\d+); last good checkpoint: (.*)", error
    )
    assert found, error
    assert re.search(words, found[3]), error
    assert (int(found[1]), int(found[2]), int(found[4])) == (seen, (seen - 1) // 5 + 1, sound), error
    (state,) = world.states(folder)
    point = state / "checkpoint.pt"
    assert found[5] == (f"{point}, of step {sound}" if sound else "none; the run failed before the first was saved")
    assert world.written(folder) == set()
    for path in state.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        assert content["progress"]["step"] <= sound
        assert all(bool(value.isfinite().all()) for value in content["method"].values())


def test_the_last_good_point_goes_on(folder: Path, undisturbed: Path) -> None:
    """A fault of the machine, not of the parameters: the repetition passes."""
    diverged(folder, 8, bad_gradient)
    assert "resuming after step 5" in world.train(folder)
    assert world.encoder(folder) == world.encoder(undisturbed)
    record = world.record(folder)
    assert [attempt.outcome for attempt in record.attempts] == ["failed", "finished"]


def explode(method: isd.Method, out: StepOutput) -> StepOutput:
    """Weights that are finite and whose products are not."""
    with torch.no_grad():
        for parameter in method.teacher.backbone.parameters():
            parameter.mul_(1e20)
    return out


def test_weights_that_exploded_at_the_last_step_are_not_exported(folder: Path) -> None:
    error = diverged(folder, 15, explode)
    assert "after the last step encoder 'teacher' produces features that are not finite for 16 of 16 images" in error
    assert re.search(r"last good checkpoint: .*/checkpoint\.pt, of step 10\n", error)
    assert world.written(folder) == set()


def test_looking_at_features_changes_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    monitor.check_features({"student": module}, torch.rand(4, 1, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen(bad: float, dtype: torch.dtype) -> None:
    module, rows = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.full((40, 30), torch.finfo(dtype).max, dtype=dtype)
    module.register_buffer("rows", rows)
    assert monitor.is_finite(module)  # the largest number is one, too
    for values in (rows, module.get_parameter("0.weight").data, module.get_buffer("1.running_var")):
        kept = values.flatten()[-1].clone()
        values.flatten()[-1] = bad
        assert not monitor.is_finite(module)
        values.flatten()[-1] = kept
    assert monitor.is_finite(module)


# --- collapse ---------------------------------------------------------------------------------------------------------------


def test_a_collapse_is_reported(folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the run, in the rows of its epochs and in the record; the run itself goes on."""
    spread, real, count = {1: 0.0101, 2: 0.004, 3: 0.008}, isd.Method.forward, iter(range(10**9))

    def forward(self: isd.Method, batch: Batch) -> StepOutput:
        out = real(self, batch)
        return StepOutput(out.loss, {**out.metrics, "spread": torch.tensor(spread[next(count) // 5 + 1])})

    monkeypatch.setattr(isd.Method, "forward", forward)
    said = world.train(folder)
    assert said.count("warning: ") == 2
    assert "isd: warning: the embeddings collapsed in epoch 2: embedding std 0.004, below 0.01" in said
    rows = [json.loads(line) for line in world.outputs(folder)["metrics"].read_text("utf-8").splitlines()]
    assert [row.get("warning") for row in rows] == [None, "collapse", "collapse"]
    record = world.record(folder)
    text = "embeddings collapsed in 2 of 3 epochs, first 2, last 3: embedding std down to 0.004, below 0.01"
    assert record.warnings == (text,)
    assert world.encoder(folder) == world.encoder(undisturbed)
