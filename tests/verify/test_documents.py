"""This repository: its reports are what its records give, and its documents say nothing that is not so."""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from isd_repro import cli
from isd_repro.config import reader as config
from isd_repro.records import EvaluationRecord, PretrainRecord, read_record

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
DEVIATIONS = (ROOT / "DEVIATIONS.md").read_text("utf-8")
CHECKLIST = (ROOT / "docs" / "reproducibility.md").read_text("utf-8")


def row(number: int) -> list[str]:
    """The cells of one deviation."""
    line = next(line for line in DEVIATIONS.splitlines() if line.startswith(f'| <a id="dev-{number:02d}"></a>'))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def cited(paths: list[Path]) -> set[str]:
    return {one for path in paths for one in re.findall(r"\bDEV-\d+\b", path.read_text("utf-8"))}


def test_every_deviation_is_cited_where_it_applies_and_every_cited_one_exists() -> None:
    described = set(re.findall(r'<a id="dev-\d+"></a>(DEV-\d+)', DEVIATIONS))
    in_code = cited(sorted((ROOT / "isd_repro").rglob("*.py")))
    assert in_code <= described
    shown = set()
    for path in PROFILES:
        params, _ = config.load(path)
        notes = [*params.report.notes, *(note for run in params.runs.values() for note in run.notes)]
        listed = {one for note in notes for one in re.findall(r"\bDEV-\d+\b", note)}
        assert listed <= described, path
        assert "DEV-04" in listed, f"{path}: every profile has nearest neighbours"
        assert ("DEV-05" in listed) == bool(params.linear_runs), path
        assert ("DEV-18" in listed) == bool(params.few_label_runs), path
        assert ({"DEV-19", "DEV-20"} <= listed) == bool(params.transfer_runs), path
        for name, run in params.runs.items():
            assert any("DEV-24" in note for note in run.notes) == (run.numerics.engine == "fast"), f"{path}: {name}"
        shown |= listed
    assert described - in_code - shown - cited(PROFILES) == set(), "cited nowhere"
    everywhere = {"DEV-28"}  # of every evaluation
    assert described - shown - everywhere - {"DEV-23", "DEV-24"} == set(), "no page shows it"


def test_the_effect_of_the_best_epoch_is_that_of_the_records() -> None:
    """DEV-05, over every encoder of the demo's linear records, all queries."""
    gains = []
    for path in sorted((ROOT / "reports" / "demo" / "records").glob("*/linear.json")):
        record = read_record(path, EvaluationRecord)
        top1 = {(score.encoder, score.metric): score.top1 for score in record.scores if score.group == "all"}
        gains += [
            top1[encoder, "linear-best"] - top1[encoder, "linear-last"] for encoder, metric in top1 if metric == "linear-last"
        ]
    said = f"best less last is {min(gains):.1f} to {max(gains):.1f} points"
    assert f"{said}, {statistics.fmean(gains):.1f} on average over {len(gains)} heads" in row(5)[4]


def test_the_minutes_of_the_narrow_network_are_those_of_the_records() -> None:
    """DEV-16, and the notes of the page."""
    folder = ROOT / "reports" / "tiny-imagenet-unbalanced" / "records"
    seconds = {run: read_record(folder / run / "pretrain.json", PretrainRecord).provenance.seconds for run in ("isd", "moco")}
    assert f"{seconds['isd']:,.0f} s (ISD) and {seconds['moco']:,.0f} s (MoCo v2)" in row(16)[3]
    assert max(seconds.values()) < 3600
    assert "under an hour of training on one core" in " ".join(
        (ROOT / "pipelines/tiny-imagenet-unbalanced/params.yaml").read_text("utf-8").split()
    )


def test_the_logits_of_the_first_step_are_as_calculated() -> None:
    """DEV-03: cosines of random unit vectors have deviation D^-1/2; `reference` rows have norm (D / K)^1/2."""
    d, k, tau = 512, 128_000, 0.02
    unit = d**-0.5 / tau
    said = row(3)
    assert f"{unit * (d / k) ** 0.5:.2f} with `reference` and {unit:.2f} with `unit`" in said[4]
    assert f"sqrt(D / K) = {(d / k) ** 0.5:.3f}" in said[2]


