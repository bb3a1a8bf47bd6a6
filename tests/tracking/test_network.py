"""The live view against a server that works, dies, refuses or dawdles: it costs a run bounded seconds and no data.

With the limits of `tracking.session` a stage loses at most INIT_TIMEOUT at its start and FINISH_TIMEOUT at its end. The bounds
here are those sums, with room for a loaded machine on which the client's own start takes many seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isd_repro.config.params import Tracking
from isd_repro.tracking import RunTracker, open_tracker, read_metrics, session
from tests.faults.world import ROOT
from tests.tracking import server as servers
from tests.tracking.reading import history, read_wandb
from tests.tracking.server import Server

ROOM = 60.0  # seconds for the client's processes on a loaded machine
ROWS = [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, 5)]


def start(folder: Path, mode: str = "auto") -> RunTracker:
    return open_tracker(
        folder / "metrics.jsonl",
        tracking=Tracking.model_validate({"wandb": mode, "project": "isd-test"}),
        layout_root=folder,
        run_id="demo-isd-pretrain-0123",
        group="demo-isd",
        job_type="pretrain",
        config={"tau_student": 0.02},
        tags=["profile:demo"],
    )


def rows_of(server: Server) -> list[dict[str, float]]:
    (run,) = server.runs.values()
    return [{key: row[key] for key in ("epoch", "loss")} for row in run.history]


def test_online_rows_arrive(tmp_path: Path, online: Server) -> None:
    with start(tmp_path) as tracker:
        for row in ROWS:
            tracker.log(row)
    assert rows_of(online) == ROWS == read_metrics(tmp_path / "metrics.jsonl")
    (run,) = online.runs.values()
    assert (run.exit_code, run.fields["groupName"], run.fields["tags"]) == (0, "demo-isd", ["profile:demo"])


def test_a_resumed_run_is_one_run(tmp_path: Path, online: Server) -> None:
    for part in (ROWS[:2], ROWS[2:]):
        with start(tmp_path) as tracker:
            for row in part:
                tracker.log(row)
    assert rows_of(online) == ROWS


def test_a_server_that_dies_in_mid_run_costs_no_row_and_bounded_time(
    tmp_path: Path, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 5.0)
    tracker = start(tmp_path)
    tracker.log(ROWS[0])
    online.die()
    for row in ROWS[1:]:
        tracker.log(row)
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 5 + ROOM
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    (kept,) = (tmp_path / "wandb").glob("run-*/run-*.wandb")  # `wandb sync` sends it
    assert kept.stat().st_size > 0


def test_a_process_whose_server_died_ends(tmp_path: Path, online: Server) -> None:
    """Leaving the process waits for nothing either: W&B's own last words at exit are bounded by the same limit."""
    script = f"""
import sys
from pathlib import Path
from isd_repro.tracking import session
session.FINISH_TIMEOUT = 5.0
from tests.tracking.test_network import ROWS, start
tracker = start(Path({str(tmp_path)!r}))
tracker.log(ROWS[0])
print("ready", flush=True)
sys.stdin.readline()
for row in ROWS[1:]:
    tracker.log(row)
tracker.close()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        online.die()
        process.communicate("\n", timeout=5 + ROOM)
    assert process.returncode == 0
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS


@pytest.mark.parametrize("trouble", ["refuses", "dawdles"])
def test_a_server_that_is_of_no_use_is_left_for_the_disk(
    tmp_path: Path, online: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    monkeypatch.setattr(session, "INIT_TIMEOUT", 4.0)
    online.refuse, online.delay = trouble == "refuses", 30.0 if trouble == "dawdles" else 0.0
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), start(tmp_path) as tracker:
        for row in ROWS:
            tracker.log(row)
    assert time.monotonic() - began < 4 + ROOM
    assert "W&B is offline (online failed" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    assert history(read_wandb(tmp_path)) == ROWS
    assert rows_of(online) == [] if online.runs else True


def test_a_slow_server_gets_everything_and_holds_up_no_step(tmp_path: Path, online: Server) -> None:
    """Each answer takes half a second; a thousand rows are written and handed over before the first can be answered."""
    with start(tmp_path) as tracker:
        online.delay = 0.5
        asked = len(online.requests)
        for step in range(1000):
            tracker.log({"epoch": 1, "step": step, "loss": 1.0})
        answered = len(online.requests) - asked
        assert answered < 50  # a step that waited for an answer would have made one request each
    (run,) = online.runs.values()
    assert [row["step"] for row in run.history] == list(range(1000))


def test_a_service_that_does_not_end_is_ended(tmp_path: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself would wait for it without end."""
    start(tmp_path).close()
    (process,) = session.service()
    os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 1.0)
    began = time.monotonic()
    session.release()
    assert time.monotonic() - began < ROOM
    assert session.service() == []


def test_the_stated_limits_are_the_ones_in_force(tmp_path: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    given: dict[str, float] = {}
    settings = wandb.Settings

    def watched(**values: object) -> object:
        given.update({key: value for key, value in values.items() if isinstance(value, float)})
        return settings(**values)

    monkeypatch.setattr(wandb, "Settings", watched)
    monkeypatch.setattr(session, "INIT_TIMEOUT", 31.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 61.0)
    start(tmp_path).close()
    assert given == {"init_timeout": 31.0, "finish_timeout": 61.0}
    text = (ROOT / "docs" / "wandb.md").read_text("utf-8")
    assert "at most 30 seconds when a stage begins and at most 60 when it ends" in text


def test_the_limits_themselves() -> None:
    assert (session.INIT_TIMEOUT, session.FINISH_TIMEOUT) == (30.0, 60.0)
    assert servers.KEY == "0" * 40
