"""What a report refuses: tampered scores, parts of different runs, damaged predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from isd_repro.records import pack_labels, unpack_labels
from isd_repro.report.run_records import RECOMPUTED, RECORDED
from isd_repro.runtime.errors import DataError
from tests.report import synthetic
from tests.report.conftest import Profile


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def refused(profile: Profile) -> str:
    with pytest.raises(DataError) as caught:
        profile.records()
    return caught.value.message


def test_scores_are_recomputed(profile: Profile) -> None:
    found = profile.records().runs["isd"].own.get("knn")
    assert found is not None
    assert set(found.scores) == {
        (e, m, g) for e in ("student", "teacher") for m in ("1-NN", "20-NN") for g in ("all", "rare", "large")
    }
    assert set(found.levels.values()) == {RECOMPUTED}


def test_groups_come_from_the_large_classes(profile: Profile) -> None:
    """Counted one query at a time, from class names."""
    found = profile.records().runs["isd"].own.get("knn")
    assert found is not None
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
    now = {"correct": score.correct, "n": score.n, key: getattr(score, key) + by}

    def change(tree: dict[str, Any]) -> None:
        of = next(s for s in tree["scores"] if (s["encoder"], s["metric"], s["group"]) == ("teacher", "20-NN", group))
        of.update(now)

    edit(path, change)
    assert refused(profile) == (
        f"{path}: scores[teacher 20-NN {group}] is {now['correct']} of {now['n']},"
        f" expected {score.correct} of {score.n}, from its predictions"
    )


def test_a_tampered_prediction_is_caught(profile: Profile) -> None:
    def change(tree: dict[str, Any]) -> None:
        values = unpack_labels(tree["predictions"]["student/1-NN"])
        labels = unpack_labels(tree["labels"])
        wrong = int(np.flatnonzero(values != labels)[0])
        values[wrong] = labels[wrong]
        tree["predictions"]["student/1-NN"] = pack_labels(values)

    edit(profile.layout.record("isd", "knn"), change)
    assert "scores[student 1-NN all] is" in refused(profile)


def test_a_score_without_predictions_is_recorded_only(profile: Profile) -> None:
    edit(profile.layout.record("isd", "knn"), lambda tree: tree["predictions"].pop("teacher/1-NN"))
    found = profile.records().runs["isd"].own.get("knn")
    assert found is not None
    assert {key for key, level in found.levels.items() if level == RECORDED} == {
        ("teacher", "1-NN", g) for g in ("all", "rare", "large")
    }
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
    other = synthetic.sha("other images")
    for part in ("pretrain", "knn"):
        edit(profile.layout.records / "isd" / f"{part}.json", lambda tree: tree["manifest"].update(sha256=other))
    first = profile.layout.record("untrained", "pretrain")
    expected = f"manifest.sha256 is {other}, expected {synthetic.sha('manifest', 'small')}, as {first} says"
    assert refused(profile) == f"{profile.layout.record('isd', 'pretrain')}: {expected}"


def test_rows_of_one_table_must_share_their_query_labels(profile: Profile) -> None:
    def change(tree: dict[str, Any]) -> None:
        for name in ("labels", *tree["predictions"]):
            holder = tree if name == "labels" else tree["predictions"]
            holder[name] = pack_labels(np.roll(unpack_labels(holder[name]), 3))

    edit(profile.layout.record("isd", "knn"), change)  # every score still recomputes
    assert "labels is other labels, expected those of" in refused(profile)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(run="moco"), "run is 'moco', expected 'isd'"),
        (lambda tree: tree.update(profile="other"), "profile is 'other', expected 'synthetic'"),
        (lambda tree: tree.update(kind="linear"), "kind is 'linear', expected 'knn'"),
        (lambda tree: tree["manifest"].update(subset="large"), "manifest.subset is 'large', expected 'small'"),
        (lambda tree: tree.update(labels="no base64!"), "labels is no packed labels ("),
        (lambda tree: tree.update(labels=pack_labels(np.arange(9))), "labels is 9 entries, expected 500"),
        (lambda tree: tree.update(labels=pack_labels(np.full(500, 10))), "labels is class 10, expected 0 to 9"),
        (lambda tree: tree["scores"].append(tree["scores"][0]), "scores[student 1-NN all] is stated twice, expected once"),
        (lambda tree: tree["scores"][0].update(correct=0, n=0), "is 0 of 0, expected a score"),
        (lambda tree: tree["manifest"].update(large=["c11"]), "manifest.large is c11, expected names in manifest.classes"),
        (lambda tree: tree.update(extra=1), "extra: Extra inputs are not permitted"),
    ],
)
def test_damage_is_named(profile: Profile, change: Callable[[dict[str, Any]], None], words: str) -> None:
    path = profile.layout.record("isd", "knn")
    edit(path, change)
    message = refused(profile)
    assert str(path) in message
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


FIVE = "1-NN, 5-NN exact float32, ties by lowest label"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("pretrain", lambda tree: tree.update(fingerprint="deadbeefdeadbeef"), "fingerprint is 'deadbeefdeadbeef'"),
        ("pretrain", lambda tree: tree["config"].pop("method"), "fingerprint is"),
        ("pretrain", lambda tree: tree["config"]["optim"].update(lr=0.5), "fingerprint is"),
        ("pretrain", lambda tree: tree["curve"].pop(), "curve is '9 epochs', expected '10 epochs', from its config"),
        ("pretrain", lambda tree: tree["manifest"].update(train=1_281_167), "manifest.train is"),
        ("knn", lambda tree: tree["manifest"].update(dataset="ImageNet"), "manifest.dataset is 'ImageNet'"),
        ("knn", lambda tree: tree.update(features_sha256="0" * 64), "features_sha256 is"),
        ("knn", lambda tree: tree.update(settings={"k": [1, 5]}, protocol=FIVE), "settings is"),
        ("linear", lambda tree: tree["settings"].update(epochs=6), "settings is"),
        ("pretrain", lambda tree: tree["provenance"].update(seconds=float("nan")), "seconds"),
    ],
)
def test_what_records_say_twice_must_agree(
    profile: Profile, part: Literal["pretrain", "knn", "linear"], change: Callable[[dict[str, Any]], None], words: str
) -> None:
    for run in ("moco", "isd"):
        synthetic.write_run(profile.layout, profile.params, run, 0.8, parts=("linear",))
    profile.records()
    edit(profile.layout.record("isd", part), change)
    assert words in refused(profile)
