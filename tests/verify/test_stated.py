"""What a record states without predictions behind it is held against what is stated elsewhere, and against the lock."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.cheats.author import write_lock
from tests.verify.test_tampering import caught
from tests.verify.world import Profile

RECORDS = "reports/tiny/records"


def test_a_run_that_was_deleted(clean: Profile) -> None:
    """The page shows `not run`, as it would before the run."""
    write_lock(clean)
    shutil.rmtree(clean.record("moco", "knn").parent)
    clean.report()
    answer = clean.verify()
    for part in ("pretrain", "knn"):
        assert "as dvc.lock says" in caught(answer, f"{RECORDS}/moco/{part}.json", "file", "restore the record")["expected"]
    assert len(answer.failures) == 2


def test_a_run_renamed_with_all_that_names_it(clean: Profile) -> None:
    write_lock(clean)
    for part in ("pretrain", "knn", "linear"):
        clean.edit(clean.record("isd", part), lambda tree: tree.update(run="better"))
    folder = clean.record("isd", "knn").parent
    folder.rename(folder.parent / "better")
    text = (clean.folder / "params.yaml").read_text("utf-8")
    text = text.replace("linear_runs: [isd]", "linear_runs: [better]").replace("  isd:\n", "  better:\n")
    (clean.folder / "params.yaml").write_text(text, encoding="utf-8")
    clean.report()
    answer = clean.verify()
    assert answer.code == 4
    assert {(f"{RECORDS}/isd/{part}.json", "file") for part in ("pretrain", "knn", "linear")} <= set(answer.failures)


def test_records_beside_the_lock(clean: Profile) -> None:
    lock = write_lock(clean)
    whole = lock.read_text("utf-8")
    lock.write_text(whole[: whole.index("  knn@moco")] + whole[whole.index("  pretrain@moco") :], encoding="utf-8")
    shutil.copytree(clean.record("moco", "knn").parent, clean.record("moco", "knn").parent.parent / "spare")
    clean.report()
    answer = clean.verify("--quick")
    assert answer.failures == [("dvc.lock", f"{RECORDS}/moco/knn.json")]
    assert answer.tree["notes"][0] == "records of spare, which is not a run in params.yaml, are not in any table"


@pytest.mark.parametrize(
    ("part", "change", "key"),
    [
        ("pretrain", lambda tree: tree["curve"][0].update(epoch=7), "curve's epochs"),
        ("pretrain", lambda tree: tree["provenance"].update(source="0" * 64), "sources"),
        ("knn", lambda tree: tree.update(protocol="1-NN of the best of ten searches"), "protocol"),
        ("linear", lambda tree: tree["settings"]["best_epoch"].update(student=99), "settings.best_epoch"),
        (
            "transfer",
            lambda tree: tree["evaluations"][0]["manifest"].update(dataset="CIFAR-10"),
            "cifar10-folder: manifest.dataset",
        ),
        ("transfer", lambda tree: tree["evaluations"][0].update(metric="mean-per-class"), "cifar10-folder: metric"),
        ("transfer", lambda tree: tree["evaluations"][0].update(protocol="fine-tuned"), "cifar10-folder: protocol"),
        ("trajectory", lambda tree: tree.update(protocol="9-NN"), "protocol"),
        (
            "trajectory",
            lambda tree: tree["points"][0]["scores"].append(tree["points"][0]["scores"][0]),
            "epoch 1: scores stated twice",
        ),
        (
            "trajectory",
            lambda tree: tree["points"][0]["scores"][0].update(correct=1, n=2),
            "epoch 1: queries of other groups",
        ),
    ],
)
def test_what_cannot_be(protocols: Profile, part: str, change: Callable[[dict[str, Any]], Any], key: str) -> None:
    protocols.edit(protocols.record("isd", part), change)
    answer = protocols.verify("--quick")
    assert answer.code == 4
    assert "isd" in caught(answer, f"{RECORDS}/isd/{part}.json", key)["runs"]


def test_scores_of_an_encoder_that_was_not_exported(clean: Profile) -> None:
    clean.edit(clean.record("moco", "pretrain"), lambda tree: tree.update(encoders=["student"]))
    one = caught(clean.verify(), f"{RECORDS}/moco/knn.json", "encoders with scores")
    assert (one["found"], one["expected"]) == ("['student', 'teacher']", "['student']")


def test_names_in_records_of_other_protocols_are_words(protocols: Profile) -> None:
    """No markup, no LaTeX and no formula comes out of them; `verify` refuses a set that is none of the project's."""
    name = "=1+1<script>alert(1)</script>\\input{x}|`$"
    for run in ("moco", "isd"):
        protocols.edit(protocols.record(run, "transfer"), lambda tree: tree["evaluations"][0]["manifest"].update(dataset=name))
    protocols.report()
    tables = protocols.folder / "reports/tiny/tables"
    page, latex, plain = ((tables / file).read_text("utf-8") for file in ("index.html", "table.tex", "table.md"))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "\\input{x}" not in latex
    assert "\\textbackslash" in latex
    assert "<script>alert" not in plain
    assert ",=1+1" not in (tables / "cells.csv").read_text("utf-8")
    assert not protocols.verify("--quick").tree["ok"]
