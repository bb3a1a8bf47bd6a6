"""The metrics file survives anything, and W&B, the real one, is a view that can break without harm."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isd_repro.config.params import Tracking
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.tracking import RunTracker, media, open_tracker, read_metrics, session, truncate_metrics, wanted_mode
from tests.tracking.reading import read_wandb


def start(folder: Path, mode: str = "offline", path: Path | None = None, run_id: str = "demo-Isd.r18/D1-pretrain") -> RunTracker:
    return open_tracker(
        path,
        tracking=Tracking.model_validate({"wandb": mode, "project": "isd-test"}),
        layout_root=folder,
        run_id=run_id,
        group="demo",
        job_type="pretrain",
        config={"method": "isd", "tau_student": 0.02},
    )


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def test_a_killed_run_leaves_every_finished_row(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "isd" / "metrics.jsonl"
    script = f"""
import sys, time
from pathlib import Path
from isd_repro.config.params import Tracking
from isd_repro.tracking import open_tracker
tracker = open_tracker(Path({str(path)!r}), tracking=Tracking(wandb="off"), layout_root=Path({str(tmp_path)!r}),
                       run_id="r", group="g", job_type="pretrain", config={{}})
for epoch in range(1, 6):
    tracker.log({{"epoch": epoch, "loss": 1 / epoch}})
print("written", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert read_metrics(path) == [{"epoch": epoch, "loss": 1 / epoch} for epoch in range(1, 6)]


def test_a_torn_last_line_is_dropped_on_reading_and_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "lo', "utf-8")
    assert read_metrics(path) == [{"epoch": 1, "loss": 2.0}]
    with start(tmp_path, "off", path) as tracker:
        tracker.log({"epoch": 2, "loss": 1.5})
    assert path.read_text("utf-8") == '{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": 1.5}\n'


def test_values_that_are_not_finite_become_null_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with start(tmp_path, "off", path) as tracker:
        tracker.log({"epoch": 1, "loss": math.nan, "norm": -math.inf, "lr": 0.1})
    assert read_metrics(path) == [{"epoch": 1, "loss": None, "norm": None, "lr": 0.1, "not_finite": "loss=nan, norm=-inf"}]


def test_the_last_row_of_an_epoch_wins_and_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with start(tmp_path, "off", path) as tracker:
        for epoch, loss in ((1, 4.0), (2, 3.0), (3, 2.0), (2, 3.5)):
            tracker.log({"epoch": epoch, "loss": loss})
        tracker.log({"epoch": 2, "step": 20, "loss": 9.0})
    assert [(row["epoch"], row.get("step"), row["loss"]) for row in read_metrics(path)] == [
        (1, None, 4.0),
        (2, None, 3.5),
        (3, None, 2.0),
        (2, 20, 9.0),
    ]


def test_truncate_keeps_what_a_checkpoint_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with start(tmp_path, "off", path) as tracker:
        for epoch in range(1, 5):
            tracker.log({"epoch": epoch, "loss": math.nan if epoch == 1 else 0.5})
    path.write_text(path.read_text("utf-8") + '{"epoch": 5', "utf-8")
    truncate_metrics(path, lambda row: row["epoch"] <= 2)
    assert [(row["epoch"], row["loss"], row.get("not_finite")) for row in read_metrics(path)] == [
        (1, None, "loss=nan"),
        (2, 0.5, None),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    truncate_metrics(tmp_path / "absent.jsonl", lambda row: False)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(("text", "found"), [("{\n", "not JSON"), ('{"epoch": 1}\n[3]\n', "found list")])
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=found) as caught:
        read_metrics(path)
    assert f"{path}:{text.count(chr(10))}" in caught.value.message
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_full_disk_is_told_and_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left") as caught, start(tmp_path, "off", Path("/dev/full")) as tracker:
        tracker.log({"epoch": 1})
    assert "resumes" in caught.value.hint


# --- W&B ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("wandb_on")
def test_the_offline_run_holds_every_row_over_its_epoch(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with start(tmp_path, "auto", path) as tracker:
        for epoch in (1, 2, 3):
            tracker.log({"epoch": epoch, "loss": 1 / epoch, "lr": 0.01})
    records = read_wandb(tmp_path)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["run_id"] == "demo-isd-r18-d1-pretrain"
    assert (run["run_group"], run["job_type"], run["project"]) == ("demo", "pretrain", "isd-test")
    assert run["config"]["update"]["tau_student"] == 0.02
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [{key: item[key] for key in ("epoch", "loss", "lr")} for item in history] == read_metrics(path)
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert any(metric.get("glob_name") == "*" and metric["step_metric"] == "epoch" for metric in metrics)
    assert not any(record["type"] == "output_raw" for record in records)


@pytest.mark.usefixtures("wandb_on")
def test_a_failed_block_is_a_failed_wandb_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), start(tmp_path) as tracker:
        tracker.log({"epoch": 1, "loss": 1 / 0})
    assert [record["exit"]["exit_code"] for record in read_wandb(tmp_path) if record["type"] == "exit"] == [1]


@pytest.mark.usefixtures("wandb_on")
def test_an_unreachable_server_ends_offline_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with caplog.at_level(logging.INFO), start(tmp_path, "auto") as tracker:
        tracker.log({"epoch": 1, "loss": 1.0})
    assert time.monotonic() - began < 30
    assert [record.levelname for record in caplog.records if record.name == "isd_repro.tracking"] == ["WARNING"]
    assert "W&B is offline (online failed" in caplog.text
    assert sum(record["type"] == "history" for record in read_wandb(tmp_path)) == 1


@pytest.mark.usefixtures("wandb_on")
def test_online_without_a_key_does_not_ask_for_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, "online").close()
    assert "no key is configured" in caplog.text
    assert (tmp_path / "wandb" / "latest-run").exists()


