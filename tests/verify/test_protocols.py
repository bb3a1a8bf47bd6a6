"""Few labels, transfer and snapshots: each number has a verdict, and no better one than what was done for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from isd_repro.records import write_record
from isd_repro.report.run_records import load
from isd_repro.runtime.progress import Progress
from isd_repro.verify.findings import Verification, VerifyOptions
from isd_repro.verify.rendered import Number, check_rendered
from tests.report.conftest import Profile
from tests.report.conftest import profile as profile
from tests.report.test_learning_curves import record as snapshots
from tests.report.test_protocols import both as both


def judged(profile: Profile) -> list[Number]:
    """As `verify --quick` judges the cells of a fresh page."""
    state = Verification(profile.params, profile.layout, VerifyOptions(quick=True), Progress(Console(quiet=True)))
    records = load(profile.params, profile.layout, state.problems.append)
    return check_rendered(state, records)


def of(numbers: list[Number], run: str, *starts: str) -> dict[str, str]:
    """Verdicts of a run's own numbers by metric."""
    return {
        one.cell["metric"]: str(one.verdict) for one in numbers if one.runs == (run,) and one.cell["metric"].startswith(starts)
    }


def edit(profile: Profile, part: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = profile.layout.record("isd", part)
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def test_a_wrong_score_of_one_data_set_fails_it_and_the_mean(both: Profile) -> None:
    found = of(judged(both), "isd", "few-", "transfer")
    assert {"few-10pct-last", "few-10pct-best-top5", "transfer", "transfer-food101", "transfer-pets"} <= found.keys()
    assert set(found.values()) == {"recomputed"}
    edit(both, "transfer", lambda tree: tree["evaluations"][0]["scores"][0].update(correct=35))
    judgement = judged(both)
    transfer = of(judgement, "isd", "transfer")
    assert transfer == {"transfer": "failed", "transfer-food101": "failed", "transfer-pets": "recomputed"}
    assert set(of(judgement, "isd", "few-", "1-NN").values()) == set(of(judgement, "moco", "transfer").values()) == {"recomputed"}


@pytest.mark.parametrize(("key", "others"), [("correct", "failed"), ("epoch", "recomputed")])
def test_a_last_snapshot_of_another_score_or_epoch_fails(profile: Profile, key: str, others: str) -> None:
    """Where it is the score, the run's own record may be the wrong one of the two."""
    write_record(profile.layout.record("isd", "trajectory"), snapshots(profile))
    node: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: (  # noqa: E731
        tree["points"][-1]["scores"][0] if key == "correct" else tree["points"][-1]
    )
    edit(profile, "trajectory", lambda tree: node(tree).update({key: node(tree)[key] + 1}))
    found = judged(profile)
    assert {str(one.verdict) for one in found if one.cell["kind"] == "snapshot"} == {"failed"}
    assert {str(one.verdict) for one in found if one.cell["kind"] == "score" and one.runs == ("isd",)} == {others}
