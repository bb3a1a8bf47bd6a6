"""Few labels, transfer, trajectory and figures in W&B: rows, tables, pictures and lineage, and panels that draw them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.layout import snapshot_name
from isd_repro.evaluations.stage import run_evaluation
from isd_repro.records import CurveRecord, EvaluationRecord, TargetsRecord, read_record
from isd_repro.report.dashboard import dashboard
from isd_repro.report.image_figures import Asked, figures
from isd_repro.report.publish import Options, publish
from isd_repro.tracking import read_metrics
from tests.evaluations.test_protocol_stages import write_target
from tests.faults import world
from tests.tracking.server import SentRun, Server

few_label = partial(run_evaluation, "few_label")
trajectory = partial(run_evaluation, "trajectory")
transfer = partial(run_evaluation, "transfer")

QUIET = Console(quiet=True)
MORE = """\
  few_label: {fractions: [0.5]}
  transfer: {sets: [cifar10-folder], c_min: 0.01, c_max: 10.0, c_values: 3}
linear_runs: [isd]
few_label_runs: [isd]
transfer_runs: [isd]
trajectory_runs: [isd]
"""


@pytest.fixture
def wide(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished profile with every other protocol run on it; a copy of the encoder stands for its snapshot."""
    world.edit(profile, ("linear_runs: [isd]\n", MORE), ("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}"))
    write_target(tmp_path / "target")
    monkeypatch.setenv("ISD_CIFAR10_ROOT", str(tmp_path / "target"))
    params, layout = config.load(profile / "params.yaml")
    for stage in (few_label, transfer):
        stage("isd", params, layout, QUIET)
    kept = layout.snapshots("isd") / snapshot_name(1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(layout.encoder("isd").read_bytes())
    trajectory("isd", params, layout, QUIET)
    figures("isd", params, layout, Asked(clusters=2, members=2, queries=2), QUIET)
    return profile


def plain(run: SentRun, key: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in run.history if key in row]


def test_every_protocol_is_published_with_what_it_is_made_from(wide: Path, online: Server) -> None:
    params, layout = config.load(wide / "params.yaml")
    publish([], params, layout, Options(), QUIET)
    found = {run.fields["displayName"].removeprefix("tiny-isd-"): run for run in online.runs.values()}
    few = read_record(layout.record("isd", "few_label"), EvaluationRecord)
    scores = {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in few.scores}
    assert plain(found["few_label"], next(iter(scores))) == [{"epoch": 3, **scores}]
    assert found["few_label"].summary["tables/per-class"]["_type"] == "table-file"
    (target,) = read_record(layout.record("isd", "transfer"), TargetsRecord).evaluations
    shown = {f"{score.encoder}/cifar10-folder": score.top1 for score in target.scores}
    assert plain(found["transfer"], next(iter(shown))) == [{"epoch": 3, **shown}]
    assert found["transfer"].summary["tables/per-class-cifar10-folder"]["_type"] == "table-file"
    points = read_record(layout.record("isd", "trajectory"), CurveRecord).points
    rows = plain(found["trajectory"], "epoch")
    assert [row["epoch"] for row in rows] == [1, 3] == [point.epoch for point in points]
    assert rows[0]["teacher/1-NN/all"] == next(s.top1 for s in points[0].scores if (s.encoder, s.metric) == ("teacher", "1-NN"))
    for key in ("clusters", "anchors"):
        assert found["figures"].summary[f"images/{key}"]["_type"] == "image-file"
    assert 0 <= found["figures"].summary["clusters/purity"] <= 100
    made = {name: {label for label in run.logged if label[:4] != "run-"} for name, run in found.items()}
    assert (set(found["few_label"].used), made["few_label"]) == (
        {"tiny-isd-encoder:v0", "tiny-isd-features:v0"},
        {"tiny-isd-few_label:v0"},
    )
    assert (set(found["transfer"].used), made["transfer"]) == ({"tiny-isd-encoder:v0"}, {"tiny-isd-transfer:v0"})
    assert made["trajectory"] == {"tiny-isd-trajectory:v0"}
    results = {f"tiny-isd-{name}:v0" for name in ("knn", "linear", "few_label", "transfer", "trajectory")}
    assert set(found["tiny-tiny-report"].used) == results
    before = online.writes()
    publish([], params, layout, Options(), QUIET)
    assert online.writes() == before


def test_ids_are_those_of_the_live_runs(wide: Path, online: Server) -> None:
    """A live run and its publication are one run; live tables are there before."""
    world.edit(wide, ('wandb: "off"', "wandb: online"))
    params, layout = config.load(wide / "params.yaml")
    for stage in (few_label, transfer, trajectory):
        stage("isd", params, layout, QUIET)
    figures("isd", params, layout, Asked(clusters=2, members=2, queries=2), QUIET)
    live = dict(online.runs)
    assert {run.fields["jobType"] for run in live.values()} == {"few_label", "transfer", "trajectory", "figures"}
    tables = {run.fields["jobType"]: {key for key in run.summary if key.startswith("tables/")} for run in live.values()}
    assert tables["few_label"] == {"tables/per-class"}
    assert tables["transfer"] == {"tables/per-class-cifar10-folder"}
    rows = {name: len(run.history) for name, run in live.items()}
    publish([], params, layout, Options(), QUIET)
    assert {name: len(online.runs[name].history) for name in live} == rows
    assert {run.fields["jobType"] for name, run in online.runs.items() if name not in live} == {
        "prepare", "pretrain", "extract", "knn", "linear", "report", "summary",
    }  # fmt: skip


def test_the_dashboard_draws_them(wide: Path, tmp_path: Path) -> None:
    params, layout = config.load(wide / "params.yaml")
    dashboard(params, layout, tmp_path / "spec.json", anonymous=False, console=QUIET)
    text = (tmp_path / "spec.json").read_text("utf-8")
    logged = {"student/few-50pct-last/all", "teacher/cifar10-folder", "images/clusters", "images/anchors"}
    assert all(json.dumps(key) in text for key in logged)
    blocks = json.loads(text)["report"]["blocks"]
    at = next(at for at, block in enumerate(blocks) if block.get("heading") == "Scores: trajectory")
    assert {"kind": "lines", "title": "1-NN, all", "keys": ["student/1-NN/all", "teacher/1-NN/all"]} in blocks[at + 1]["panels"]
    assert "'trajectory'" in blocks[at + 1]["runs"][0]["filter"]


def test_what_figures_keeps_is_what_it_drew(wide: Path) -> None:
    layout = config.load(wide / "params.yaml")[1]
    log = layout.log("isd", "figures")
    facts = json.loads((layout.encoder("isd").parent / "figures" / "figures.json").read_text("utf-8"))
    (row,) = read_metrics(log / "metrics.jsonl")
    assert row["clusters/purity"] == facts["clusters"]["purity"]
    assert sorted(path.name for path in (log / "media").iterdir()) == ["anchors.png", "clusters.png"]
