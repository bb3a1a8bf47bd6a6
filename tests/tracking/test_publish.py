"""Publishing from the disk: complete, once, resumable, from another machine, with lineage; against our own server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.records import pack_labels, unpack_labels
from isd_repro.report.publish import Options, publish, replays
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, DataError, UserError
from isd_repro.runtime.files import sha256_file
from isd_repro.tracking import open_stage, read_metrics, session
from isd_repro.tracking.publisher import Publisher
from tests.faults import world
from tests.tracking.reading import epochs, head, history, offline_runs
from tests.tracking.server import SentRun, Server

STAGES = ("pretrain", "extract", "knn", "linear")
ALL = {"tiny-digits-prepare", *(f"tiny-isd-{stage}" for stage in (*STAGES, "summary")), "tiny-tiny-report"}


def send(folder: Path, *runs: str, anonymous: bool = False, upload: bool = False) -> str:
    params, layout = config.load(folder / "params.yaml")
    with (folder / "said.txt").open("w+", encoding="utf-8") as file:
        publish(runs, params, layout, Options(anonymous, upload), Console(file=file, width=200))
        file.seek(0)
        return file.read()


def record_of(layout: Layout, part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(layout.record("isd", part).read_text("utf-8"))
    return found


def by_title(server: Server) -> dict[str, SentRun]:
    return {run.fields["displayName"]: run for run in server.runs.values()}


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def curve_of(run: SentRun) -> list[dict[str, Any]]:
    return [row for row in plain(run.history) if "epoch" in row and "loss" in row]


def test_everything_arrives_and_a_second_time_nothing_is_sent(profile: Path, online: Server) -> None:
    said = send(profile)
    assert "7 sent, 0 already there (isd-repro)" in said
    found = by_title(online)
    assert set(found) == ALL
    layout = world.layout_of(profile)
    assert curve_of(found["tiny-isd-pretrain"]) == read_metrics(layout.metrics("isd"))
    assert [row["epoch"] for row in plain(found["tiny-isd-linear"].history) if "lr" in row] == [1, 2, 3]
    record = json.loads(layout.record("isd", "knn").read_text("utf-8"))
    for score in record["scores"]:
        key = f"{score['encoder']}/{score['metric']}/{score['group']}"
        assert found["tiny-isd-knn"].summary[key] == 100 * score["correct"] / score["n"]
    assert found["tiny-isd-pretrain"].summary["images/views"]["_type"] == "image-file"
    assert found["tiny-isd-knn"].summary["tables/per-class"]["_type"] == "table-file"
    assert {run.exit_code for run in found.values()} == {0}
    total = found["tiny-isd-summary"]
    assert total.summary["student/1-NN/all"] == found["tiny-isd-knn"].summary["student/1-NN/all"]
    assert total.summary["teacher/linear-last/all"] == found["tiny-isd-linear"].summary["teacher/linear-last/all"]
    assert total.config["linear"]["value"]["epochs"] == 3
    losses = [row["loss"] for row in record_of(layout, "pretrain")["curve"]]
    assert found["tiny-isd-pretrain"].summary["loss"] == {"min": min(losses), "last": losses[-1]}
    for stage in (*STAGES, "summary"):  # every stage can be grouped and filtered by what the run is
        own = {key: value["value"] for key, value in found[f"tiny-isd-{stage}"].config.items() if key != "_wandb"}
        assert (own["method"]["name"], own["method"]["tau_student"], own["optim"]["lr"]) == ("isd", 0.1, 0.05)
        assert (own["label"], own["subset"], own["numerics"]["seed"]) == ("ISD", "digits", 0)
        assert own["fingerprint"] == record_of(layout, "pretrain")["fingerprint"]
        assert own["data"]["image_size"] == own["backbone"]["width"] * 5 == 20
    fields = found["tiny-isd-knn"].fields
    assert (fields["groupName"], fields["jobType"]) == ("tiny-isd", "knn")
    before = online.writes()
    assert before > 6
    assert "0 sent, 7 already there" in send(profile)
    assert online.writes() == before


def test_another_machine_finds_what_is_there(profile: Path, online: Server, tmp_path: Path) -> None:
    """It has the records and the outputs, and neither marks nor rows of the first."""
    send(profile)
    rows = {title: len(run.history) for title, run in by_title(online).items()}
    versions = [one.label for one in online.artifacts]
    other = tmp_path / "other"
    shutil.copytree(profile, other, ignore=shutil.ignore_patterns("wandb"))
    assert "0 sent, 7 already there" in send(other)
    assert {title: len(run.history) for title, run in by_title(online).items()} == rows
    assert [one.label for one in online.artifacts] == versions


def test_records_alone_are_enough(profile: Path, online: Server) -> None:
    """A clone without outputs of DVC's, but with rows of another run: the curve comes from the record."""
    layout = world.layout_of(profile)
    rows = layout.metrics("isd").read_text("utf-8").replace('"loss": ', '"loss": 1')
    shutil.rmtree(profile / "runs")
    shutil.rmtree(profile / "data")
    layout.metrics("isd").parent.mkdir(parents=True)
    layout.metrics("isd").write_text(rows, encoding="utf-8")
    send(profile)
    assert curve_of(by_title(online)["tiny-isd-pretrain"]) == record_of(layout, "pretrain")["curve"]
    assert set(by_title(online)) == ALL


