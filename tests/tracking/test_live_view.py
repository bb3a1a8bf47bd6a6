"""The live view, with the real W&B client: complete where it works, and free of harm where it does not.

With the limits of `tracking.session` a stage loses at most INIT_TIMEOUT at its start and FINISH_TIMEOUT at its end. The bounds
here are those sums, with room for a loaded machine on which the client's own start takes many seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from isd_repro.config.params import Tracking
from isd_repro.runtime.errors import Preempted
from isd_repro.tracking import RunTracker, open_tracker, read_metrics, session, wanted_mode
from isd_repro.tracking.names import StageRun, allowed
from tests.faults.world import ROOT
from tests.tracking.reading import Records, history, offline_runs
from tests.tracking.server import Server

ROOM = 60.0  # seconds for the client's processes on a loaded machine
ROWS = [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, 5)]


def start(folder: Path, mode: str = "auto", name: str = "demo-Isd.r18/D1-pretrain") -> RunTracker:
    run = StageRun(allowed(name), name, "demo", "pretrain", ("profile:demo",), {"method": {"name": "isd", "tau_student": 0.02}})
    return open_tracker(folder / "metrics.jsonl", run, Tracking.model_validate({"wandb": mode, "project": "isd-test"}), folder)


def only_run(folder: Path) -> Records:
    (records,) = offline_runs(folder).values()
    return records


def rows_of(server: Server) -> list[dict[str, float]]:
    (run,) = server.runs.values()
    return [{key: row[key] for key in ("epoch", "loss")} for row in run.history]


# --- what arrives -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wandb_on")
def test_the_offline_run_holds_every_row_over_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a home: what W&B needs beside the run lies in its own folder. A terminal is told of the run and of nothing else."""
    monkeypatch.setenv("HOME", "/dev/null/absent")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with start(tmp_path) as tracker:
        for row in ROWS:
            tracker.log(row)
        tracker.log_table("per-class", ["class"], [["cat"]])
    session.release()
    assert capfd.readouterr().err == f"W&B: logged offline; run `wandb sync` in {tmp_path} to upload it\n"
    records = only_run(tmp_path)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["run_id"] == "demo-isd-r18-d1-pretrain"
    assert (run["run_group"], run["job_type"], run["project"]) == ("demo", "pretrain", "isd-test")
    assert run["config"]["update"]["method"]["tau_student"] == 0.02
    *rows, table = history(records)
    assert rows == ROWS == read_metrics(tmp_path / "metrics.jsonl")
    assert table["tables/per-class._type"] == "table-file"
    metrics = {
        found.get("glob_name") or found["name"]: found for found in (one["metric"] for one in records if one["type"] == "metric")
    }
    assert metrics["*"]["step_metric"] == "epoch"
    assert metrics["loss"]["summary"] == {"last": True, "min": True}
    assert not any(record["type"] == "output_raw" for record in records)


def test_online_a_resumed_run_is_one_run_and_gets_what_a_kill_has_lost(tmp_path: Path, online: Server) -> None:
    with start(tmp_path) as tracker:
        for row in ROWS[:2]:
            tracker.log(row)
    (run,) = online.runs.values()
    del run.history[1]  # the client was killed before it had sent this
    run.summary = {"epoch": 1, "loss": {"min": 1.0, "last": 1.0}}
    with start(tmp_path) as tracker:
        for row in ROWS[1:]:  # epoch 2 once more: it was later than the checkpoint
            tracker.log(row)
    assert sorted(rows_of(online), key=lambda row: row["epoch"]) == ROWS
    assert (run.exit_code, run.fields["groupName"], run.fields["tags"]) == (0, "demo", ["profile:demo"])


@pytest.mark.usefixtures("wandb_on")
def test_collapse_failure_and_preemption_alert(tmp_path: Path) -> None:
    def stopped() -> None:
        with start(tmp_path, "offline") as tracker:
            for epoch in (1, 2):
                tracker.log({"epoch": epoch, "loss": 1.0, "warning": "collapse"})
            raise Preempted("isd: SIGTERM: saved after step 20")

    with pytest.raises(Preempted):
        stopped()
    records = only_run(tmp_path)
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [1]
    alerts = [record["alert"] for record in records if record["type"] == "alert"]
    assert [alert["title"] for alert in alerts] == ["collapse", "pre-empted"]
    assert "saved after step 20" in alerts[1]["text"]


