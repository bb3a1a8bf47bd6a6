"""Few labels and transfer in a report: cells counted by hand from stored predictions, and records that are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from isd_repro import evaluations
from isd_repro.records import (
    Labels,
    ManifestIdentity,
    TargetEvaluation,
    TargetsRecord,
    mean_per_class,
    pack_labels,
    score_groups,
    wilson,
    write_record,
)
from isd_repro.report.run_records import RECOMPUTED
from isd_repro.runtime.errors import DataError
from tests.report import synthetic
from tests.report.conftest import Profile
from tests.report.test_records import edit

RUNS = ("untrained", "moco", "isd")
TARGETS = ("food101", "pets")  # top-1, mean per class
NAMES = ("cat", "dog", "owl")
LABEL = np.array([0] * 20 + [1] * 10 + [2] * 5)


def answers(seed: int, label: Labels, classes: int, right: float) -> Labels:
    draw = torch.Generator().manual_seed(seed)
    wrong = (label + torch.randint(1, classes, label.shape, generator=draw).numpy()) % classes
    return np.where(torch.rand(label.shape, generator=draw).numpy() < right, label, wrong)


def target(key: str) -> ManifestIdentity:
    return ManifestIdentity(
        sha256=synthetic.sha("target", key),
        dataset={"food101": "Food-101", "pets": "Oxford-IIIT Pets"}[key],
        subset=key,
        rule={"seed": 0},
        classes=NAMES,
        large=(),
        train=80,
        search=100,
        query=len(LABEL),
    )


def write_few(profile: Profile, run: str, seed: int) -> None:
    label = np.arange(500) % 10
    given = {}
    for at, end in enumerate(("last", "best")):
        first = answers(seed + at, label, 10, 0.3)
        given[f"student/few-10pct-{end}"] = first
        given[f"student/few-10pct-{end}-top5"] = np.where(np.arange(500) % 3 == 0, label, first)
    settings = {
        "epochs": 40,
        "fractions": [0.1],
        "draw_seed": 0,
        "labelled": {"10": {"images": 10, "source": "drawn", "sha256": synthetic.sha("labelled"), "list_sha256": None}},
        "best_epoch": {"10": {"student": seed}},  # which may differ between runs
    }
    protocol = "linear, paper, on the labelled images alone"
    record = synthetic.evaluation(profile.params, run, "few_label", given, protocol=protocol, settings=settings)
    write_record(profile.layout.record(run, "few_label"), record)


def write_transfer(profile: Profile, run: str, seed: int) -> None:
    common: dict[str, Any] = {
        "profile": profile.params.profile,
        "run": run,
        "protocol": "logistic regression",
        "encoder_sha256": synthetic.sha("encoder", run),
        "provenance": synthetic.provenance(7.0),
    }
    evaluations = []
    for at, key in enumerate(TARGETS):
        found = answers(seed + 50 * at, LABEL, 3, 0.6)
        evaluations.append(
            TargetEvaluation(
                kind="transfer",
                **common,
                settings={"chosen": {"student": {"c": 0.1}}},
                manifest=target(key),
                features_sha256=None,
                scores=tuple(score_groups("student/transfer", found, LABEL, {"all": LABEL >= 0})),
                labels=pack_labels(LABEL),
                predictions={"student/transfer": pack_labels(found)},
                metric="top1" if key == "food101" else "mean-per-class",
                mean_per_class={"student/transfer": mean_per_class(found, LABEL)},
            )
        )
    subset = profile.params.runs[run].data.subset
    record = TargetsRecord(
        kind="transfer",
        **common,
        settings={"sets": list(TARGETS)},
        manifest=synthetic.manifest(profile.params, subset, 500),
        evaluations=tuple(evaluations),
    )
    write_record(profile.layout.record(run, "transfer"), record)


@pytest.fixture
def both(profile: Profile) -> Profile:
    """The profile with both protocols asked of three runs and done for two."""
    evaluation = evaluations.settings({"few_label": {"fractions": [0.1]}, "transfer": {"sets": TARGETS}})
    update = {"evaluation": evaluation, "few_label_runs": RUNS, "transfer_runs": RUNS}
    found = Profile(profile.params.model_copy(update=update), profile.layout)
    for at, run in enumerate(RUNS[1:], start=1):
        write_few(found, run, 10 * at)
        write_transfer(found, run, 10 * at)
    return found


def table(profile: Profile, name: str) -> Any:
    [found] = [one for one in profile.report().tables if one.id == name]
    return found


def test_a_profile_that_lists_no_runs_has_no_such_table(profile: Profile) -> None:
    assert not [one.id for one in profile.report().tables if one.id.startswith(("few-label", "transfer"))]


def test_few_label_cells_are_counted_from_the_predictions(both: Profile) -> None:
    found = table(both, "few-label-small-student")
    assert {column.span for column in found.columns} == {"10 % of labels"}
    assert [column.head for column in found.columns] == ["last epoch", "last epoch, top-5", "best epoch", "best epoch, top-5"]
    assert "Labelled images: 10 %, 10 images drawn by class." in found.notes
    assert [row.run for row in found.rows] == list(RUNS)
    assert [cell.number for cell in found.rows[0].cells] == ["not run"] * 4
    label = (np.arange(500) % 10).tolist()
    for at, row in enumerate(found.rows[1:], start=1):
        for place in (0, 2):
            first = answers(10 * at + place // 2, np.arange(500) % 10, 10, 0.3).tolist()
            hits = [a == b for a, b in zip(first, label, strict=True)]
            top5 = [hit or number % 3 == 0 for number, hit in enumerate(hits)]
            for cell, right in ((row.cells[place], sum(hits)), (row.cells[place + 1], sum(top5))):
                assert (cell.correct, cell.n, cell.value) == (right, 500, right / 5)
                assert (cell.low, cell.high) == wilson(right, 500)
                assert (cell.level, cell.part) == (RECOMPUTED, "few_label")
    assert "few-label-small-teacher" not in [one.id for one in both.report().tables]


def test_transfer_cells_by_hand(both: Profile) -> None:
    found = table(both, "transfer-student")
    heads = [("top-1", "Food-101 (n = 35)"), ("mean per class", "Oxford-IIIT Pets (n = 35)"), ("All", "mean")]
    assert [(column.span, column.head) for column in found.columns] == heads
    said = " ".join(found.notes)
    for title in ("Food-101", "Oxford-IIIT Pets"):
        assert f"{title}, 80 training, 20 validation and 35 test images" in said
    assert [cell.number for cell in found.rows[0].cells] == ["not run"] * 3
    for at, row in enumerate(found.rows[1:], start=1):
        one, two, mean = row.cells
        hits = (answers(10 * at, LABEL, 3, 0.6) == LABEL).tolist()
        assert (one.correct, one.n, one.value) == (sum(hits), 35, pytest.approx(100 * sum(hits) / 35))
        hits = (answers(10 * at + 50, LABEL, 3, 0.6) == LABEL).tolist()
        right = [sum(hits[:20]), sum(hits[20:30]), sum(hits[30:])]
        value = 100 * (right[0] / 20 + right[1] / 10 + right[2] / 5) / 3
        assert two.value == pytest.approx(value)
        variance = 0.0
        for k, n in zip(right, (20, 10, 5), strict=True):
            a, b = k + 1, n - k + 1  # the posterior of a share under a flat prior is Beta(a, b)
            variance += a * b / ((a + b) ** 2 * (a + b + 1))
        half = 1.96 * 100 * math.sqrt(variance) / 3
        assert two.low == pytest.approx(max(0.0, value - half))
        assert two.high == pytest.approx(min(100.0, value + half))
        assert (two.kind, two.n, two.part) == ("mean", 35, "transfer")
        assert "3 classes" in two.detail
        assert mean.value == pytest.approx((one.value + two.value) / 2)
        assert (mean.low, mean.correct) == (None, None)


def test_a_mean_over_sets_needs_all_of_them(both: Profile) -> None:
    sets: Any = (*TARGETS, "dtd")
    transfer = both.params.evaluation.transfer.model_copy(update={"sets": sets})
    evaluation = both.params.evaluation.model_copy(update={"transfer": transfer})
    more = Profile(both.params.model_copy(update={"evaluation": evaluation}), both.layout)
    row = table(more, "transfer-student").rows[2]
    assert [cell.number for cell in row.cells][2:] == ["not run", "not run"]
    assert row.cells[3].detail == "2 of 3 data sets have a number"


def test_every_format_shows_both_and_a_second_render_is_equal(both: Profile) -> None:
    files = both.files()
    assert files == both.files()
    for name in ("table.md", "table.tex", "index.html"):
        assert "Few labels: small, student" in files[name]
        assert "Food-101" in files[name]
    cells = json.loads(files["cells.json"])["cells"]
    one = next(
        cell for cell in cells if cell["table"] == "transfer-student" and cell["kind"] == "score" and cell["runs"] == ["isd"]
    )
    assert one["records"] == ["../records/isd/transfer.json"]
    assert one["commands"] == ["isd-repro transfer isd"]
    few = next(cell for cell in cells if cell["table"].startswith("few-label") and cell["runs"] == ["moco"])
    assert few["records"] == ["../records/moco/few_label.json"]
    assert few["commands"] == ["isd-repro few-label moco"]
    seconds = json.loads(files["cells.json"])["runs"]["isd"]["seconds"]
    assert seconds == pytest.approx(83.5 + 4.2 + 4.2 + 7.0)


OTHER = synthetic.sha("another")
PACKED = pack_labels(np.zeros(35, dtype=np.int64))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "transfer",
            lambda tree: tree["evaluations"][1].update(mean_per_class={"student/transfer": 99.0}),
            "pets: mean_per_class is",
        ),
        ("transfer", lambda tree: tree["evaluations"][1]["mean_per_class"].clear(), "pets: mean_per_class is"),
        ("transfer", lambda tree: tree["evaluations"][0]["scores"][0].update(correct=35), "all.* is 35 of 35, expected"),
        (
            "transfer",
            lambda tree: tree["evaluations"][0]["predictions"].update({"student/transfer": PACKED}),
            "expected 20 of 35, from its predictions",
        ),
        ("transfer", lambda tree: tree["evaluations"][0].update(encoder_sha256=OTHER), "food101: encoder_sha256 is"),
        ("transfer", lambda tree: tree["evaluations"][0]["manifest"].update(sha256=OTHER), "food101: manifest is other images"),
        ("transfer", lambda tree: tree["evaluations"][0].update(run="moco"), "food101: run is 'moco', expected 'isd'"),
        ("transfer", lambda tree: tree["settings"].update(sets=["pets"]), "sets is"),
        ("transfer", lambda tree: tree["settings"].update(c_values=9), "settings is"),
        ("few_label", lambda tree: tree["settings"]["labelled"]["10"].update(images=11), "settings is"),
    ],
)
def test_what_does_not_agree_is_refused(both: Profile, part: Any, change: Callable[[dict[str, Any]], None], words: str) -> None:
    path = both.layout.record("isd", part)
    edit(path, change)
    with pytest.raises(DataError, match=words) as caught:
        both.records()
    assert path.name in caught.value.message
