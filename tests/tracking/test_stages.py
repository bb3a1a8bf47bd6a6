"""Every stage logs: rows and pictures on the disk, and the same in W&B's own file."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data import contact_sheet
from isd_repro.data.prepare import prepare
from isd_repro.evaluations import summary
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.records import EvaluationRecord, read_record, unpack_labels
from isd_repro.tracking import read_metrics
from isd_repro.train.pretrain import pretrain
from tests.tracking.reading import head, history, offline_runs

knn = partial(run_evaluation, "knn")
linear = partial(run_evaluation, "linear")

QUIET = Console(quiet=True)


def test_rows_and_pictures_stay_on_the_disk(finished: Path) -> None:
    layout = config.load(finished / "params.yaml")[1]
    curve = read_metrics(layout.metrics("isd"))
    keys = {"epoch", "lr", "loss", "spread", "gap", "purity", "images_per_second", "memory_mib"}
    assert [set(row) for row in curve] == [keys] * 3
    assert all(0 <= row["purity"] <= 1 and 0 < row["spread"] < 2 and 0 < row["gap"] < 2 for row in curve)
    linear_rows = read_metrics(layout.log("isd", "linear") / "metrics.jsonl")
    assert [row["epoch"] for row in linear_rows] == [1, 2, 3]
    assert "teacher/top1" in linear_rows[0]
    record = read_record(layout.record("isd", "linear"), EvaluationRecord)
    scores = {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in record.scores}
    assert scores.items() <= linear_rows[-1].items()
    assert linear_rows[-1]["student/top1"] == scores["student/linear-last/all"]
    pictures = sorted(path.relative_to(finished).as_posix() for path in finished.rglob("*.png"))
    assert pictures == [
        "runs/.log/knn/isd/media/nearest-student.png",
        "runs/.log/knn/isd/media/nearest-teacher.png",
        "runs/.log/pretrain/isd/media/views.png",
    ]
    assert not (finished / "wandb").exists()


def test_the_picture_of_neighbours_shows_what_was_found(finished: Path) -> None:
    """Its cells are the stored images, and a green frame stands exactly around those of the query's class."""
    from isd_repro.data.manifests import open_prepared

    layout = config.load(finished / "params.yaml")[1]
    prepared = open_prepared(layout.prepared("digits"))
    with Image.open(layout.log("isd", "knn") / "media" / "nearest-student.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    record = read_record(layout.record("isd", "knn"), EvaluationRecord)
    one = unpack_labels(record.predictions["student/1-NN"])
    label = unpack_labels(record.labels)
    size = 28 * (64 // 28) + 2 * (contact_sheet.GAP + 1)
    assert pixels.shape == (8 * size, 4 * size, 3)  # a query and three neighbours
    for row in range(8):
        query = row * len(label) // 8
        right = bool(one[query] == label[query])
        frame = pixels[row * size + size // 2, size + 2].tolist()
        assert frame == list(contact_sheet.RIGHT if right else contact_sheet.WRONG)
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


@pytest.mark.usefixtures("wandb_on")
def test_every_stage_is_a_wandb_run_with_names_of_its_own(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    text = (profile / "params.yaml").read_text("utf-8").replace('wandb: "off"', "wandb: auto")
    (profile / "params.yaml").write_text(text, encoding="utf-8")
    params, layout = config.load(profile / "params.yaml")
    shutil.rmtree(layout.prepared("digits"))
    prepare("digits", params, layout, QUIET)
    for stage in (pretrain, extract, knn, linear):
        stage("isd", params, layout, QUIET)
    found = offline_runs(profile)
    assert set(found) == {"tiny-digits-prepare", *(f"tiny-isd-{stage}" for stage in ("pretrain", "extract", "knn", "linear"))}
    record = json.loads(layout.record("isd", "pretrain").read_text("utf-8"))
    live = head(found["tiny-isd-pretrain"])
    assert live["run_id"] == f"tiny-isd-pretrain-{record['fingerprint'][:8]}"
    assert (live["run_group"], live["job_type"]) == ("tiny-isd", "pretrain")
    assert live["tags"] == ["profile:tiny", "stage:pretrain", "method:isd", "subset:digits"]
    for title in sorted(set(found) - {"tiny-digits-prepare"}):
        config_of = head(found[title])["config"]["update"]
        assert config_of["method"]["tau_student"] == 0.1
        assert config_of["provenance"]["machine"]["cores"] >= 1
        assert (config_of["fingerprint"], config_of["subset"]) == (record["fingerprint"], "digits")
    rows = history(found["tiny-isd-pretrain"])
    assert rows[0]["images/views._type"] == "image-file"
    assert [{key: row[key] for key in ("epoch", "loss", "purity")} for row in rows[1:]] == [
        {key: row[key] for key in ("epoch", "loss", "purity")} for row in read_metrics(layout.metrics("isd"))
    ]
    shown = {key.removesuffix("._type") for row in history(found["tiny-isd-knn"]) for key in row}
    assert {"student/1-NN/all", "images/nearest-student", "images/nearest-teacher", "tables/per-class"} <= shown
    assert len(history(found["tiny-digits-prepare"])) == len(history(found["tiny-isd-extract"])) == 1
