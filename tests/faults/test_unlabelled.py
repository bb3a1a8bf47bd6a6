"""A subset with images without labels through the pipeline: trained on, and neither searched nor asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.test_layouts import write_stl10
from tests.faults.chain import call, refused

PROFILE = """\
profile: tiny
report: {title: T, caption: C}
evaluation: {knn: {k: [1]}}
tracking: {wandb: 'off'}
subsets:
  stl:
    source: {name: stl10, dataset: STL-10, root_env: ISD_TEST_ROOT}
    rule: {name: all}
    unlabelled: true
    shots: {many_above: 1, few_below: 1}
    store: {resize: square, side: 16}
runs:
"""
RUN = """\
  METHOD:
    label: METHOD
    backbone: {arch: resnet-narrow, stem: small, width: 2}
    method: {OPTIONS}
    optim: {epochs: 1, batch_size: 2, lr: 0.01, schedule: {name: cosine}}
    data: {subset: stl, image_size: 16, view_student: {}, view_teacher: {}}
    numerics: {seed: 0, threads: 1}
"""
METHODS = {
    "isd": "name: isd, tau_student: 0.1, tau_teacher: 0.1, momentum: 0.9, bank_size: 4",
    "supervised": "name: supervised",
}


def test_images_without_labels_are_trained_on_and_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISD_TEST_ROOT", str(write_stl10(tmp_path).parent))
    folder = tmp_path / "profile"
    folder.mkdir()
    runs = "".join(RUN.replace("METHOD", name).replace("OPTIONS", options) for name, options in METHODS.items())
    (folder / "params.yaml").write_text(PROFILE + runs)
    for stage in (("prepare", "stl"), ("pretrain", "isd"), ("extract", "isd"), ("knn", "isd")):
        result = call(folder, *stage)
        assert result.code == 0, result
    record = json.loads((folder / "reports/tiny/records/isd/knn.json").read_text())
    assert {key: record["manifest"][key] for key in ("classes", "train", "search", "query")} == {
        "classes": ["airplane", "bird"],
        "train": 7,
        "search": 4,
        "query": 2,
    }
    assert {(score["group"], score["n"]) for score in record["scores"]} == {("all", 2), ("many", 2)}
    refused(call(folder, "pretrain", "supervised"), "learns from labels", "have none", code=3)