# --- the checklist ------------------------------------------------------------------------------------------------------


def quoted() -> Iterator[str]:
    """What stands between backticks in the checklist."""
    yield from re.findall(r"`([^`\n]+)`", CHECKLIST)


def exists(name: str) -> bool:
    pattern = re.sub(r"<[a-z]+>", "*", name)
    return any(ROOT.glob(pattern)) if "*" in pattern else (ROOT / pattern).exists()


def test_every_path_of_the_checklist_exists() -> None:
    paths = [
        name
        for name in quoted()
        if re.fullmatch(r"[\w.<>*/-]+", name) and ("/" in name or re.search(r"\.(md|yaml|toml|lock|cff)$", name))
    ]
    assert len(paths) > 20
    missing = [name for name in paths if not exists(name)]
    assert not missing
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", CHECKLIST):
        assert (ROOT / "docs" / target).resolve().exists(), target


def commands() -> list[str]:
    return [name for name in quoted() if name.split()[0] in {"isd-repro", "make", "dvc"}]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_checklist_exists(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
    elif program == "dvc":
        from dvc.cli import parse_args

        assert parse_args(arguments).cmd
    else:
        group: Any = typer.main.get_command(cli.app)
        assert arguments[0] in group.commands
        group.commands[arguments[0]].make_context(arguments[0], arguments[1:])


def test_every_question_of_the_checklist_has_an_answer_and_a_place_that_shows_it() -> None:
    rows = [line for line in CHECKLIST.splitlines() if line.startswith("|") and not re.match(r"^\|[:\s|-]+\|$", line)]
    body = [re.split(r"(?<!\\)\|", line)[1:-1] for line in rows if not line.startswith("| Question")]
    assert len(body) > 15
    for question, answer, shown in body:
        assert question.strip().endswith("?"), question
        assert re.match(r"\s*(Yes|Partly|No)\b", answer), question
        assert "`" in shown or "](" in shown, question


def test_the_findings_of_the_claim_are_those_of_its_pages() -> None:
    """What is set apart is a sentence of a page, and no number with a decimal stands on no page."""
    text = (ROOT / "reports" / "claim" / "FINDINGS.md").read_text("utf-8")
    pages = [ROOT / "reports" / profile / "tables" for profile in ("claim-r", "claim-tuning")]
    said = {one for page in pages for one in json.loads((page / "cells.json").read_text("utf-8"))["findings"]}
    quoted = [" ".join(re.sub(r"(?m)^> ", "", part).split()) for part in re.findall(r"(?m)(?:^> .*\n)+", text)]
    assert quoted
    assert set(quoted) <= said
    known = "".join((page / "table.md").read_text("utf-8") for page in pages)
    known += (ROOT / "reports" / "claim" / "PROTOCOL.md").read_text("utf-8")
    numbers = set(re.findall(r"(?<![\d.])[+\N{MINUS SIGN}]?\d+\.\d+", text))
    assert {one for one in numbers if not re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", known)} == set()


def test_the_findings_of_the_second_protocol_have_the_numbers_of_its_pages() -> None:
    folder = ROOT / "reports" / "claim-2"
    text = (folder / "FINDINGS.md").read_text("utf-8")
    known = "".join((folder / name).read_text("utf-8") for name in ("gate.md", "PROTOCOL.md"))
    numbers = set(re.findall(r"(?<![\d.])[+-]?\d+\.\d+", text))
    assert len(numbers) > 10
    assert {one for one in numbers if not re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", known)} == set()


# --- the reports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_a_clean_checkout_verifies(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["isd-repro", "verify", "--quick", "--json", "--params", str(path)])
    code: object = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["failures"] == []
    assert (code, tree["ok"], tree["counts"]["failed"]) == (0, True, 0)
    records = list((ROOT / "reports" / tree["profile"] / "records").glob("*/knn.json"))
    assert bool(tree["numbers"]) == bool(records)
    assert {number["verdict"] for number in tree["numbers"]} <= {"recomputed", "recorded only"}
