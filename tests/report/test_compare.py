"""`compare`: every number of two results, the margin that it is judged by, and what else differs."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from isd_repro import compare
from isd_repro.report import page
from isd_repro.runtime.errors import DataError
from tests.report import synthetic
from tests.report.conftest import Profile, make


def tree(profile: Profile) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.render(profile.report())["cells.json"])
    return found


def moved(profile: Profile, accuracy: float) -> None:
    """Another result of ISD."""
    synthetic.write_run(profile.layout, profile.params, "isd", accuracy, seed=7)


def wilson(correct: int, n: int) -> float:
    """Half of Wilson's interval in percent, from the formula (Wilson 1927)."""
    z, p = 1.959963984540054, correct / n
    return 100 * z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def test_a_result_agrees_with_itself(profile: Profile) -> None:
    found = compare.compared("itself", tree(profile), tree(profile))
    assert found.agree
    assert {pair.state for pair in found.numbers} == {"equal"}
    assert (found.circumstances, found.conclusions) == ((), ())


def test_every_number_is_judged_by_the_stated_intervals(profile: Profile) -> None:
    theirs = tree(profile)
    moved(profile, 0.77)
    ours = tree(profile)
    found = {pair.where: pair for pair in compare.compared("before", ours, theirs).numbers}
    pair = found["small-student, ISD, All, 1-NN"]
    cells = [
        next(
            cell
            for cell in side["cells"]
            if (cell["table"], cell["row"], cell["metric"], cell["group"]) == ("small-student", "ISD", "1-NN", "all")
        )
        for side in (ours, theirs)
    ]
    halves = [wilson(cell["correct"], cell["n"]) for cell in cells]
    assert pair.margin == pytest.approx(math.hypot(*halves), abs=1e-3)
    assert pair.difference == pytest.approx(100 * (cells[0]["correct"] / 500 - cells[1]["correct"] / 500), abs=1e-3)
    assert pair.state == ("within" if abs(pair.difference or 0) <= (pair.margin or 0) else "outside")
    assert found["small-student, MoCo v2, All, 1-NN"].state == "equal"


def test_a_changed_conclusion_is_named(profile: Profile) -> None:
    theirs = tree(profile)
    moved(profile, 0.95)
    found = compare.compared("before", tree(profile), theirs)
    assert not found.agree
    assert any(pair.state == "outside" for pair in found.numbers)
    (change,) = [one for one in found.conclusions if "ISD \N{MINUS SIGN} MoCo" in one.what and "All" in one.what]
    assert (change.ours, change.theirs) == ("above 0", "below 0")


def test_a_verdict_that_changes_is_a_conclusion(profile: Profile) -> None:
    ours, theirs = tree(profile), tree(profile)
    lead = "ISD above MoCo v2 on rare queries (1-NN, student)"
    ours["findings"] = [f"{lead}: supported: +2.00 points on average over 8 of 8 draws."]
    theirs["findings"] = [f"{lead}: undecided: +1.00 points on average over 8 of 8 draws."]
    (change,) = compare.compared("before", ours, theirs).conclusions
    assert (change.what, change.ours, change.theirs) == (lead, "supported", "undecided")


def test_means_are_judged_over_their_seeds(profile: Profile) -> None:
    """Half of Student's interval over 3 seeds: 4.302653 s / sqrt(3)."""
    ours, theirs = tree(profile), tree(profile)
    mean = {**ours["cells"][0], "kind": "mean", "row": "ISD, 3 seeds", "low": None, "high": None, "count": 3, "best": False}
    ours["cells"].append({**mean, "value": 70.0, "deviation": 1.0})
    theirs["cells"].append({**mean, "value": 73.0, "deviation": 0.5})
    pair = next(one for one in compare.compared("before", ours, theirs).numbers if "3 seeds" in one.where)
    assert pair.margin == pytest.approx(4.302653 * math.hypot(1.0, 0.5) / math.sqrt(3), abs=1e-3)
    assert pair.state == "outside"


def test_what_else_differs_is_named(profile: Profile) -> None:
    ours, theirs = tree(profile), tree(profile)
    for run in theirs["runs"].values():
        for part in run["parts"].values():
            part["machine"] |= {"cpu": "Another CPU", "threads": 8}
    theirs["runs"]["isd"]["config"]["optim"]["epochs"] = 20
    theirs["runs"]["more"] = theirs["runs"].pop("byol")
    found = {change.what: change for change in compare.compared("before", ours, theirs).circumstances}
    assert set(found) == {"machine", "threads", "parameter optim.epochs", "runs only ours", "runs only theirs"}
    assert (found["threads"].ours, found["threads"].theirs, found["threads"].runs) == (
        "2",
        "8",
        ("isd", "moco", "pixels", "untrained"),
    )
    assert (found["parameter optim.epochs"].ours, found["parameter optim.epochs"].theirs) == ("10", "20")
    assert found["runs only theirs"].runs == ("more",)


def test_the_command_takes_a_commit_or_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = make(tmp_path)
    for name, content in page.render(profile.report()).items():
        (profile.layout.report / name).parent.mkdir(parents=True, exist_ok=True)
        (profile.layout.report / name).write_bytes(content)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    for other in ("HEAD", str(tmp_path), str(profile.layout.report), str(profile.layout.report / "cells.json")):
        compare.compare(other, profile.params, profile.layout, as_json=False)
        assert "the same machine, threads, code and parameters" in capsys.readouterr().out
    moved(profile, 0.95)
    with pytest.raises(DataError, match=r"numbers differ by more than their margin and \d+ conclusions? changes?"):
        compare.compare("HEAD", profile.params, profile.layout, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert not said["agree"]
    assert said["counts"]["outside"] == sum(one["state"] == "outside" for one in said["numbers"]) > 0
    with pytest.raises(DataError, match="differ by more"):
        compare.compare("HEAD", profile.params, profile.layout, as_json=False)
    assert "conclusion changes: small-differences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "found JSONDecodeError"),
        (b'{"format": 1}', "found format 1"),
        (b"[]", "found TypeError"),
        (b'{"format": 2, "cells": [], "runs": {}}', "found KeyError: 'findings'"),
    ],
)
def test_what_is_no_result_is_refused(profile: Profile, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "cells.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        compare.compare(str(path), profile.params, profile.layout, as_json=False)


def test_what_is_not_there_is_refused(profile: Profile, tmp_path: Path) -> None:
    for other, words in (("no-such-commit", "is not a folder, and git says"), (str(tmp_path), "contains no cells.json")):
        with pytest.raises(DataError, match=words):
            compare.compare(other, profile.params, profile.layout, as_json=False)
