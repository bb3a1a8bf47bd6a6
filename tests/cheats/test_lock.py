"""A lock that was taken away or damaged so that it witnesses nothing."""

from __future__ import annotations

import pytest

from tests.verify import world
from tests.verify.world import RECORDS, Profile, write_lock


def test_changed_predictions_are_caught_by_the_lock(clean: Profile) -> None:
    write_lock(clean)
    answer = clean.verify("--quick")
    assert answer.code == 0
    assert answer.tree["checks"]["dvc.lock"]["proved"] == 1
    clean.edit(clean.record("moco", "knn"), lambda tree: world.swap_wrong(tree, "teacher/5-NN"))
    clean.report()
    clean.verify("--quick").failed("dvc.lock", f"{RECORDS}/moco/knn.json", "md5 of the file")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (None, "file"),
        ("", "form"),
        ("schema: '2.0'\n", "form"),
        ("schema: '2.0'\nstages:\n<<<<<<< ours\n  a: {}\n=======\n  b: {}\n>>>>>>> theirs\n", "form"),
        ("schema: '2.0'\nstages: {}\n", f"{RECORDS}/moco/knn.json"),
        ("schema: '2.0'\nstages:\n  knn@moco:\n    outs:\n    - hash: md5\n", "form"),
        (b"\xff\xfe\x00", "form"),
    ],
)
def test_a_lock_that_witnesses_nothing(clean: Profile, content: str | bytes | None, key: str) -> None:
    lock = write_lock(clean)
    lock.unlink()
    if content is not None:
        lock.write_bytes(content.encode() if isinstance(content, str) else content)
    answer = clean.verify("--quick")
    one = answer.failed("dvc.lock", "dvc.lock", key)
    assert "dvc commit" in one["do"]
    assert answer.verdicts() == {"recomputed"}, "the numbers themselves are what their records say"


def test_one_output_without_a_hash(clean: Profile) -> None:
    write_lock(clean, without=f"{RECORDS}/moco/knn.json")
    clean.verify("--quick").failed("dvc.lock", "dvc.lock", f"{RECORDS}/moco/knn.json")


def test_a_profile_without_dvc_says_that_it_has_no_witness(clean: Profile) -> None:
    answer = clean.verify("--quick")
    assert answer.code == 0
    assert answer.tree["checks"]["dvc.lock"]["not checked"] == 1
    assert "no dvc.yaml" in answer.tree["checks"]["dvc.lock"]["reasons"][0]