def test_lineage_runs_from_the_manifest_to_the_report(profile: Path, online: Server) -> None:
    send(profile)
    found = by_title(online)
    edges = {title: (sorted(run.used), sorted(run.logged)) for title, run in found.items()}
    assert edges["tiny-digits-prepare"] == ([], ["tiny-digits:v0"])
    assert edges["tiny-isd-pretrain"] == (["tiny-digits:v0"], ["tiny-isd-encoder:v0"])
    assert edges["tiny-isd-extract"] == (["tiny-digits:v0", "tiny-isd-encoder:v0"], ["tiny-isd-features:v0"])
    table = next(label for label in edges["tiny-isd-knn"][1] if label.startswith("run-"))  # W&B makes one of each table
    assert edges["tiny-isd-knn"] == (["tiny-isd-encoder:v0", "tiny-isd-features:v0"], sorted(["tiny-isd-knn:v0", table]))
    assert edges["tiny-isd-linear"][0] == ["tiny-isd-encoder:v0", "tiny-isd-features:v0"]
    assert edges["tiny-tiny-report"] == (["tiny-isd-knn:v0", "tiny-isd-linear:v0"], ["tiny-report:v0"])
    types = {one.name: one.type for one in online.artifacts if not one.name.startswith("run-")}
    assert set(types.values()) == {"manifest", "encoder", "features", "result", "report"}
    encoder = next(one for one in online.artifacts if one.name == "tiny-isd-encoder")
    assert encoder.metadata["sha256"] == sha256_file(world.layout_of(profile).encoder("isd"))


# --- failures -----------------------------------------------------------------------------------------------------------


def crash(profile: Path, epochs: int, fingerprint: str = "0123456789abcdef") -> Path:
    """The state that a killed pretraining leaves, of a configuration of its own, with a torn last line."""
    layout = world.layout_of(profile)
    state = layout.state(fingerprint)
    state.mkdir(parents=True, exist_ok=True)
    rows = layout.metrics("isd").read_text("utf-8").splitlines(keepends=True)[:epochs]
    (state / "metrics.jsonl").write_text("".join(rows) + '{"epoch": 9', encoding="utf-8")
    (state / "run.json").write_text(json.dumps({"profile": "tiny", "run": "isd", "config": {"seed": 7}}), encoding="utf-8")
    return state


