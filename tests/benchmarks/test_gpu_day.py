"""The day on a GPU: a step that hangs or fails stops no other. `make rehearse` runs all of it at toy size."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, gpu_checks, gpu_day, harness


def test_a_step_that_hangs_is_killed_and_one_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(context: Any) -> None:
        context.say("before", ms=1.0)
        sys.stdout.write("words\n")
        time.sleep(60)

    def fails(context: Any) -> None:
        with context.attempt("one of two"):
            raise ZeroDivisionError("nothing")
        raise RuntimeError("no such kernel")

    def measure(sizes: harness.Sizes, say: harness.Say) -> harness.Comparison:
        return harness.compare("it", sizes, {"a": lambda: harness.Seconds(2), "b": lambda: harness.Seconds(1)})

    monkeypatch.setattr(gpu_day, "LEAST", 0.1)
    monkeypatch.setattr(gpu_checks, "CHECKS", {"environment": hangs, "smoke": fails})
    monkeypatch.setattr(cases, "cases", lambda toy: {"loss-d128": cases.Case(measure, harness.Sizes())})
    day = gpu_day.Day(tmp_path, 60, toy=False)
    assert day.run([{"environment": 1.0, "smoke": 9.0}, {"loss-d128": 9.0}]) == 1
    ends = {"environment": "killed at its limit", "loss-d128": "ok", "smoke": "failed with 1"}
    assert {name: how for name, how, _ in day.ends} == ends
    text = "\n".join(gpu_day.summary(tmp_path, day.ends, 1.0))
    assert "FAILED smoke: one of two: ZeroDivisionError: nothing" in text
    assert "FAILED smoke: failed: RuntimeError: no such kernel" in text
    assert "loss-d128: b 1000 ms, x2.00" in text
    assert "environment: before: ms=1" in text
    assert "words" in (tmp_path / "log.txt").read_text("utf-8")


def test_every_step_of_the_plan_exists() -> None:
    names = [name for group in gpu_day.PLAN for name in group]
    known = {name for subject in cases.SUBJECTS for name in subject.CUDA}
    assert set(names) == {*gpu_checks.CHECKS, *known} - {"tracking"}
    assert len(names) == len(set(names))
