"""Publishing from the disk: complete, once, resumable, from another machine, with lineage; against our own server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.params import Tracking
from isd_repro.records import pack_labels, unpack_labels
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, DataError, UserError
from isd_repro.runtime.files import sha256_file
from isd_repro.stages.publish import Wish, publish
from isd_repro.tracking import open_stage, read_metrics, session
from isd_repro.tracking.publish import Publisher
from isd_repro.tracking.replay import Replay
from tests.faults import world
from tests.tracking.reading import history, offline_runs, read_run
from tests.tracking.server import SentRun, Server

STAGES = ("pretrain", "extract", "knn", "linear")
ALL = {"tiny-digits-prepare", *(f"tiny-isd-{stage}" for stage in STAGES), "tiny-tiny-report"}


def send(folder: Path, *runs: str, anonymous: bool = False, upload: bool = False) -> str:
    params, layout = config.load(folder / "params.yaml")
    with (folder / "said.txt").open("w+", encoding="utf-8") as file:
        publish(runs, params, layout, Wish(anonymous, upload), Console(file=file, width=200))
        file.seek(0)
        return file.read()


def by_title(server: Server) -> dict[str, SentRun]:
    return {run.fields["displayName"]: run for run in server.runs.values()}


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def curve_of(run: SentRun) -> list[dict[str, Any]]:
    return [row for row in plain(run.history) if "epoch" in row and "loss" in row]


def test_everything_arrives_and_a_second_time_nothing_is_sent(profile: Path, online: Server) -> None:
    said = send(profile)
    assert "6 sent, 0 already there (isd-repro)" in said
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
    fields = found["tiny-isd-knn"].fields
    assert (fields["groupName"], fields["jobType"]) == ("tiny-isd", "knn")
    assert found["tiny-isd-pretrain"].config["method"]["value"]["tau_student"] == 0.1
    before = online.writes()
    assert before > 6
    assert "0 sent, 6 already there" in send(profile)
    assert online.writes() == before


def test_another_machine_finds_what_is_there(profile: Path, online: Server, tmp_path: Path) -> None:
    """It has the records and the outputs, and neither marks nor rows of the first."""
    send(profile)
    rows = {title: len(run.history) for title, run in by_title(online).items()}
    versions = [one.label for one in online.artifacts]
    other = tmp_path / "other"
    shutil.copytree(profile, other, ignore=shutil.ignore_patterns("wandb"))
    assert "0 sent, 6 already there" in send(other)
    assert {title: len(run.history) for title, run in by_title(online).items()} == rows
    assert [one.label for one in online.artifacts] == versions


def test_records_alone_are_enough(profile: Path, online: Server) -> None:
    """A clone without any output of DVC's: the curve comes from the record."""
    shutil.rmtree(profile / "runs")
    shutil.rmtree(profile / "data")
    send(profile)
    record = json.loads(world.layout_of(profile).record("isd", "pretrain").read_text("utf-8"))
    assert curve_of(by_title(online)["tiny-isd-pretrain"]) == record["curve"]
    assert set(by_title(online)) == ALL


def test_rows_of_another_run_are_not_taken_for_the_records(profile: Path, online: Server) -> None:
    layout = world.layout_of(profile)
    text = layout.metrics("isd").read_text("utf-8")
    layout.metrics("isd").write_text(text.replace('"loss": ', '"loss": 1'), encoding="utf-8")
    send(profile)
    record = json.loads(layout.record("isd", "pretrain").read_text("utf-8"))
    assert [row["loss"] for row in curve_of(by_title(online)["tiny-isd-pretrain"])] == [row["loss"] for row in record["curve"]]


