"""A verdict beside the paper is given only for the paper's images, budget and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isd_repro.config.params import Run
from isd_repro.data.lists import LIST_SHA256
from isd_repro.records import ManifestIdentity, PretrainRecord
from isd_repro.report import paper
from isd_repro.report.paper import PaperImages
from isd_repro.report.paper_comparison import other_images
from isd_repro.report.run_records import RunRecords
from isd_repro.runtime.files import sha256_file
from tests.report import synthetic

KNOWN = "ab" * 32
IMAGES = PaperImages(classes=1000, train=1_281_167, query=50_000, manifests=(KNOWN,))
STEPS = 200 * (1_281_167 // 256)


def run_of(tmp_path: Path) -> tuple[Run, PretrainRecord]:
    """A run of 200 epochs and its record, on as many images as ImageNet has."""
    params = synthetic.profile({"isd": ("ISD", "whole")}, {"whole": {"name": "all"}}, {})
    run = params.runs["isd"]
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"epochs": 200, "batch_size": 256})})
    where = synthetic.layout(tmp_path, params)
    synthetic.write_run(where, params, "isd", 0.5)
    record = PretrainRecord.model_validate_json(where.record("isd", "pretrain").read_bytes())
    manifest = {"classes": tuple(f"n{at:08d}" for at in range(1000)), "train": 1_281_167, "query": 50_000, "sha256": KNOWN}
    identity = ManifestIdentity.model_validate({**record.manifest.model_dump(), "large": (), **manifest})
    return run, record.model_copy(update={"manifest": identity, "steps": STEPS})


def said(tmp_path: Path, images: PaperImages = IMAGES, **change: Any) -> str:
    run, record = run_of(tmp_path)
    steps = change.pop("steps", record.steps)
    record = record.model_copy(update={"manifest": record.manifest.model_copy(update=change), "steps": steps})
    return other_images(RunRecords("isd", record), run, images)


def test_the_papers_own_images_are_judged(tmp_path: Path) -> None:
    assert said(tmp_path) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"classes": ("a", "b")}, "classes: 2 here, 1,000 in the paper"),
        ({"train": 500, "steps": 200}, "training images: 500 here, 1,281,167 in the paper"),
        ({"query": 500}, "queries: 500 here, 50,000 in the paper"),
        ({"steps": 1}, f"steps: 1 were made, {STEPS:,} belong to the paper's epochs"),
        ({"sha256": "cd" * 32}, "the identity of the images is unknown: manifest cdcdcdcdcdcd has not been compared"),
    ],
)
def test_other_images_or_steps_are_not(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    assert said(tmp_path, **change).startswith(why)


def test_a_list_of_ones_own_under_a_published_name(tmp_path: Path) -> None:
    images = PaperImages(classes=1000, query=50_000, manifests=(KNOWN,))
    rule: Callable[[str], dict[str, Any]] = lambda digest: {"name": "list", "list": "D1", "sha256": digest}  # noqa: E731
    assert said(tmp_path, images, rule=rule(LIST_SHA256["D1"])) == ""
    other = hashlib.sha256(b"mine").hexdigest()
    assert said(tmp_path, images, rule=rule(other)) == f"the list is not known to be the published D1: its sha256 is {other}"
    assert said(tmp_path, images, rule={"name": "list", "list": "D1"}).endswith("its sha256 is not recorded")


def test_a_record_without_training_is_not_judged(tmp_path: Path) -> None:
    assert other_images(RunRecords("isd"), run_of(tmp_path)[0], IMAGES) == "there is no record of the training"


def test_no_manifest_of_imagenet_is_known_yet() -> None:
    """Until one is, every verdict of the profiles on ImageNet is `not comparable`."""
    assert {name: images.manifests for name, images in paper.load().images.items()} == {"imagenet": (), "unbalanced": ()}


def test_the_published_values_and_tolerances_are_these() -> None:
    """Whoever changes a value or a tolerance changes this hash, which every page beside the paper shows."""
    assert sha256_file(paper.FILE) == "d07a8c5c2d3f6935b6bd4df28475cee9f85f72799df11cf63d7fc921273104ba"
