"""Few labels, transfer and snapshots done again: what their encoders give, and everything that can be tampered with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isd_repro.records import pack_labels, unpack_labels
from isd_repro.runtime.files import sha256_file
from isd_repro.verify import again
from tests.verify import world
from tests.verify.world import RECORDS, Profile

DENSE, FEW, TRANSFER, TRAJECTORY = (f"{RECORDS}/isd/{part}.json" for part in ("knn_dense", "few_label", "transfer", "trajectory"))


def test_everything_is_done_again(protocols: Profile) -> None:
    answer = protocols.verify("--linear", "--snapshots")
    assert (answer.code, answer.failures, answer.tree["notes"]) == (0, [], [])
    assert answer.verdicts() == {"re-evaluated"}
    assert {number["metric"] for number in answer.tree["numbers"]} >= {
        "1-NN-dense",
        "few-25pct-last",
        "few-50pct-best-top5",
        "transfer-cifar10-folder",
    }
    snapshots = {number["column"] for number in answer.tree["numbers"] if number["kind"] == "snapshot"}
    assert snapshots == {"1", "2", "3"}
    for said in ("isd linear", "isd few labels, 25 %", "isd few labels, 50 %"):
        assert re.search(rf"{said}: 3 epochs of \d+ images, about ", answer.err)


def test_what_was_not_asked_for_and_what_is_not_here(protocols: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lower verdict comes with a note that says why."""
    answer = protocols.verify()
    assert answer.code == 0
    for metric in ("few-25pct-last", "transfer-cifar10-folder", "linear-last"):
        assert answer.verdicts(run="isd", metric=metric, kind="score") == {"recomputed"}
    assert answer.verdicts(kind="snapshot") == {"recorded only", "re-evaluated"}, "the last one is the run's encoder"
    left = "Linear (--linear), Few labels (--linear), Over training (--snapshots), Transfer (--linear)"
    assert answer.tree["notes"] == [
        "moco: not re-evaluated unless the option is given: Transfer (--linear)",
        f"isd: not re-evaluated unless the option is given: {left}",
    ]
    monkeypatch.delenv("ISD_CIFAR10_ROOT")
    (protocols.folder / "runs/isd/snapshots/epoch-00001.safetensors").unlink()
    answer = protocols.verify("--linear", "--snapshots")
    assert answer.code == 0
    assert answer.verdicts(metric="transfer-cifar10-folder") == {"recomputed"}
    assert answer.verdicts(run="isd", metric="few-25pct-last") == {"re-evaluated"}
    verdicts = {number["column"]: number["verdict"] for number in answer.tree["numbers"] if number["kind"] == "snapshot"}
    assert verdicts == {"1": "recorded only", "2": "re-evaluated", "3": "re-evaluated"}
    absent = "cifar10-folder is not here, so the numbers on it are not re-evaluated: ISD_CIFAR10_ROOT is not set"
    missing = "isd: 1 of 2 snapshots are not available, so their numbers are recorded only"
    assert answer.tree["notes"] == [absent, missing]


def first_two_swapped(tree: dict[str, Any]) -> None:
    """Queries of two classes change their places: labels and predictions alike, so that no score changes."""
    label = unpack_labels(tree["labels"])
    at = int(np.flatnonzero(label != label[0])[0])
    order = np.arange(len(label))
    order[[0, at]] = at, 0
    tree["labels"] = pack_labels(label[order])
    tree["predictions"] = {key: pack_labels(unpack_labels(packed)[order]) for key, packed in tree["predictions"].items()}


def one_for_another(tree: dict[str, Any]) -> None:
    """A right answer and a wrong one change places among the queries of one class."""
    one = tree["evaluations"][0]
    predicted, label = unpack_labels(one["predictions"]["teacher/transfer"]), unpack_labels(one["labels"])
    wrong = int(np.flatnonzero(predicted != label)[0])
    right = int(np.flatnonzero((predicted == label) & (label == label[wrong]))[0])
    predicted[[wrong, right]] = predicted[[right, wrong]]
    one["predictions"]["teacher/transfer"] = pack_labels(predicted)


