"""Publishing from the disk: complete, once, resumable, from another machine, with lineage; against our own server."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.records import pack_labels, unpack_labels
from isd_repro.report.publish import Options, publish, replays
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, DataError, UserError
from isd_repro.tracking import history, open_stage, read_metrics, session
from isd_repro.tracking.publisher import Publisher
from isd_repro.tracking.replay import Replay
from tests.faults import world
from tests.tracking import reading
from tests.tracking.reading import epochs, head, offline_runs
from tests.tracking.server import SentRun, Server

READER = history.READER
STAGES = ("pretrain", "extract", "knn", "linear")
ALL = {"tiny-digits-prepare", *(f"tiny-isd-{stage}" for stage in (*STAGES, "summary")), "tiny-tiny-report"}


def send(folder: Path, *runs: str, upload: bool = False) -> str:
    params, layout = config.load(folder / "params.yaml")
    with (folder / "said.txt").open("w+", encoding="utf-8") as file:
        publish(runs, params, layout, Options(upload=upload), Console(file=file, width=200))
        file.seek(0)
        return file.read()


def replay_of(folder: Path, stage: str, *, failed: bool = False) -> Replay:
    params, layout = config.load(folder / "params.yaml")
    (found,) = [
        each for each in replays(["isd"], params, layout, Options()) if (each.run.job_type, each.failed) == (stage, failed)
    ]
    return found


def send_stage(folder: Path, stage: str, *, failed: bool = False) -> str:
    """One stage alone, which is what most of the time of a whole publication goes into seven times."""
    tracking = config.load(folder / "params.yaml")[0].tracking
    return Publisher(tracking, folder).send(replay_of(folder, stage, failed=failed))


def record_of(layout: Layout, part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(layout.record("isd", part).read_text("utf-8"))
    return found


def by_title(server: Server) -> dict[str, SentRun]:
    return {run.fields["displayName"]: run for run in server.runs.values()}


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def curve_of(run: SentRun) -> list[dict[str, Any]]:
    return [row for row in plain(run.history) if "epoch" in row and "loss" in row]


def test_everything_arrives_once_whoever_sends_it(profile: Path, online: Server, tmp_path: Path) -> None:
    """A second time, after a note was torn by a full disk, and from a machine without the first one's notes and rows."""
    assert "7 sent, 0 already there (isd-repro)" in send(profile)
    found, layout = by_title(online), world.layout_of(profile)
    assert set(found) == ALL
    assert_complete(found, layout)
    assert_lineage(found, online, layout)
    before = online.writes()
    assert before > 6
    assert "0 sent, 7 already there" in send(profile)
    assert online.writes() == before
    rows = {title: len(run.history) for title, run in found.items()}
    versions = [one.label for one in online.artifacts]
    (note,) = (profile / "wandb" / "published").rglob("tiny-isd-knn-*")
    whole = note.read_text("utf-8")
    note.write_text(whole[: len(whole) // 2], encoding="utf-8")
    assert "0 sent, 7 already there" in send(profile)
    assert note.read_text("utf-8") == whole
    other = tmp_path / "other"
    shutil.copytree(profile, other, ignore=shutil.ignore_patterns("wandb"))
    assert "0 sent, 7 already there" in send(other)
    assert {title: len(run.history) for title, run in found.items()} == rows
    assert [one.label for one in online.artifacts] == versions


def assert_complete(found: dict[str, SentRun], layout: Layout) -> None:
    """Every row, score, picture and table is there, and every stage can be grouped and filtered by what the run is."""
    pretrain = record_of(layout, "pretrain")
    assert {run.exit_code for run in found.values()} == {0}
    assert curve_of(found["tiny-isd-pretrain"]) == read_metrics(layout.metrics("isd"))
    assert [row["epoch"] for row in plain(found["tiny-isd-linear"].history) if "lr" in row] == [1, 2]
    knn, total = found["tiny-isd-knn"], found["tiny-isd-summary"]
    for score in record_of(layout, "knn")["scores"]:
        assert knn.summary[f"{score['encoder']}/{score['metric']}/{score['group']}"] == 100 * score["correct"] / score["n"]
    assert found["tiny-isd-pretrain"].summary["images/views"]["_type"] == "image-file"
    assert knn.summary["tables/per-class"]["_type"] == "table-file"
    assert (knn.fields["groupName"], knn.fields["jobType"]) == ("tiny-isd", "knn")
    assert total.summary["student/1-NN/all"] == knn.summary["student/1-NN/all"]
    assert total.summary["teacher/linear-last/all"] == found["tiny-isd-linear"].summary["teacher/linear-last/all"]
    assert total.config["linear"]["value"]["epochs"] == 2
    losses = [row["loss"] for row in pretrain["curve"]]
    assert found["tiny-isd-pretrain"].summary["loss"] == {"min": min(losses), "last": losses[-1]}
    for stage in (*STAGES, "summary"):
        own = {key: value["value"] for key, value in found[f"tiny-isd-{stage}"].config.items() if key != "_wandb"}
        assert (own["method"]["name"], own["method"]["tau_student"], own["optim"]["lr"]) == ("isd", 0.1, 0.05)
        assert (own["label"], own["subset"], own["numerics"]["seed"]) == ("ISD", "digits", 0)
        assert own["fingerprint"] == pretrain["fingerprint"]
        assert own["data"]["image_size"] == own["backbone"]["width"] * 5 == 20


def assert_lineage(found: dict[str, SentRun], server: Server, layout: Layout) -> None:
    """From the manifest to the report."""
    edges = {title: (sorted(run.used), sorted(run.logged)) for title, run in found.items()}
    assert edges["tiny-digits-prepare"] == ([], ["tiny-digits:v0"])
    assert edges["tiny-isd-pretrain"] == (["tiny-digits:v0"], ["tiny-isd-encoder:v0"])
    assert edges["tiny-isd-extract"] == (["tiny-digits:v0", "tiny-isd-encoder:v0"], ["tiny-isd-features:v0"])
    table = next(label for label in edges["tiny-isd-knn"][1] if label.startswith("run-"))  # W&B makes one of each table
    assert edges["tiny-isd-knn"] == (["tiny-isd-encoder:v0", "tiny-isd-features:v0"], sorted(["tiny-isd-knn:v0", table]))
    assert edges["tiny-isd-linear"][0] == ["tiny-isd-encoder:v0", "tiny-isd-features:v0"]
    assert edges["tiny-tiny-report"] == (["tiny-isd-knn:v0", "tiny-isd-linear:v0"], ["tiny-report:v0"])
    types = {one.name: one.type for one in server.artifacts if not one.name.startswith("run-")}
    assert set(types.values()) == {"manifest", "encoder", "features", "result", "report"}
    encoder = next(one for one in server.artifacts if one.name == "tiny-isd-encoder")
    assert encoder.metadata["sha256"] == files.sha256_file(layout.encoder("isd"))


def test_records_alone_are_enough_and_scores_that_changed_are_replaced(profile: Path, online: Server) -> None:
    """A clone without outputs of DVC's, but with rows of another run: the curve comes from the record.

    Then the same encoder is scored again by other code: W&B must not go on showing the old number.
    """
    layout = world.layout_of(profile)
    rows = layout.metrics("isd").read_text("utf-8").replace('"loss": ', '"loss": 1')
    shutil.rmtree(profile / "runs")
    shutil.rmtree(profile / "data")
    layout.metrics("isd").parent.mkdir(parents=True)
    layout.metrics("isd").write_text(rows, encoding="utf-8")
    for stage in ("pretrain", "knn"):
        assert send_stage(profile, stage) == "sent"
    assert curve_of(by_title(online)["tiny-isd-pretrain"]) == record_of(layout, "pretrain")["curve"]
    run, record = by_title(online)["tiny-isd-knn"], record_of(layout, "knn")
    label, found = unpack_labels(record["labels"]), np.roll(unpack_labels(record["predictions"]["teacher/1-NN"]), 1)
    wanted = 100 * int((label == found).sum()) / len(label)
    record["predictions"]["teacher/1-NN"] = pack_labels(found)
    for score in record["scores"]:
        if (score["encoder"], score["metric"]) == ("teacher", "1-NN"):
            score["correct"] = int((label == found).sum())
    layout.record("isd", "knn").write_text(json.dumps(record), encoding="utf-8")
    before, tables = run.summary["teacher/1-NN/all"], run.summary["tables/per-class"]["sha256"]
    assert send_stage(profile, "knn") == "sent"
    assert run.summary["teacher/1-NN/all"] == wanted != before
    assert plain(run.history)[-1].get("teacher/1-NN/all", wanted) == wanted
    assert run.summary["tables/per-class"]["sha256"] != tables


# --- failures -----------------------------------------------------------------------------------------------------------


def crash(profile: Path, epochs: int) -> Path:
    """The state that a killed pretraining leaves, of a configuration of its own, with a torn last line."""
    layout = world.layout_of(profile)
    state = layout.state("0123456789abcdef")
    state.mkdir(parents=True, exist_ok=True)
    rows = layout.metrics("isd").read_text("utf-8").splitlines(keepends=True)[:epochs]
    (state / "metrics.jsonl").write_text("".join(rows) + '{"epoch": 9', encoding="utf-8")
    (state / "run.json").write_text(json.dumps({"profile": "tiny", "run": "isd", "config": {"seed": 7}}), encoding="utf-8")
    return state


def test_a_crashed_run_is_published_as_failed_and_goes_on_later(profile: Path, online: Server) -> None:
    state = crash(profile, 1)
    assert send_stage(profile, "pretrain", failed=True) == "sent"
    run = online.runs["tiny-isd-pretrain-01234567"]
    assert [row["epoch"] for row in curve_of(run)] == [1]
    assert (run.exit_code, "failed" in run.fields["tags"], run.config["seed"]["value"]) == (1, True, 7)
    crash(profile, 3)
    assert send_stage(profile, "pretrain", failed=True) == "sent"
    assert [row["epoch"] for row in curve_of(run)] == [1, 2, 3]
    params, layout = config.load(profile / "params.yaml")
    with files.exclusive(state / "lock", "busy"):  # a process is training it
        assert not any(each.failed for each in replays(["isd"], params, layout, Options()))


def test_a_server_that_dies_is_told_and_the_next_attempt_goes_on(
    profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rows that it had not stored, once each."""
    send_stage(profile, "pretrain")
    run = by_title(online)["tiny-isd-pretrain"]
    del run.history[1]
    run.summary.pop("published")
    shutil.rmtree(profile / "wandb" / "published")
    online.die()
    monkeypatch.setattr(session, "INIT_TIMEOUT", 2.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 2.0)
    with pytest.raises(UserError, match="tiny-isd-pretrain: W&B did not accept it") as caught:
        send_stage(profile, "pretrain")
    assert "continues where it stopped" in caught.value.hint
    assert not list((profile / "wandb" / "published").rglob("tiny-*"))
    again = Server()
    again.runs, again.artifacts = online.runs, online.artifacts
    monkeypatch.setattr(session, "INIT_TIMEOUT", 60.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 60.0)
    session.release()
    monkeypatch.setenv("WANDB_BASE_URL", again.url)
    try:
        assert send_stage(profile, "pretrain") == "sent"
    finally:
        again.die()
    assert sorted(curve_of(run), key=lambda row: row["epoch"]) == read_metrics(world.layout_of(profile).metrics("isd"))
    assert run.exit_code == 0


# --- offline --------------------------------------------------------------------------------------------------------------


def test_offline_holds_the_same_once(profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "7 sent, 0 already there (offline; `wandb sync` uploads them)" in send(profile)
    found = offline_runs(profile)
    assert set(found) == ALL
    rows = [row for row in reading.history(found["tiny-isd-pretrain"]) if "loss" in row]
    assert rows == read_metrics(world.layout_of(profile).metrics("isd"))
    assert head(found["tiny-isd-linear"])["config"]["update"]["artifacts"] == {
        "in": {"tiny-isd-encoder": "encoder", "tiny-isd-features": "features"},
        "out": {"tiny-isd-linear": "result"},
    }
    folders = sorted((profile / "wandb").glob("offline-run-*"))
    encoder = world.layout_of(profile).encoder("isd").read_bytes()
    for upload in (False, True):  # large files stay here unless they are asked for
        assert ("0 sent, 7 already there" in send(profile, upload=upload)) != upload
        staged = [path.read_bytes() for path in (profile / "wandb" / "artifacts").rglob("*") if path.is_file()]
        assert (encoder in staged) == upload
        assert (sorted((profile / "wandb").glob("offline-run-*")) == folders) != upload


def test_wandb_sync_after_a_publish_online_sends_nothing_again(
    profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B's own command, to a server that has the epochs; without the marks, whose failure is only a warning, it sends all."""
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        send_stage(profile, "pretrain")
        patch.delenv("WANDB_MODE")
        patch.setattr(history, "READER", ("no-such-program",))
        with caplog.at_level(logging.WARNING):
            assert send_stage(profile, "pretrain") == "sent"
    assert "tiny-isd-pretrain was sent, but its offline files could not be marked" in caplog.text
    assert not list((profile / "wandb").glob("offline-run-*/*.synced"))
    shutil.rmtree(profile / "wandb" / "published")
    assert send_stage(profile, "pretrain") == "known"
    (run,) = online.runs.values()
    assert len(curve_of(run)) == 3
    command = [sys.executable, "-m", "wandb", "sync", "--yes"]
    done = subprocess.run(command, cwd=profile, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(curve_of(run)) == 3
    assert len(list((profile / "wandb").glob("offline-run-*/*.synced"))) == 1


def test_epochs_that_the_live_view_lost_are_published_whatever_the_gap(
    profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb sync` sends every offline run of an id; a kill took epoch 2 of 3 from them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    world.edit(profile, ('wandb: "off"', "wandb: offline"))
    params, layout = config.load(profile / "params.yaml")
    rows, fingerprint = read_metrics(layout.metrics("isd")), record_of(layout, "pretrain")["fingerprint"]
    live = profile / "live.jsonl"
    for at in (0, 2):
        with open_stage("pretrain", "isd", params, layout, identity=fingerprint, config={}, rows=live) as tracker:
            tracker.log(rows[at])
    assert epochs(profile, "tiny-isd-pretrain") == [1, 3]
    assert send_stage(profile, "pretrain") == "sent"
    shutil.rmtree(profile / "wandb" / "published")
    with monkeypatch.context() as patch:
        patch.setattr(history, "READER", READER)  # as a user's
        assert send_stage(profile, "pretrain") == "known"
    assert epochs(profile, "tiny-isd-pretrain") == [1, 2, 3]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda patch: patch.setenv("WANDB_MODE", "onlnie"), "disables W&B"),
        (lambda patch: patch.setattr("importlib.util.find_spec", lambda name: None), "wandb is not installed"),
        (lambda patch: None, "no W&B API key is configured"),
    ],
)
def test_a_publish_that_cannot_work_says_so(
    profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch, arrange: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    arrange(monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        send(profile)
    assert caught.value.hint


def test_unknown_runs_and_empty_profiles(profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="no run 'ids'"):
        send(profile, "ids")
    shutil.rmtree(profile / "reports")
    with pytest.raises(DataError, match="nothing to publish"):
        send(profile)
