"""A rule that was changed after the runs, and what git can say of one that was not."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.params import Hypothesis
from isd_repro.report import run_records
from isd_repro.runtime.progress import Progress
from isd_repro.verify import commits
from isd_repro.verify.findings import State, Verification, VerifyOptions

ROOT = Path(__file__).parents[2]
FILE = ROOT / "pipelines/claim-r/params.yaml"


def finding(**change: object) -> tuple[State, str]:
    """What the check says of `claim-r`, its rule changed as an author might who knows the result."""
    params, layout = config.load(FILE)
    records = run_records.load(params, layout)
    asked = params.report.hypothesis
    assert asked
    changed = Hypothesis.model_validate({**asked.model_dump(mode="json"), **change})
    params = params.model_copy(update={"report": params.report.model_copy(update={"hypothesis": changed})})
    state = Verification(params, layout, VerifyOptions(), Progress(Console(quiet=True)))
    commits.check_rule(state, records)
    (one,) = state.findings
    assert bool(state.problems) == (one.state is State.FAILED)
    return one.state, one.why


def test_the_rule_of_the_first_protocol_was_there_before_its_runs() -> None:
    assert finding() == (State.PROVED, "")


@pytest.mark.parametrize("change", [{"contradicted_below": -10.0}, {"group": "all"}, {"k": 20}, {"draws": 2}])
def test_a_rule_changed_afterwards_is_not_that_commits(change: dict[str, object]) -> None:
    assert finding(**change)[0] is State.FAILED
    state, why = finding(**change, registered=None)
    assert state is State.NOT_CHECKED
    assert "in no commit, so it cannot be known when it was set" in why


def test_another_commit_than_the_first_is_refused() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert finding(registered=head)[0] is State.FAILED


def test_outside_git_that_is_said(tmp_path: Path) -> None:
    params, layout = config.load(FILE)
    state = Verification(params, replace(layout, root=tmp_path), VerifyOptions(), Progress(Console(quiet=True)))
    commits.check_rule(state, run_records.load(params, layout))
    assert [(one.state, "no checkout" in one.why) for one in state.findings] == [(State.NOT_CHECKED, True)]
