"""Few labels, transfer and snapshots: each number has a verdict, and no better one than what was done for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from isd_repro.records import write_record
from isd_repro.report import cards, page
from isd_repro.report.run_records import load
from isd_repro.runtime.progress import Progress
from isd_repro.verify import rendered
from isd_repro.verify.findings import Verification, VerifyOptions
from isd_repro.verify.numbers import Number, numbers_of
from tests.report.conftest import Profile
from tests.report.conftest import profile as profile
from tests.report.test_learning_curves import record as snapshots
from tests.report.test_protocols import both as both


def judged(profile: Profile) -> list[Number]:
    """As `verify --quick` judges the cells of a fresh page."""
    state = Verification(profile.params, profile.layout, VerifyOptions(quick=True), Progress(Console(quiet=True)))
    records = load(profile.params, profile.layout, state.problems.append)
    files = page.render(page.assemble(profile.params, records, profile.layout, state.problems.append))
    return numbers_of(state, records, rendered._cells(files["cells.json"]) or {})


def of(numbers: list[Number], run: str, *starts: str) -> dict[str, str]:
    """Verdicts of a run's own numbers by metric."""
    return {
        one.cell["metric"]: str(one.verdict) for one in numbers if one.runs == (run,) and one.cell["metric"].startswith(starts)
    }


def edit(profile: Profile, part: Any, change: Callable[[dict[str, Any]], object]) -> None:
    path = profile.layout.record("isd", part)
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), encoding="utf-8")


def test_few_labels_and_transfer_are_recomputed(both: Profile) -> None:
    found = of(judged(both), "isd", "few-", "transfer")
    assert {"few-10pct-last", "few-10pct-best-top5", "transfer", "transfer-food101", "transfer-pets"} <= found.keys()
    assert set(found.values()) == {"recomputed"}


def test_a_wrong_score_of_one_data_set_fails_it_and_the_mean(both: Profile) -> None:
    edit(both, "transfer", lambda tree: tree["evaluations"][0]["scores"][0].update(correct=35))
    found = judged(both)
    transfer = of(found, "isd", "transfer")
    assert transfer == {"transfer": "failed", "transfer-food101": "failed", "transfer-pets": "recomputed"}
    assert set(of(found, "isd", "few-", "1-NN").values()) == set(of(found, "moco", "transfer").values()) == {"recomputed"}


def test_a_wrong_few_label_score_fails_alone(both: Profile) -> None:
    edit(both, "few_label", lambda tree: tree["scores"][0].update(correct=tree["scores"][0]["correct"] + 1))
    found = of(judged(both), "isd", "few-", "transfer", "1-NN")
    assert [metric for metric, verdict in found.items() if verdict == "failed"] == ["few-10pct-last"]


def test_snapshots_are_recorded_only_but_for_the_last(profile: Profile) -> None:
    record = snapshots(profile)
    write_record(profile.layout.record("isd", "trajectory"), record)
    found = [one for one in judged(profile) if one.cell["kind"] == "snapshot"]
    first = [score for point in record.points for score in point.scores if score.metric == record.points[0].scores[0].metric]
    assert len(found) == len(first)
    last = {str(one.verdict) for one in found if one.place[3] == "10"}
    before = {str(one.verdict) for one in found if one.place[3] != "10"}
    assert (last, before) == ({"recomputed"}, {"recorded only"})


@pytest.mark.parametrize(("key", "others"), [("correct", "failed"), ("epoch", "recomputed")])
def test_a_last_snapshot_of_another_score_or_epoch_fails(profile: Profile, key: str, others: str) -> None:
    """Where it is the score, the run's own record may be the wrong one of the two."""
    write_record(profile.layout.record("isd", "trajectory"), snapshots(profile))
    node: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: (  # noqa: E731
        tree["points"][-1]["scores"][0] if key == "correct" else tree["points"][-1]
    )
    edit(profile, "trajectory", lambda tree: node(tree).update({key: node(tree)[key] + 1}))
    found = judged(profile)
    assert not [one for one in found if one.cell["kind"] == "snapshot"], "a fresh page shows none of them"
    assert {str(one.verdict) for one in found if one.cell["kind"] == "score" and one.runs == ("isd",)} == {others}


def test_a_card_has_every_protocol(both: Profile) -> None:
    card = cards.render(both.params, both.records(), both.layout)["isd.md"].decode()
    for words in (
        "10 % of labels, last epoch |",
        "10 % of labels, last epoch, top-5 |",
        "transfer to Food-101, top-1 |",
        "Oxford-IIIT Pets, mean per class |",
    ):
        assert f"| student | {words}" in card or f"to {words}" in card
    sets = both.records().runs["isd"].targets.get("transfer")
    assert sets is not None
    mean = sets.record.evaluations[1].mean_per_class["student/transfer"]
    assert f"mean per class | all | {mean:.1f} |" in card


def test_a_page_says_what_it_cost(profile: Profile) -> None:
    """Three other runs' 83.5 s and 4.2 s and this one's on two threads."""
    files = profile.files()
    hours = f"{2 * 4 * (83.5 + 4.2) / 3600:.3f}"
    assert files == profile.files()
    assert f"<td>{hours}</td>" in files["index.html"].partition('<h2 id="cost">')[2]
    assert f"| {hours} |" in files["table.md"].partition("## Cost")[2]
