"""Wrong answers turned right, with another processor as the excuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.records import pack_labels, unpack_labels
from isd_repro.runtime.progress import Progress
from isd_repro.verify import again
from isd_repro.verify.findings import State, Verification, VerifyOptions
from tests.verify.world import RECORDS, Profile, write_lock


def one_right(tree: dict[str, Any]) -> None:
    """The first wrong answer of the student's 5-NN made right, and everything counted again."""
    key = "student/5-NN"
    predicted, label = unpack_labels(tree["predictions"][key]), unpack_labels(tree["labels"])
    at = int(np.flatnonzero(predicted != label)[0])
    predicted[at] = label[at]
    tree["predictions"][key] = pack_labels(predicted)
    large = tree["manifest"]["classes"][int(label[at])] in tree["manifest"]["large"]
    for score in tree["scores"]:
        if (score["encoder"], score["metric"]) == ("student", "5-NN") and score["group"] in ("all", "large" if large else "rare"):
            score["correct"] += 1
    tree["provenance"]["machine"]["cpu"] = "Another processor"


def test_a_clear_answer_is_not_changed_by_another_machine(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "TOLERATED", 1 / 30)  # as 0.5 % is of more queries
    profile.edit(profile.record("isd", "knn"), one_right)
    write_lock(profile)
    profile.report()
    answer = profile.verify("--run", "isd")
    (one,) = answer.tree["failures"]
    assert one["file"] == f"{RECORDS}/isd/knn.json"
    assert "1 of 30 predictions differ, of which 1 are no near ties" in one["expected"]
    assert answer.verdicts(run="isd", encoder="student", metric="5-NN", kind="score") == {"failed"}


def test_near_ties_are_told_with_their_direction(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "TOLERATED", 1 / 30)
    monkeypatch.setattr(again, "NOISE", 10.0)  # every answer is a near tie
    profile.edit(profile.record("isd", "knn"), one_right)
    write_lock(profile)
    profile.report()
    answer = profile.verify("--run", "isd")
    assert answer.code == 0
    assert answer.tree["checks"]["predictions of another machine"]["reasons"] == [
        "recorded only (profile): 1 predictions differ here: 1 stored ones are better, 0 worse"
    ]


@pytest.mark.parametrize(
    ("flips", "state"), [((20, 12, 0), State.FAILED), ((20, 8, 6), State.RECORDED), ((3, 3, 0), State.RECORDED)]
)
def test_near_ties_that_all_help_are_no_rounding(clean: Profile, flips: tuple[int, int, int], state: State) -> None:
    params, layout = config.load(clean.folder / "params.yaml")
    found = Verification(params, layout, VerifyOptions(), Progress(Console(quiet=True)))
    found.flips.append(flips)
    again.check_flips(found)
    assert [one.state for one in found.findings] == [state]
    assert bool(found.problems) == (state is State.FAILED)
