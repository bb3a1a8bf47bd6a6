"""The day on a GPU, rehearsed at toy size: every step ends well and says what it found, and one that hangs stops no other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day, gpu_steps

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_step_runs_at_toy_size(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu_day", "--out", str(tmp_path), "--rehearse", "--skip", "tests"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
    assert [row for row in rows if "failed" in row or row.get("ok") is False] == []
    ends = {row["step"]: row["how"] for row in rows if row["name"] == "end"}
    assert ends == dict.fromkeys((name for group in gpu_day.PLAN for name in group if name != "tests"), "ok")
    assert all(row["code"] == (75 if "asked to stop" in row["name"] else 0) for row in rows if "code" in row)
    assert len(done.stdout) < 16_000
    assert not list(tmp_path.glob(".*"))


def test_a_step_that_hangs_is_killed_and_one_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(bench: Any) -> None:
        bench.say("before", ms=1.0)
        print("words")
        time.sleep(60)

    def fails(bench: Any) -> None:
        raise RuntimeError("no such kernel")

    def works(bench: Any) -> None:
        bench.attempt("an arm", lambda: 1 / 0)
        bench.say("after", ms=2.0)

    monkeypatch.setattr(gpu_day, "LEAST", 0.1)
    monkeypatch.setattr(gpu_steps, "STEPS", {"env": hangs, "tests": fails, "loss": works})
    day = gpu_day.Day(tmp_path, 60, rehearse=True)
    assert day.run([{"env": 1.0, "tests": 9.0}, {"loss": 9.0}]) == 0
    assert [(name, how) for name, how, _ in sorted(day.ends)] == [
        ("env", "killed at its limit"),
        ("loss", "ok"),
        ("tests", "failed with 1"),
    ]
    rows = [json.loads(line) for line in day.results.read_text("utf-8").splitlines()]
    assert {row["name"]: row.get("failed") for row in rows if row["step"] != "day" and row["name"] != "end"} == {
        "before": None,
        "failed": "RuntimeError: no such kernel",
        "an arm": "ZeroDivisionError: division by zero",
        "after": None,
    }
    assert "words" in (tmp_path / "log.txt").read_text("utf-8")