@pytest.mark.usefixtures("wandb_on")
@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_a_broken_wandb_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    import wandb

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("W&B fell over\nwith many lines")

    class Broken:
        def __getattr__(self, name: str) -> object:
            return fail if name == broken else lambda *_, **__: None

    monkeypatch.setattr(wandb, "init", fail if broken == "init" else lambda **_: Broken())
    path = tmp_path / "metrics.jsonl"
    with start(tmp_path, "offline", path) as tracker:
        for epoch in (1, 2):
            tracker.log({"epoch": epoch, "loss": 1.0})
    assert [row["epoch"] for row in read_metrics(path)] == [1, 2]
    warnings = [record.getMessage() for record in caplog.records if record.name == "isd_repro.tracking"]
    assert len(warnings) == 1
    assert "W&B is off" in warnings[0]
    assert "RuntimeError: W&B fell over" in warnings[0]
    assert "many lines" not in warnings[0]


@pytest.mark.usefixtures("wandb_on")
def test_a_missing_wandb_is_no_warning_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        start(tmp_path, "auto").close()
        start(tmp_path, "online").close()
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wandb_on")
def test_off_imports_no_wandb_and_writes_no_folder(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from isd_repro.config.params import Tracking
from isd_repro.tracking import open_tracker
root = Path({str(tmp_path)!r})
options = dict(tracking=Tracking(wandb="off"), layout_root=root, run_id="r", group="g", job_type="j", config={{}})
with open_tracker(root / "m.jsonl", **options) as tracker:
    tracker.log({{"epoch": 1}})
assert "wandb" not in sys.modules, "wandb was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    ("parameter", "environment", "mode"),
    [
        ("auto", None, "auto"),
        ("auto", "offline", "offline"),
        ("online", "disabled", "off"),
        ("off", "online", "off"),
        ("offline", "online", "online"),
        ("auto", "nonsense", "off"),
    ],
)
def test_wandb_mode_overrides_all_but_off(
    monkeypatch: pytest.MonkeyPatch, parameter: session.Mode, environment: str | None, mode: session.Mode
) -> None:
    if environment is None:
        monkeypatch.delenv("WANDB_MODE")
    else:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wanted_mode(parameter) == mode


def test_the_older_variable_switches_wandb_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for value, mode in (("true", "off"), ("1", "off"), ("false", "offline"), ("", "offline")):
        monkeypatch.setenv("WANDB_DISABLED", value)
        assert wanted_mode("auto") == mode


def test_an_unknown_wandb_mode_is_told_once_and_turns_wandb_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session._say_unknown.cache_clear()
    monkeypatch.setenv("WANDB_MODE", "onlnie")
    for _ in range(2):
        start(tmp_path, "online").close()
    assert [record.getMessage() for record in caplog.records] == [
        "WANDB_MODE=onlnie is unknown (known: online, offline, disabled): W&B is off"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_picture_lies_whole_on_the_disk_with_its_caption(tmp_path: Path) -> None:
    pixels = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
    with RunTracker(None, tmp_path / "media") as tracker:
        tracker.log_image("views", pixels, "What is seen")
        first = (tmp_path / "media" / "views.png").read_bytes()
        tracker.log_image("views", pixels, "What is seen")
    assert [path.name for path in (tmp_path / "media").iterdir()] == ["views.png"]
    assert (tmp_path / "media" / "views.png").read_bytes() == first
    (found,) = media.kept(tmp_path / "media")
    assert (found.key, found.caption) == ("views", "What is seen")
    with Image.open(found.path) as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), pixels)


def test_a_picture_that_cannot_be_kept_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "media").write_text("in the way", "utf-8")
    with RunTracker(None, tmp_path / "media") as tracker:
        tracker.log_image("views", torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert "the picture views is not kept" in caplog.text


@pytest.mark.usefixtures("wandb_on")
def test_nothing_is_written_to_the_home_but_wandbs_own_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, root = tmp_path / "home", tmp_path / "root"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with start(root) as tracker:
        tracker.log({"epoch": 1, "loss": 1.0})
    assert {path.relative_to(home).parts[:3] for path in home.rglob("*") if path.is_file()} <= {(".cache", "wandb", "logs")}