def test_predictions_and_labels_that_change_no_score(protocols: Profile) -> None:
    """Labels of dense queries are in no manifest: those that the evaluation gives again are compared."""
    at: list[int] = []
    protocols.edit(protocols.record("isd", "few_label"), lambda tree: at.append(world.swap_wrong(tree, "teacher/few-25pct-last")))
    protocols.edit(protocols.record("isd", "knn_dense"), first_two_swapped)
    protocols.edit(protocols.record("isd", "transfer"), one_for_another)
    protocols.report()
    assert protocols.verify("--quick").code == 0
    answer = protocols.verify("--linear")
    one = answer.caught(FEW, f"predictions['teacher/few-25pct-last'][{at[0]}]", "restore the record")
    assert "1 of 30 predictions differ" in one["expected"]
    answer.caught(DENSE, "labels[0]", "restore the record")
    (key,) = [key for file, key in answer.failures if file == TRANSFER]
    assert key.startswith("cifar10-folder: predictions['teacher/transfer'][")
    for metric in ("few-25pct-last", "1-NN-dense"):
        assert answer.verdicts(run="isd", metric=metric) == {"failed"}
    assert answer.verdicts(run="isd", metric="linear-last") == {"re-evaluated"}
    assert answer.verdicts(run="isd", metric="1-NN", kind="score") == {"re-evaluated"}
    assert answer.verdicts(run="moco", metric="transfer-cifar10-folder") == {"re-evaluated"}


def test_scores_and_lengths(protocols: Profile) -> None:
    """One more right answer than the predictions give, in one of two runs; one prediction too few."""
    queries = len(unpack_labels(json.loads(protocols.record("isd", "knn_dense").read_text("utf-8"))["labels"]))
    assert queries > 30, "validation images and others"

    def cut(tree: dict[str, Any]) -> None:
        tree["predictions"]["teacher/5-NN-dense"] = pack_labels(unpack_labels(tree["predictions"]["teacher/5-NN-dense"])[:-1])

    protocols.edit(protocols.record("isd", "knn_dense"), cut)
    protocols.edit(
        protocols.record("isd", "transfer"),
        lambda tree: tree["evaluations"][0]["scores"][0].update(correct=tree["evaluations"][0]["scores"][0]["correct"] - 1),
    )
    answer = protocols.verify("--quick")
    one = answer.caught(DENSE, "predictions['teacher/5-NN-dense']")
    assert (one["found"], one["expected"]) == (f"{queries - 1} entries", f"{queries}, one for each query")
    answer.caught(TRANSFER, "cifar10-folder: scores[student transfer all]")
    assert answer.verdicts(run="isd", metric="transfer-cifar10-folder", encoder="student") == {"failed"}
    assert answer.verdicts(run="moco", metric="transfer-cifar10-folder") == {"recomputed"}


def test_tampered_choices(protocols: Profile) -> None:
    def other(best: dict[str, int], encoder: str) -> None:
        best[encoder] = 1 + best[encoder] % 3

    protocols.edit(protocols.record("isd", "few_label"), lambda tree: other(tree["settings"]["best_epoch"]["25"], "student"))
    protocols.edit(protocols.record("isd", "linear"), lambda tree: other(tree["settings"]["best_epoch"], "teacher"))
    protocols.edit(
        protocols.record("isd", "transfer"),
        lambda tree: tree["evaluations"][0]["settings"]["chosen"]["student"].update(c=3.5),
    )
    protocols.report()
    answer = protocols.verify("--linear")
    answer.caught(FEW, "settings.best_epoch.25.student")
    answer.caught(f"{RECORDS}/isd/linear.json", "settings.best_epoch.teacher")
    answer.caught(TRANSFER, "cifar10-folder: settings.chosen.student.c")


def test_other_labelled_images(protocols: Profile) -> None:
    changes = {"sha256": "0" * 64, "images": 19}
    protocols.edit(protocols.record("isd", "few_label"), lambda tree: tree["settings"]["labelled"]["50"].update(changes))
    protocols.report()
    answer = protocols.verify()
    for key, value in changes.items():
        assert answer.caught(FEW, f"settings.labelled.50.{key}")["found"] == str(value)
    assert answer.verdicts(run="isd", metric="few-50pct-last") == {"failed"}


# --- transfer -----------------------------------------------------------------------------------------------------------