def test_lineage_runs_from_the_manifest_to_the_report(profile: Path, online: Server) -> None:
    send(profile)
    found = by_title(online)
    edges = {title: (sorted(run.used), sorted(run.logged)) for title, run in found.items()}
    assert edges["tiny-digits-prepare"] == ([], ["tiny-digits:v0"])
    assert edges["tiny-isd-pretrain"] == (["tiny-digits:v0"], ["tiny-isd-encoder:v0"])
    assert edges["tiny-isd-extract"] == (["tiny-digits:v0", "tiny-isd-encoder:v0"], ["tiny-isd-features:v0"])
    table = next(label for label in edges["tiny-isd-knn"][1] if label.startswith("run-"))  # W&B makes one of each table
    assert edges["tiny-isd-knn"] == (["tiny-isd-features:v0"], sorted(["tiny-isd-knn:v0", table]))
    assert edges["tiny-isd-linear"][0] == ["tiny-isd-encoder:v0", "tiny-isd-features:v0"]
    assert edges["tiny-tiny-report"] == (["tiny-isd-knn:v0", "tiny-isd-linear:v0"], ["tiny-report:v0"])
    types = {one.name: one.type for one in online.artifacts if not one.name.startswith("run-")}
    assert set(types.values()) == {"manifest", "encoder", "features", "result", "report"}
    encoder = next(one for one in online.artifacts if one.name == "tiny-isd-encoder")
    assert encoder.metadata["sha256"] == sha256_file(world.layout_of(profile).encoder("isd"))


