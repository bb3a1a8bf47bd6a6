"""Records that contradict their own parameters, with fingerprint, lock and page made to fit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isd_repro import provenance
from isd_repro.records import Mask, pack_labels, score_groups, unpack_labels
from isd_repro.verify import commits
from tests.verify.world import RECORDS, Profile, forge, write_lock


def keep(tree: dict[str, Any], kept: Mask) -> None:
    """Keep some queries of a record, and count its scores again."""
    tree["manifest"]["query"] = int(kept.sum())
    if tree["kind"] == "pretrain":
        return
    label = unpack_labels(tree["labels"])[kept]
    tree["labels"] = pack_labels(label)
    predicted = {key: unpack_labels(packed)[kept] for key, packed in tree["predictions"].items()}
    tree["predictions"] = {key: pack_labels(values) for key, values in predicted.items()}
    large = np.array([tree["manifest"]["classes"].index(name) for name in tree["manifest"]["large"]])
    is_large = np.isin(label, large)
    groups = {"all": label >= 0, "rare": ~is_large, "large": is_large}
    tree["scores"] = [one.model_dump() for key, values in predicted.items() for one in score_groups(key, values, label, groups)]


def test_wrong_answers_deleted_from_every_record(clean: Profile) -> None:
    tree = json.loads(clean.record("isd", "knn").read_text("utf-8"))
    kept = unpack_labels(tree["predictions"]["student/1-NN"]) == unpack_labels(tree["labels"])
    for path in sorted((clean.folder / RECORDS).glob("*/*.json")):
        clean.edit(path, lambda tree: keep(tree, kept))
    write_lock(clean)
    clean.report()
    answer = clean.verify("--quick")
    one = answer.failed("numbers of images", f"{RECORDS}/isd/pretrain.json", "manifest.query")
    assert one["expected"].startswith("30, by the rule: 3 of each of 10 classes")
    answer.failed("queries of each class", f"{RECORDS}/isd/knn.json", "labels: ")


def with_collapse(tree: dict[str, Any]) -> None:
    tree["curve"][0]["spread"] = 0.001
    tree["warnings"] = []


ROUNDS: list[dict[tuple[str, str], Callable[[dict[str, Any]], object]]] = [  # by check and key
    {
        ("steps", "steps"): lambda tree: tree.update(steps=tree["steps"] - 1),
        ("learning rates", "curve: lr of epoch 1"): lambda tree: tree["curve"][0].update(lr=0.03),
        ("losses", "curve: epoch 1"): lambda tree: tree["curve"][0].update(loss=-1.0),
        ("warnings", "warnings"): with_collapse,
        ("attempts and seconds", "provenance.seconds"): lambda tree: tree["provenance"].update(seconds=0),
        ("numbers of images", "manifest.query"): lambda tree: tree["manifest"].update(query=29),
    },
    {
        ("losses", "curve: epoch 1"): lambda tree: tree["curve"][0].pop("loss"),
        ("attempts and seconds", "provenance.seconds"): lambda tree: tree["provenance"].update(seconds=1e6),
        ("attempts and seconds", "attempts"): lambda tree: tree["attempts"][0].update(last_step=1),
        ("numbers of images", "manifest.train"): lambda tree: tree["manifest"].update(train=30),
    },
]


@pytest.mark.parametrize("changes", ROUNDS, ids=range(len(ROUNDS)))
def test_numbers_that_the_parameters_do_not_give(
    clean: Profile, changes: dict[tuple[str, str], Callable[[dict[str, Any]], object]]
) -> None:
    for change in changes.values():
        clean.edit(clean.record("moco", "pretrain"), change)
    write_lock(clean)
    answer = clean.verify("--quick")
    for check, key in changes:
        answer.failed(check, f"{RECORDS}/moco/pretrain.json", key)


def test_losses_that_training_did_not_write(profile: Profile) -> None:
    """Without the rows that training wrote, a loss curve is in its record alone, and `verify` says that."""
    forge(profile, "moco", "pretrain", lambda tree: tree["curve"][0].update(loss=0.125))
    one = profile.verify("--quick").failed("losses", f"{RECORDS}/moco/pretrain.json", "curve: loss of epoch 1")
    assert one["found"] == "0.125"
    (profile.folder / "runs/moco/metrics.jsonl").unlink()
    answer = profile.verify("--quick")
    assert answer.code == 0
    assert answer.tree["checks"]["losses"]["recorded only"] == 1
    assert "the loss curve is in the record alone" in answer.tree["checks"]["losses"]["reasons"][0]


@pytest.mark.parametrize("commit", ["main", "0" * 40, "c0ffee"])
def test_a_commit_that_is_no_commit(clean: Profile, commit: str) -> None:
    forge(clean, "moco", "knn", lambda tree: tree["provenance"].update(commit=commit, dirty=False))
    clean.verify("--quick").failed("commit and source", f"{RECORDS}/moco/knn.json", "provenance.commit")


def test_a_real_commit_of_other_code(clean: Profile) -> None:
    git, here = ["git", "rev-list", "--max-parents=0", "HEAD"], Path(provenance.__file__).parent
    first = subprocess.run(git, cwd=here, capture_output=True, text=True, check=True).stdout.split()[0]
    forge(clean, "moco", "knn", lambda tree: tree["provenance"].update(commit=first, dirty=False))
    clean.verify("--quick").failed("commit and source", f"{RECORDS}/moco/knn.json", "provenance.source")


def test_the_source_at_a_commit_is_hashed_as_a_run_does_it() -> None:
    """The checkout's own package, where nothing has been changed since its commit."""
    origin = provenance.describe(0.0)
    assert origin.commit
    source = commits.source_of(origin.commit)
    assert source == origin.source or origin.dirty, "a clean checkout is its commit"
    assert source is not None
    assert commits.source_of("0" * 40) is None


def test_where_git_cannot_tell_that_is_said(clean: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "has_git", lambda: False)
    answer = clean.verify("--quick")
    assert answer.code == 0
    assert answer.tree["checks"]["commit and source"]["not checked"] == 3
    assert "git cannot tell here" in answer.tree["checks"]["commit and source"]["reasons"][0]
