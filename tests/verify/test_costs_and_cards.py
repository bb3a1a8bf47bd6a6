"""Hours of every attempt, and cards that say what the records say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isd_repro.records import Attempt
from isd_repro.report import cards, costs, run_records
from isd_repro.report.run_records import Records
from tests.report import synthetic
from tests.report.conftest import Profile, make
from tests.report.test_protocols import both as both


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return make(tmp_path)


def tried(seconds: float, outcome: str, device: str) -> Attempt:
    """One attempt as a record lists it."""
    steps = {"started": "2026-01-01T00:00:00+00:00", "first_step": 0, "last_step": 1}
    return Attempt.model_validate({**steps, "seconds": seconds, "outcome": outcome, "device": device})


def with_attempts(profile: Profile, run: str, *attempts: Attempt) -> Records:
    loaded = profile.records()
    found = loaded.runs[run]
    assert found.pretrain is not None
    listed = replace(found, pretrain=found.pretrain.model_copy(update={"attempts": attempts}))
    return replace(loaded, runs={**loaded.runs, run: listed})


def test_failed_and_killed_attempts_count(profile: Profile) -> None:
    listed = (
        tried(1000.0, "killed", "Some GPU"),
        tried(200.0, "failed", "cpu"),
        tried(600.0, "stopped", "Some GPU"),
        tried(3600.0, "finished", "Some GPU"),
    )
    shown = costs.table(costs.of_profile(profile.params, with_attempts(profile, "moco", *listed)))
    rows = {row[:3]: row[3:] for row in shown.rows}
    assert rows["MoCo v2", "pretrain", "killed"] == ("1", "Some GPU", "16 min 40 s", "0.556", "0.278")
    assert rows["MoCo v2", "pretrain", "failed"] == ("1", "Some CPU @ 2.10GHz", "3 min 20 s", "0.111", "0")
    assert rows["ISD", "knn", "finished"] == ("1", "Some CPU @ 2.10GHz", "4.2 s", "0.002", "0")  # on two threads
    assert "2 attempts failed or were killed: 20 min 00 s." in shown.notes
    # three other runs of 83.5 s, all four scored in 4.2 s, and MoCo's four attempts
    hours = f"{2 * (3 * 83.5 + 4 * 4.2 + 5400) / 3600:.3f}", f"{5200 / 3600:.3f}"
    assert rows["All", "", ""] == ("11", "", "1 h 34 min", *hours)
    assert {len(row) for row in shown.rows} == {len(shown.heads)}


# --- cards --------------------------------------------------------------------------------------------------------------


def rendered(profile: Profile) -> dict[str, str]:
    files = cards.render(profile.params, profile.records(), profile.layout)
    return {name: content.decode() for name, content in files.items()}


def test_every_exported_encoder_has_a_card(profile: Profile) -> None:
    assert set(rendered(profile)) == {"untrained.md", "pixels.md", "moco.md", "isd.md", "README.md", "render.json"}
    assert "byol" not in rendered(profile)["README.md"], "it has not been run"


def test_a_card_says_what_the_record_says(profile: Profile) -> None:
    card, found = rendered(profile)["isd.md"], profile.records().runs["isd"]
    assert found.pretrain is not None
    assert found.own.get("knn") is not None
    for value in (synthetic.sha("encoder", "isd"), synthetic.sha("manifest", "small"), found.pretrain.fingerprint, "5" * 40):
        assert value in card
    for (encoder, metric, group), score in found.own["knn"].scores.items():
        row = f"| {encoder} | {metric} | {group} | {100 * score.correct / score.n:.1f} |"
        line = next(line for line in card.splitlines() if line.startswith(row))
        assert line.endswith(f"| {score.n} | recomputed from stored predictions |")
    assert (
        "1,040 training images, 100 labelled images (search set, and training set of the classifier), 500 queries, 10 classes,"
        " 2 of them large" in card
    )
    assert "[DEV-03](../../../DEVIATIONS.md#dev-03)" in card
    for heading in (
        "## Scores",
        "## Images",
        "## How it was made",
        "### Cost",
        "## Use",
        "**Intended for**",
        "**Not intended for**",
    ):
        assert heading in card


def test_what_nothing_checks_is_named_in_the_card(profile: Profile) -> None:
    path = profile.layout.record("isd", "knn")
    tree = json.loads(path.read_text("utf-8"))
    del tree["predictions"]["student/1-NN"]
    path.write_text(json.dumps(tree), encoding="utf-8")
    card = rendered(profile)["isd.md"]
    assert re.search(r"^\| student \| 1-NN \| all \|.*\| recorded only \|$", card, flags=re.MULTILINE)
    assert "Scores marked `recorded only` cannot be checked." in card


def test_cards_are_byte_equal_on_a_second_render_and_rectangular(profile: Profile) -> None:
    first = rendered(profile)
    assert rendered(make(profile.layout.root / "again")).keys() == first.keys()
    assert rendered(make(profile.layout.root / "again")) == first
    for name, content in first.items():
        for block in re.findall(r"(?:^\|.*\|\n)+", content, flags=re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, f"{name}: {block}"


def test_the_command_of_a_card_is_one(profile: Profile) -> None:
    import typer

    from isd_repro.cli import app

    group: Any = typer.main.get_command(app)
    for run, which in (("isd", "both"), ("untrained", "student")):
        block = re.search(r"```sh\n(.*)\n```", rendered(profile)[f"{run}.md"])
        assert block
        program, command, *arguments = shlex.split(block[1])
        assert (program, command) == ("isd-repro", "evaluate")
        options = group.commands["evaluate"].make_context("evaluate", list(arguments)).params
        assert options["which"] == which
        assert str(options["ckpt"]) == f"runs/{run}/encoder.safetensors"
        assert str(options["prepared"]) == "data/prepared/small"


def test_no_cards_without_runs(tmp_path: Path) -> None:
    params = synthetic.profile({"isd": ("ISD", "small")}, {"small": {"name": "balanced", "per_class": 5}})
    layout = synthetic.layout(tmp_path, params)
    found = cards.render(params, run_records.load(params, layout), layout)
    assert set(found) == {"README.md", "render.json"}
    assert b"No run has exported an encoder yet." in found["README.md"]


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