def test_large_files_stay_here_unless_they_are_asked_for(profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    layout = world.layout_of(profile)
    encoder = layout.encoder("isd").read_bytes()
    send(profile)
    staged = [path for path in (profile / "wandb" / "artifacts").rglob("*") if path.is_file()]
    assert encoder not in [path.read_bytes() for path in staged]
    shutil.rmtree(profile / "wandb")
    send(profile, upload=True)
    staged = [path for path in (profile / "wandb" / "artifacts").rglob("*") if path.is_file()]
    assert encoder in [path.read_bytes() for path in staged]


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
    assert "1 sent, 6 already there" in send(profile)
    assert [row["epoch"] for row in curve_of(run)] == [1, 2, 3]
    with files.exclusive(state / "lock", "busy"):  # a process is training it
        assert "(failed run)" not in send(profile)


def test_what_a_killed_process_leaves_is_found(profile: Path, online: Server) -> None:
    """The real stage, killed after two epochs; its state says whose it is."""
    world.edit(profile, ("epochs: 3\n      batch", "epochs: 400\n      batch"))
    with world.process(profile) as running:
        world.wait_for_epochs(running, 2)
    world.edit(profile, ("epochs: 400\n", "epochs: 3\n"))
    said = send(profile)
    assert "(failed run)" in said
    (run,) = [run for run in online.runs.values() if run.exit_code == 1]
    layout = world.layout_of(profile)
    (state,) = [path for path in layout.state("x").parent.iterdir() if (path / "run.json").exists()]
    assert curve_of(run) == read_metrics(state / "metrics.jsonl")
    assert run.config["optim"]["value"]["epochs"] == 400


def test_a_live_run_is_completed_and_not_doubled(profile: Path, online: Server) -> None:
    """The live view saw two epochs of three, for instance because the network went away."""
    params, layout = config.load(profile / "params.yaml")
    live = params.model_copy(update={"tracking": Tracking(wandb="online")})
    record = json.loads(layout.record("isd", "pretrain").read_text("utf-8"))
    rows = read_metrics(layout.metrics("isd"))
    options: dict[str, Any] = {"identity": record["fingerprint"], "config": {}, "rows": profile / "live.jsonl"}
    with open_stage("pretrain", "isd", live, layout, **options) as tracker:
        for row in rows[:2]:
            tracker.log(row)
    (run,) = online.runs.values()
    assert len(curve_of(run)) == 2
    send(profile)
    assert curve_of(run) == rows


def test_a_server_that_dies_half_way_is_told_and_the_next_attempt_goes_on(
    profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "INIT_TIMEOUT", 4.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 4.0)
    online.die_after = 3
    with pytest.raises(UserError, match="W&B did not take it") as caught:
        send(profile)
    assert "goes on where it stopped" in caught.value.hint
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


def test_a_refusal_is_told(profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "INIT_TIMEOUT", 5.0)
    online.refuse = True
    with pytest.raises(UserError, match="tiny-digits-prepare: W&B did not take it"):
        send(profile)
    assert not list((profile / "wandb").rglob("tiny-digits-prepare-*/published"))


def test_a_torn_mark_is_asked_about_and_mended(profile: Path, online: Server) -> None:
    """A process that was killed, or a disk that was full, while the mark was written."""
    send(profile)
    (mark,) = (profile / "wandb" / "published").rglob("tiny-isd-knn-*")
    before = mark.read_text("utf-8")
    rows = {title: len(run.history) for title, run in by_title(online).items()}
    for torn in ("", before[: len(before) // 2], "[]"):
        mark.write_text(torn, encoding="utf-8")
        assert "0 sent, 6 already there" in send(profile)
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


def test_two_publishes_at_once_do_not_both_send(profile: Path, online: Server) -> None:
    send(profile)
    (mark,) = (profile / "wandb" / "published").rglob("tiny-isd-knn-*")
    with files.exclusive(mark.with_name(f"{mark.name}.lock"), "busy"), pytest.raises(UserError, match="already being published"):
        send(profile)


def test_another_entity_has_marks_of_its_own(profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Publisher(Tracking(), profile)._marks
    monkeypatch.setenv("WANDB_ENTITY", "another-team")
    assert Publisher(Tracking(), profile)._marks != first


# --- without a server ---------------------------------------------------------------------------------------------------


def test_offline_holds_the_same_once(profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "6 sent, 0 already there (offline, `wandb sync` sends them)" in send(profile)
    found = offline_runs(profile)
    assert set(found) == ALL
    rows = [row for row in history(found["tiny-isd-pretrain"]) if "loss" in row]
    assert rows == read_metrics(world.layout_of(profile).metrics("isd"))
    head = next(one["run"] for one in found["tiny-isd-linear"] if one["type"] == "run")
    assert head["config"]["update"]["artifacts"] == {
        "in": {"tiny-isd-encoder": "encoder", "tiny-isd-features": "features"},
        "out": {"tiny-isd-linear": "result"},
    }
    folders = sorted((profile / "wandb").glob("offline-run-*"))
    assert "0 sent, 6 already there" in send(profile)
    assert sorted((profile / "wandb").glob("offline-run-*")) == folders


def test_a_live_offline_run_is_not_sent_twice(profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb sync` sends every offline run of an id: live rows and published ones together are each epoch once."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    world.edit(profile, ('wandb: "off"', "wandb: offline"))
    params, layout = config.load(profile / "params.yaml")
    record = json.loads(layout.record("isd", "pretrain").read_text("utf-8"))
    rows = read_metrics(layout.metrics("isd"))
    options: dict[str, Any] = {"identity": record["fingerprint"], "config": {}, "rows": profile / "live.jsonl"}
    with open_stage("pretrain", "isd", params, layout, **options) as tracker:
        for row in rows[:2]:
            tracker.log(row)
    send(profile, "isd")
    fragments = [read_run(path) for path in sorted((profile / "wandb").glob("offline-run-*-tiny-isd-pretrain-*"))]
    assert [[row["epoch"] for row in history(each) if "loss" in row] for each in fragments] == [[1, 2], [3]]


def test_an_offline_continuation_holds_the_new_epochs_alone(
    profile: Path, wandb_on: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    publisher = Publisher(Tracking(), profile)
    rows = [{"epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)]
    common: dict[str, Any] = {"id": "a-1", "title": "a", "group": "g", "job_type": "pretrain", "tags": [], "config": {}}
    assert publisher.send(Replay(**common, rows=rows[:2])) == "sent"
    before = set((profile / "wandb").glob("offline-run-*"))
    assert publisher.send(Replay(**common, rows=rows)) == "sent"
    (new,) = set((profile / "wandb").glob("offline-run-*")) - before or {next(iter(before))}
    shutil.rmtree(profile / "kept", ignore_errors=True)
    shutil.copytree(new, profile / "kept" / "wandb" / new.name)
    assert history(offline_runs(profile / "kept")["a"]) == rows[2:]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda patch: patch.setenv("WANDB_MODE", "disabled"), "switches W&B off"),
        (lambda patch: patch.setenv("WANDB_MODE", "onlnie"), "switches W&B off"),
        (lambda patch: patch.setattr("importlib.util.find_spec", lambda name: None), "wandb is not installed"),
        (lambda patch: None, "no W&B key is configured"),
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