def test_a_crashed_run_is_published_as_failed_and_goes_on_later(profile: Path, online: Server) -> None:
    state = crash(profile, 1)
    assert "tiny-isd-pretrain: sent (failed run)" in send(profile)
    run = online.runs["tiny-isd-pretrain-01234567"]
    assert [row["epoch"] for row in curve_of(run)] == [1]
    assert run.exit_code == 1
    assert "failed" in run.fields["tags"]
    assert run.config["seed"]["value"] == 7
    assert len(curve_of(online.runs[next(key for key in online.runs if "pretrain" in key and "01234567" not in key)])) == 3
    crash(profile, 3)
    assert "1 sent, 7 already there" in send(profile)
    assert [row["epoch"] for row in curve_of(run)] == [1, 2, 3]
    with files.exclusive(state / "lock", "busy"):  # a process is training it
        assert "(failed run)" not in send(profile)


def test_a_server_that_dies_half_way_is_told_and_the_next_attempt_goes_on(
    profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "INIT_TIMEOUT", 2.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 2.0)
    online.die_after = 3
    with pytest.raises(UserError, match="W&B did not accept it") as caught:
        send(profile)
    assert "continues where it stopped" in caught.value.hint
    marks = [path.name for path in (profile / "wandb" / "published").rglob("tiny-*")]
    assert len(marks) < 6
    with_server = Server()
    with_server.runs, with_server.artifacts = online.runs, online.artifacts
    monkeypatch.setattr(session, "INIT_TIMEOUT", 60.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 60.0)
    session.release()
    monkeypatch.setenv("WANDB_BASE_URL", with_server.url)
    try:
        send(profile)
    finally:
        with_server.close()
    found = by_title(with_server)
    assert set(found) == ALL
    assert curve_of(found["tiny-isd-pretrain"]) == read_metrics(world.layout_of(profile).metrics("isd"))
    assert {run.exit_code for run in found.values()} == {0}