def test_transfer_labels_that_are_not_those_of_the_images(protocols: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and predictions of every transfer record moved alike: scores, means and all pairs of records still agree."""

    def change(tree: dict[str, Any]) -> None:
        one = tree["evaluations"][0]
        one["labels"] = pack_labels(unpack_labels(one["labels"])[::-1])
        one["predictions"] = {key: pack_labels(unpack_labels(packed)[::-1]) for key, packed in one["predictions"].items()}

    for run in ("moco", "isd"):
        protocols.edit(protocols.record(run, "transfer"), change)
    protocols.report()
    answer = protocols.verify("--linear")
    for run in ("moco", "isd"):
        answer.caught(f"{RECORDS}/{run}/transfer.json", "cifar10-folder: labels", "restore the record")
    assert answer.verdicts(metric="transfer-cifar10-folder") == {"failed"}
    assert answer.verdicts(run="isd", metric="1-NN", kind="score") == {"re-evaluated"}
    monkeypatch.delenv("ISD_CIFAR10_ROOT")
    assert protocols.verify("--linear").code == 0, "and without the images nothing tells; the note and docs/verify.md say so"


def another_pixel(root: Path) -> None:
    path = root / "test/cat/03.png"
    pixels = np.array(Image.open(path))
    pixels[5, 5] ^= 1
    Image.fromarray(pixels).save(path)


def another_class(root: Path) -> None:
    (root / "train/cat/03.png").rename(root / "train/dog/99.png")


@pytest.mark.parametrize("change", [another_pixel, another_class])
def test_another_transfer_image_or_label(protocols: Profile, change: Callable[[Path], None]) -> None:
    change(protocols.folder / "target")
    answer = protocols.verify("--linear")
    one = answer.caught(TRANSFER, "cifar10-folder: manifest.sha256", "other images or classes")
    assert one["expected"].endswith("as the data set's images here say")
    assert answer.verdicts(metric="transfer-cifar10-folder") == {"failed"}
    (protocols.folder / "target/test/cat/03.png").write_bytes(b"no image")
    answer = protocols.verify("--linear")
    assert "cannot be read" in answer.caught("runs/isd/encoder.safetensors", "transfer again")["found"]


# --- snapshots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_tampered_score_of_a_snapshot(protocols: Profile, monkeypatch: pytest.MonkeyPatch, elsewhere: bool) -> None:
    """On the record's own machine it fails; from another one, a few scores stay recorded only."""
    stated: list[int] = []

    def change(tree: dict[str, Any]) -> None:
        score = tree["points"][0]["scores"][0]
        stated.append(score["correct"])
        score["correct"] += 1
        if elsewhere:
            tree["provenance"]["machine"]["cpu"] = "Another processor"

    protocols.edit(protocols.record("isd", "trajectory"), change)
    protocols.report()
    assert protocols.verify("--quick").code == 0
    monkeypatch.setattr(again, "TOLERATED", 1 / 30)
    answer = protocols.verify("--snapshots")
    if elsewhere:
        assert answer.code == 0
        verdicts = {number["column"]: number["verdict"] for number in answer.tree["numbers"] if number["kind"] == "snapshot"}
        assert verdicts == {"1": "recorded only", "2": "re-evaluated", "3": "re-evaluated"}
    else:
        one = answer.caught(TRAJECTORY, "epoch 1: scores[student 1-NN all]")
        assert one["found"] == f"{stated[0] + 1} of 30"
        assert one["expected"] == f"{stated[0]} of 30, as the snapshot here gives"
        assert answer.verdicts(kind="snapshot") == {"failed"}


def test_another_snapshot(protocols: Profile) -> None:
    """The file of another epoch, with a record that was made to fit."""
    first, second = (protocols.folder / f"runs/isd/snapshots/epoch-0000{epoch}.safetensors" for epoch in (1, 2))
    first.write_bytes(second.read_bytes())
    key = "epoch 1: runs/isd/snapshots/epoch-00001.safetensors"
    assert protocols.verify().caught(TRAJECTORY, key)["found"] == sha256_file(second)
    path = protocols.record("isd", "trajectory")
    protocols.edit(path, lambda tree: tree["points"][0].update(encoder_sha256=sha256_file(second)))
    protocols.report()
    answer = protocols.verify("--snapshots")
    assert answer.code == 4
    assert answer.verdicts(kind="snapshot") == {"failed"}


def test_changed_parameters_of_protocols(protocols: Profile) -> None:
    for old, new in (("seed: 3}", "seed: 4}"), ("c_values: 5", "c_values: 6"), ("k: [1, 5]", "k: [1, 3]")):
        protocols.replace(protocols.folder / "params.yaml", old, new)
    protocols.report()
    answer = protocols.verify("--quick")
    for key in ("evaluation.few_label.draw_seed", "evaluation.transfer.c_values", "evaluation.knn.k"):
        answer.caught("params.yaml", key)
