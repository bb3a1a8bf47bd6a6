"""What a report refuses: tampered scores, parts of different runs, damaged predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from isd_repro.records import pack_labels, unpack_labels
from isd_repro.report.run_records import RECOMPUTED, RECORDED
from isd_repro.runtime.errors import DataError
from tests.report import synthetic
from tests.report.conftest import Profile

FIVE = "1-NN, 5-NN exact float32, ties by lowest label"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def refused(profile: Profile) -> str:
    with pytest.raises(DataError) as caught:
        profile.records()
    return caught.value.message


def one_more_right(tree: dict[str, Any]) -> None:
    values, labels = unpack_labels(tree["predictions"]["student/1-NN"]), unpack_labels(tree["labels"])
    wrong = int(np.flatnonzero(values != labels)[0])
    values[wrong] = labels[wrong]
    tree["predictions"]["student/1-NN"] = pack_labels(values)


def rolled(tree: dict[str, Any]) -> None:
    """The same queries in another order, so that every score still recomputes."""
    for name in ("labels", *tree["predictions"]):
        holder = tree if name == "labels" else tree["predictions"]
        holder[name] = pack_labels(np.roll(unpack_labels(holder[name]), 3))


def test_scores_are_recomputed_and_groups_come_from_the_large_classes(profile: Profile) -> None:
    """Counted one query at a time, from class names."""
    found = profile.records().runs["isd"].own["knn"]
    keys = product(("student", "teacher"), ("1-NN", "20-NN"), ("all", "rare", "large"))
    assert (set(found.scores), set(found.levels.values())) == (set(keys), {RECOMPUTED})
    predicted, label = found.predictions["student/1-NN"].tolist(), found.label.tolist()
    rare = [p == t for p, t in zip(predicted, label, strict=True) if synthetic.CLASSES[t] not in synthetic.LARGE]
    score = found.scores["student", "1-NN", "rare"]
    assert (score.correct, score.n) == (sum(rare), 400)
    hits = found.hits("student", "1-NN", "rare")
    assert hits is not None
    assert hits.tolist() == rare


@pytest.mark.parametrize(("group", "key", "by"), [("all", "correct", 1), ("rare", "n", 1), ("large", "correct", -1)])
def test_a_tampered_score_is_named(profile: Profile, key: str, by: int, group: str) -> None:
    path = profile.layout.record("moco", "knn")
    score = profile.records().runs["moco"].own["knn"].scores["teacher", "20-NN", group]
    now = score.model_copy(update={key: getattr(score, key) + by})
    edit(path, lambda tree: tree["scores"].__setitem__(tree["scores"].index(score.model_dump()), now.model_dump()))
    expected = f"expected {score.correct} of {score.n}, from its predictions"
    assert refused(profile) == f"{path}: scores[teacher 20-NN {group}] is {now.correct} of {now.n}, {expected}"


def test_a_score_without_predictions_is_recorded_only(profile: Profile) -> None:
    edit(profile.layout.record("isd", "knn"), lambda tree: tree["predictions"].pop("teacher/1-NN"))
    levels = profile.records().runs["isd"].own["knn"].levels
    lost = {("teacher", "1-NN", group) for group in ("all", "rare", "large")}
    assert {key for key, level in levels.items() if level == RECORDED} == lost
    report = profile.report()
    assert any("numbers are recorded only (scores with \N{DAGGER})" in note for note in report.footnotes)
    marked = [cell for table in report.tables for row in table.rows for cell in row.cells if cell.number.endswith("\N{DAGGER}")]
    assert {(cell.encoder, cell.metric) for cell in marked} == {("teacher", "1-NN")}
    assert not any(cell.best for cell in marked), "a number that nothing checks never passes for the best"


@pytest.mark.parametrize(("key", "of"), [("encoder_sha256", ("encoder", "isd")), ("manifest.sha256", ("manifest", "small"))])
def test_parts_of_different_runs_are_refused(profile: Profile, key: str, of: tuple[str, str]) -> None:
    path, other = profile.layout.record("isd", "knn"), synthetic.sha("other")
    edit(path, lambda tree: (tree["manifest"] if "." in key else tree).update({key.removeprefix("manifest."): other}))
    assert refused(profile) == f"{path}: {key} is '{other}', expected '{synthetic.sha(*of)}', as pretrain.json says"


def test_rows_of_one_table_must_share_their_images(profile: Profile) -> None:
    other, first = synthetic.sha("other images"), profile.layout.record("untrained", "pretrain")
    for part in ("pretrain", "knn"):
        edit(profile.layout.records / "isd" / f"{part}.json", lambda tree: tree["manifest"].update(sha256=other))
    expected = f"manifest.sha256 is {other}, expected {synthetic.sha('manifest', 'small')}, as {first} says"
    assert refused(profile) == f"{profile.layout.record('isd', 'pretrain')}: {expected}"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("knn", one_more_right, "scores[student 1-NN all] is"),
        ("knn", rolled, "labels is other labels, expected those of"),
        ("knn", lambda tree: tree.update(run="moco"), "run is 'moco', expected 'isd'"),
        ("knn", lambda tree: tree.update(profile="other"), "profile is 'other', expected 'synthetic'"),
        ("knn", lambda tree: tree.update(kind="linear"), "kind is 'linear', expected 'knn'"),
        ("knn", lambda tree: tree["manifest"].update(subset="large"), "manifest.subset is 'large', expected 'small'"),
        ("knn", lambda tree: tree.update(labels="no base64!"), "labels is no packed labels ("),
        ("knn", lambda tree: tree.update(labels=pack_labels(np.arange(9))), "labels is 9 entries, expected 500"),
        ("knn", lambda tree: tree.update(labels=pack_labels(np.full(500, 10))), "labels is class 10, expected 0 to 9"),
        ("knn", lambda tree: tree["scores"].append(tree["scores"][0]), "scores[student 1-NN all] is stated twice, expected once"),
        ("knn", lambda tree: tree["scores"][0].update(correct=0, n=0), "is 0 of 0, expected a score"),
        ("knn", lambda tree: tree["manifest"].update(large=["c11"]), "manifest.large is c11, expected names in manifest.classes"),
        ("knn", lambda tree: tree.update(extra=1), "extra: Extra inputs are not permitted"),
        ("knn", lambda tree: tree["manifest"].update(dataset="ImageNet"), "manifest.dataset is 'ImageNet'"),
        ("knn", lambda tree: tree.update(features_sha256="0" * 64), "features_sha256 is"),
        ("knn", lambda tree: tree.update(settings={"k": [1, 5]}, protocol=FIVE), "settings is"),
        ("linear", lambda tree: tree["settings"].update(epochs=6), "settings is"),
        ("pretrain", lambda tree: tree.update(fingerprint="deadbeefdeadbeef"), "fingerprint is 'deadbeefdeadbeef'"),
        ("pretrain", lambda tree: tree["config"].pop("method"), "fingerprint is"),
        ("pretrain", lambda tree: tree["config"]["optim"].update(lr=0.5), "fingerprint is"),
        ("pretrain", lambda tree: tree["curve"].pop(), "curve is '9 epochs', expected '10 epochs', from its config"),
        ("pretrain", lambda tree: tree["manifest"].update(train=1_281_167), "manifest.train is"),
        ("pretrain", lambda tree: tree["provenance"].update(seconds=float("nan")), "seconds"),
    ],
)
def test_damage_and_contradictions_are_named(
    profile: Profile, part: Literal["pretrain", "knn", "linear"], change: Callable[[dict[str, Any]], object], words: str
) -> None:
    for run in ("moco", "isd"):
        synthetic.write_run(profile.layout, profile.params, run, 0.8, parts=("linear",))
    profile.records()
    edit(profile.layout.record("isd", part), change)
    message = refused(profile)
    assert f"{profile.layout.records / 'isd'}/" in message
    assert words in message


def test_a_record_without_a_run_is_a_footnote(profile: Profile) -> None:
    (profile.layout.records / "old").mkdir()
    assert profile.records().strays == ("old",)
    assert "Records without a run in params.yaml are not shown: old." in profile.report().footnotes


def test_no_records_at_all(tmp_path: Path) -> None:
    params = synthetic.profile({"isd": ("ISD", "small")}, {"small": {"name": "balanced", "per_class": 5}})
    report = Profile(params, synthetic.layout(tmp_path, params)).report()
    assert [cell.number for cell in report.tables[0].rows[0].cells] == ["not run", "not run"]
    assert report.figures == []