# --- what does not work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["refuses", "slow"])
def test_a_server_that_is_of_no_use_is_left_for_the_disk(
    tmp_path: Path, online: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    if trouble == "slow":
        monkeypatch.setattr(session, "INIT_TIMEOUT", 6.0)  # for the run on the disk, too, which a loaded machine starts in 3
    online.refuse, online.delay = trouble == "refuses", 30.0 if trouble == "slow" else 0.0
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), start(tmp_path) as tracker:
        for row in ROWS:
            tracker.log(row)
    assert time.monotonic() - began < 6 + ROOM
    assert [record.levelname for record in caplog.records if record.name == "isd_repro.tracking"] == ["WARNING"]
    assert "W&B is offline (online failed" in caplog.text
    assert history(only_run(tmp_path)) == ROWS == read_metrics(tmp_path / "metrics.jsonl")


def test_a_slow_server_holds_up_no_step(tmp_path: Path, online: Server) -> None:
    """Each answer takes half a second; a thousand rows are written and handed over before the first can be answered."""
    with start(tmp_path) as tracker:
        online.delay = 0.5
        asked = len(online.requests)
        for step in range(1000):
            tracker.log({"epoch": 1, "step": step, "loss": 1.0})
        assert len(online.requests) - asked < 50  # a step that waited for an answer would have made one request each
    (run,) = online.runs.values()
    assert [row["step"] for row in run.history] == list(range(1000))


def test_a_service_that_does_not_end_is_ended(tmp_path: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself would wait for it without end."""
    start(tmp_path).close()
    (process,) = session.service()
    os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 1.0)
    session.release()
    assert session.service() == []


def test_the_limits_are_those_of_the_documentation() -> None:
    text = (ROOT / "docs" / "wandb.md").read_text("utf-8")
    limits = (
        f"at most {session.INIT_TIMEOUT:.0f} seconds when a stage begins and at most {session.FINISH_TIMEOUT:.0f} when it ends"
    )
    assert limits in " ".join(text.split())


@pytest.mark.usefixtures("wandb_on")
def test_online_without_a_key_does_not_ask_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    start(tmp_path, "online").close()
    assert "no API key is configured" in caplog.text
    assert (tmp_path / "wandb" / "latest-run").exists()
    assert not session.has_key()
    host = session.server().partition("//")[2]
    (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n", "utf-8")
    assert session.has_key()


@pytest.mark.usefixtures("wandb_on")
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_broken_wandb_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    import wandb

    run = MagicMock(resumed=False)
    failing = {"side_effect": RuntimeError("W&B fell over\nwith many lines")}
    getattr(run, broken).configure_mock(**failing)
    monkeypatch.setattr(wandb, "init", MagicMock(**failing) if broken == "init" else lambda **_: run)
    with start(tmp_path, "offline") as tracker:
        for row in ROWS:
            tracker.log(row)
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "isd_repro.tracking"]
    assert "W&B is off" in warning
    assert warning.endswith("RuntimeError: W&B fell over)")


@pytest.mark.usefixtures("wandb_on")
def test_a_missing_wandb_is_no_warning_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        start(tmp_path, "auto").close()
        start(tmp_path, "online").close()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_off_imports_no_wandb_and_writes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail, with a warning
    with start(tmp_path, "off") as tracker:
        tracker.log({"epoch": 1})
    assert caplog.records == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("parameter", "environment", "disabled", "mode"),
    [
        ("auto", "", "", "auto"),
        ("auto", "offline", "false", "offline"),
        ("online", "disabled", "", "off"),
        ("off", "online", "", "off"),
        ("offline", "online", "", "online"),
        ("auto", "offline", "true", "off"),
        ("auto", "onlnie", "", "off"),
    ],
)
def test_the_environment_overrides_all_but_off(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    parameter: session.Mode,
    environment: str,
    disabled: str,
    mode: session.Mode,
) -> None:
    session._say_unknown.cache_clear()
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setenv("WANDB_DISABLED", disabled)
    assert [wanted_mode(parameter) for _ in range(2)] == [mode] * 2
    said = ["WANDB_MODE=onlnie is unknown (known: online, offline, disabled): W&B is off"]
    assert [record.getMessage() for record in caplog.records] == (said if environment == "onlnie" else [])
