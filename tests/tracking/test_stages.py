"""Every stage logs: rows and pictures on the disk, and the same in W&B, live and published, with panels that draw them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.data import contact_sheet
from isd_repro.data.manifests import open_prepared
from isd_repro.data.prepare import prepare
from isd_repro.evaluations import summary
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.records import CurveRecord, EvaluationRecord, TargetsRecord, read_record, unpack_labels
from isd_repro.report.dashboard import dashboard
from isd_repro.report.image_figures import Asked, figures
from isd_repro.report.publish import Options, publish
from isd_repro.tracking import read_metrics
from isd_repro.train.pretrain import pretrain
from tests.evaluations.test_protocol_stages import write_target
from tests.faults import world
from tests.tracking.server import SentRun, Server

QUIET = Console(quiet=True)


def test_rows_and_pictures_stay_on_the_disk(finished: Path) -> None:
    layout = config.load(finished / "params.yaml")[1]
    curve = read_metrics(layout.metrics("isd"))
    keys = {"epoch", "lr", "loss", "spread", "gap", "purity", "images_per_second", "memory_mib"}
    assert [set(row) for row in curve] == [keys] * 3
    assert all(0 <= row["purity"] <= 1 and 0 < row["spread"] < 2 and 0 < row["gap"] < 2 for row in curve)
    linear_rows = read_metrics(layout.log("isd", "linear") / "metrics.jsonl")
    assert [row["epoch"] for row in linear_rows] == [1, 2]
    assert "teacher/top1" in linear_rows[0]
    record = read_record(layout.record("isd", "linear"), EvaluationRecord)
    scores = {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in record.scores}
    assert scores.items() <= linear_rows[-1].items()
    assert linear_rows[-1]["student/top1"] == scores["student/linear-last/all"]
    pictures = sorted(path.relative_to(finished / "runs" / ".log").as_posix() for path in finished.rglob("*.png"))
    neighbours = ["knn/isd/media/nearest-student.png", "knn/isd/media/nearest-teacher.png"]
    assert pictures == [*neighbours, "pretrain/isd/media/views.png"]
    assert not (finished / "wandb").exists()


def test_the_picture_of_neighbours_shows_what_was_found(finished: Path) -> None:
    """Its cells are the stored images, and a green frame stands exactly around those of the query's class."""
    layout = config.load(finished / "params.yaml")[1]
    prepared = open_prepared(layout.prepared("digits"))
    with Image.open(layout.log("isd", "knn") / "media" / "nearest-student.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    record = read_record(layout.record("isd", "knn"), EvaluationRecord)
    found, label = unpack_labels(record.predictions["student/1-NN"]), unpack_labels(record.labels)
    size = 28 * (64 // 28) + 2 * (contact_sheet.GAP + 1)
    assert pixels.shape == (8 * size, 4 * size, 3)  # a query and three neighbours
    for row in range(8):
        query = row * len(label) // 8
        frame = contact_sheet.RIGHT if found[query] == label[query] else contact_sheet.WRONG
        assert pixels[row * size + size // 2, size + 2].tolist() == list(frame)
        assert pixels[row * size + size // 2, 2].tolist() == list(contact_sheet.PLAIN)
        stored = prepared.store.read(prepared.split("query").index[[query]])[0][0, 0]
        start = row * size + contact_sheet.GAP + 1
        cell = pixels[start : start + 56 : 2, contact_sheet.GAP + 1 : contact_sheet.GAP + 57 : 2, 0]
        assert torch.equal(cell, stored)


def test_per_class_rows_are_counted(finished: Path) -> None:
    layout = config.load(finished / "params.yaml")[1]
    record = read_record(layout.record("isd", "knn"), EvaluationRecord)
    columns, rows = summary.class_rows(record)
    assert columns == ["class", "n", "student/1-NN", "student/3-NN", "teacher/1-NN", "teacher/3-NN"]
    label, found = unpack_labels(record.labels).tolist(), unpack_labels(record.predictions["teacher/3-NN"]).tolist()
    for name, n, *shares in rows:
        at = [index for index, each in enumerate(label) if record.manifest.classes[each] == name]
        assert n == len(at)
        assert shares[3] == 100 * sum(found[index] == label[index] for index in at) / len(at)


# --- every stage and protocol, live, then published ---------------------------------------------------------------------------

MORE = """\
evaluation: {few_label: {fractions: [0.5]}, transfer: {sets: [cifar10-folder], c_min: 0.01, c_max: 10.0, c_values: 3}, \
"""
RUNS = "linear_runs: [isd]\nfew_label_runs: [isd]\ntransfer_runs: [isd]\ntrajectory_runs: [isd]\n"
STAGES: dict[str, Callable[[str, Params, Layout, Console], Any]] = {
    "pretrain": pretrain,
    "extract": extract,
    **{name: partial(run_evaluation, name) for name in ("knn", "linear", "few_label", "transfer", "trajectory")},
}


@pytest.fixture
def wide(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The profile with every protocol asked for; nothing after `prepare` has run."""
    world.edit(profile, ("evaluation: {", MORE), ("linear_runs: [isd]\n", RUNS))
    world.edit(profile, ("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}"))
    write_target(tmp_path / "target")
    monkeypatch.setenv("ISD_CIFAR10_ROOT", str(tmp_path / "target"))
    for name in ("runs", "reports"):
        shutil.rmtree(profile / name)
    return profile


def run_all(profile: Path) -> tuple[Params, Layout]:
    params, layout = config.load(profile / "params.yaml")
    prepare("digits", params, layout, QUIET)
    for stage in STAGES.values():
        stage("isd", params, layout, QUIET)
    figures("isd", params, layout, Asked(clusters=2, members=2, queries=2), QUIET)
    return params, layout


def plain(run: SentRun, key: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in run.history if key in row]


def test_every_stage_is_a_run_that_is_the_same_live_and_published(wide: Path, online: Server, tmp_path: Path) -> None:
    world.edit(wide, ('wandb: "off"', "wandb: online"))
    params, layout = run_all(wide)
    live = {run.fields["jobType"]: run for run in online.runs.values()}
    assert set(live) == {"prepare", *STAGES, "figures"}
    assert_live(live, layout)
    assert_protocols(live, layout)
    rows = {name: len(run.history) for name, run in live.items()}
    publish([], params, layout, Options(), QUIET)
    assert {name: len(run.history) for name, run in live.items()} == rows
    found = {run.fields["jobType"]: run for run in online.runs.values()}
    assert set(found) - set(live) == {"report", "summary"}
    made = {name: {label for label in run.logged if label[:4] != "run-"} for name, run in found.items()}
    for name, used in (("few_label", {"tiny-isd-encoder:v0", "tiny-isd-features:v0"}), ("transfer", {"tiny-isd-encoder:v0"})):
        assert (set(found[name].used), made[name]) == (used, {f"tiny-isd-{name}:v0"})
    assert set(found["report"].used) == {f"tiny-isd-{name}:v0" for name in list(STAGES)[2:]}
    before = online.writes()
    publish([], params, layout, Options(), QUIET)
    assert online.writes() == before
    assert_drawn(params, layout, tmp_path)


def assert_live(live: dict[str, SentRun], layout: Layout) -> None:
    """Names, groups and tags of each, and the rows of the curve."""
    fingerprint = json.loads(layout.record("isd", "pretrain").read_text("utf-8"))["fingerprint"]
    run = live["pretrain"]
    assert (run.id, run.fields["groupName"]) == (f"tiny-isd-pretrain-{fingerprint[:8]}", "tiny-isd")
    assert run.fields["tags"] == ["profile:tiny", "stage:pretrain", "method:isd", "subset:digits"]
    for name in STAGES:
        own = {key: value["value"] for key, value in live[name].config.items()}
        assert own["method"]["tau_student"] == 0.1
        assert own["provenance"]["machine"]["cores"] >= 1
        assert (own["fingerprint"], own["subset"]) == (fingerprint, "digits")
    assert plain(run, "loss") == read_metrics(layout.metrics("isd"))
    assert run.summary["images/views"]["_type"] == "image-file"
    shown = {"student/1-NN/all", "images/nearest-student", "images/nearest-teacher", "tables/per-class"}
    assert shown <= set(live["knn"].summary)


def assert_protocols(live: dict[str, SentRun], layout: Layout) -> None:
    """Rows, tables and pictures of those that not every run has."""
    few = read_record(layout.record("isd", "few_label"), EvaluationRecord)
    scores = {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in few.scores}
    assert plain(live["few_label"], next(iter(scores))) == [{"epoch": 3, **scores}]
    assert live["few_label"].summary["tables/per-class"]["_type"] == "table-file"
    (target,) = read_record(layout.record("isd", "transfer"), TargetsRecord).evaluations
    shown = {f"{score.encoder}/cifar10-folder": score.top1 for score in target.scores}
    assert plain(live["transfer"], next(iter(shown))) == [{"epoch": 3, **shown}]
    assert live["transfer"].summary["tables/per-class-cifar10-folder"]["_type"] == "table-file"
    points = read_record(layout.record("isd", "trajectory"), CurveRecord).points
    rows = plain(live["trajectory"], "epoch")
    assert [row["epoch"] for row in rows] == [1, 2, 3] == [point.epoch for point in points]
    assert rows[0]["teacher/1-NN/all"] == next(s.top1 for s in points[0].scores if (s.encoder, s.metric) == ("teacher", "1-NN"))
    for key in ("clusters", "anchors"):
        assert live["figures"].summary[f"images/{key}"]["_type"] == "image-file"
    facts = json.loads((layout.encoder("isd").parent / "figures" / "figures.json").read_text("utf-8"))
    assert live["figures"].summary["clusters/purity"] == facts["clusters"]["purity"]


def assert_drawn(params: Params, layout: Layout, folder: Path) -> None:
    """The dashboard has panels for them."""
    dashboard(params, layout, folder / "spec.json", anonymous=False, console=QUIET)
    text = (folder / "spec.json").read_text("utf-8")
    logged = {"student/few-50pct-last/all", "teacher/cifar10-folder", "images/clusters", "images/anchors"}
    assert all(json.dumps(key) in text for key in logged)
    blocks = json.loads(text)["report"]["blocks"]
    at = next(at for at, block in enumerate(blocks) if block.get("heading") == "Scores: trajectory")
    assert {"kind": "lines", "title": "1-NN, all", "keys": ["student/1-NN/all", "teacher/1-NN/all"]} in blocks[at + 1]["panels"]
    assert "'trajectory'" in blocks[at + 1]["runs"][0]["filter"]