def test_a_torn_mark_is_asked_about_and_mended(profile: Path, online: Server) -> None:
    """A process that was killed, or a disk that was full, while the mark was written."""
    send(profile)
    (mark,) = (profile / "wandb" / "published").rglob("tiny-isd-knn-*")
    before = mark.read_text("utf-8")
    rows = {title: len(run.history) for title, run in by_title(online).items()}
    mark.write_text(before[: len(before) // 2], encoding="utf-8")
    assert "0 sent, 7 already there" in send(profile)
    assert mark.read_text("utf-8") == before
    assert {title: len(run.history) for title, run in by_title(online).items()} == rows


def test_scores_that_changed_take_the_place_of_the_old_ones(profile: Path, online: Server) -> None:
    """The same encoder and settings, scored again by other code: W&B must not go on showing the old number."""
    layout = world.layout_of(profile)
    send(profile)
    run = by_title(online)["tiny-isd-knn"]
    path = layout.record("isd", "knn")
    record = json.loads(path.read_text("utf-8"))
    other = record["predictions"]["teacher/1-NN"]
    changed = pack_labels(unpack_labels(other).roll(1))
    label, found = unpack_labels(record["labels"]), unpack_labels(changed)
    record["predictions"]["teacher/1-NN"] = changed
    for score in record["scores"]:
        if (score["encoder"], score["metric"]) == ("teacher", "1-NN"):
            score["correct"] = int((label == found).sum())
    path.write_text(json.dumps(record), encoding="utf-8")
    before, tables = run.summary["teacher/1-NN/all"], run.summary["tables/per-class"]["sha256"]
    send(profile)
    wanted = 100 * int((label == found).sum()) / len(label)
    assert run.summary["teacher/1-NN/all"] == wanted != before
    assert plain(run.history)[-1].get("teacher/1-NN/all", wanted) == wanted
    assert run.summary["tables/per-class"]["sha256"] != tables


# --- without a server ---------------------------------------------------------------------------------------------------


def test_offline_holds_the_same_once(profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "7 sent, 0 already there (offline; `wandb sync` uploads them)" in send(profile)
    found = offline_runs(profile)
    assert set(found) == ALL
    rows = [row for row in history(found["tiny-isd-pretrain"]) if "loss" in row]
    assert rows == read_metrics(world.layout_of(profile).metrics("isd"))
    assert head(found["tiny-isd-linear"])["config"]["update"]["artifacts"] == {
        "in": {"tiny-isd-encoder": "encoder", "tiny-isd-features": "features"},
        "out": {"tiny-isd-linear": "result"},
    }
    folders = sorted((profile / "wandb").glob("offline-run-*"))
    assert "0 sent, 7 already there" in send(profile)
    assert sorted((profile / "wandb").glob("offline-run-*")) == folders
    encoder = world.layout_of(profile).encoder("isd").read_bytes()
    for upload in (False, True):  # large files stay here unless they are asked for
        send(profile, upload=upload)
        staged = [path.read_bytes() for path in (profile / "wandb" / "artifacts").rglob("*") if path.is_file()]
        assert (encoder in staged) == upload


def test_wandb_sync_after_a_publish_online_sends_nothing_again(
    profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own command, to a server that has the epochs; it finds nothing to send, and without the marks it would send all."""
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        send(profile)
    assert not list((profile / "wandb").glob("offline-run-*/*.synced"))
    send(profile)
    before = curve_of(by_title(online)["tiny-isd-pretrain"])
    assert len(before) == 3
    command = [sys.executable, "-m", "wandb", "sync", "--yes"]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = subprocess.run(command, cwd=profile, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert curve_of(by_title(online)["tiny-isd-pretrain"]) == before
    assert len(list((profile / "wandb").glob("offline-run-*/*.synced"))) == len(ALL)


def test_epochs_that_the_live_view_lost_are_published_whatever_the_gap(
    profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wandb sync` sends every offline run of an id; a kill took epoch 2 of 3 from them."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    world.edit(profile, ('wandb: "off"', "wandb: offline"))
    params, layout = config.load(profile / "params.yaml")
    record = json.loads(layout.record("isd", "pretrain").read_text("utf-8"))
    rows = read_metrics(layout.metrics("isd"))
    for at in (0, 2):
        options: dict[str, Any] = {"identity": record["fingerprint"], "config": {}, "rows": profile / f"live-{at}.jsonl"}
        with open_stage("pretrain", "isd", params, layout, **options) as tracker:
            tracker.log(rows[at])
    assert epochs(profile, "tiny-isd-pretrain") == [1, 3]
    (stage,) = [each for each in replays(["isd"], params, layout, Options()) if each.run.job_type == "pretrain"]
    assert Publisher(params.tracking, profile).send(stage) == "sent"
    assert epochs(profile, "tiny-isd-pretrain") == [1, 2, 3]
    shutil.rmtree(profile / "wandb" / "published")
    assert Publisher(params.tracking, profile).send(stage) == "known"
    assert epochs(profile, "tiny-isd-pretrain") == [1, 2, 3]


def test_a_run_that_was_killed_and_resumed_has_every_epoch_once(
    profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real stage, killed, published as failed, resumed and published."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    world.edit(profile, ('wandb: "off"', "wandb: offline"), ("epochs: 3\n      batch", "epochs: 6\n      batch"))
    shutil.rmtree(world.layout_of(profile).records)
    with world.process(profile) as running:
        world.wait_for_epochs(running, 3)
    assert "tiny-isd-pretrain: sent (failed run)" in send(profile)
    (state,) = [path for path in world.states(profile) if (path / "run.json").exists()]
    assert epochs(profile, "tiny-isd-pretrain") == [row["epoch"] for row in read_metrics(state / "metrics.jsonl")]
    world.train(profile)
    send(profile)
    assert epochs(profile, "tiny-isd-pretrain") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda patch: patch.setenv("WANDB_MODE", "disabled"), "disables W&B"),
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
