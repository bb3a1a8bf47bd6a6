"""The reviewers' views: the specification is golden, needs no network, and is sent once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.params import Tracking
from isd_repro.runtime.errors import UserError
from isd_repro.stages.dashboard import dashboard, facts_of
from isd_repro.tracking import session
from isd_repro.tracking.dashboard import Facts, build
from tests.report.conftest import make
from tests.tracking.server import Server

GOLDEN = Path(__file__).with_name("dashboard.json")
FACTS = Facts(
    profile="demo",
    title="Demo",
    results="| Run | All |\n|:---|---:|\n| ISD | 62.0 |",
    failures="Every run of this profile has all its records.",
    cost="| Run | pretrain |\n|:---|---:|\n| ISD | 1 h |",
    groups=("all", "rare"),
    encoders=("student", "teacher"),
    neighbours=(1, 20),
)


def text_of(specification: dict[str, Any]) -> str:
    return json.dumps(specification, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_specification_is_golden(request: pytest.FixtureRequest) -> None:
    found = text_of(build(FACTS, Tracking()))
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(found, encoding="utf-8")
    assert GOLDEN.read_text("utf-8") == found, "pytest tests/tracking/test_dashboard.py --update-golden writes it anew"
    assert text_of(build(FACTS, Tracking())) == found


def panels(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [panel for each in node for panel in panels(each)]
    if isinstance(node, dict):
        own = [node] if "viewType" in node else []
        return own + [panel for each in node.values() for panel in panels(each)]
    return []


def test_the_panels_draw_what_stages_log(finished: Path) -> None:
    """Every key that a panel asks for is a key of some row, picture or table of the real stages."""
    params, layout = config.load(finished / "params.yaml")
    specification = build(facts_of(params, layout), params.tracking)
    asked: set[str] = set()
    for panel in panels(specification):
        asked |= {*panel["config"].get("metrics", []), *panel["config"].get("mediaKeys", [])}
    logged = {"seconds"}
    for path in [layout.metrics("isd"), *finished.rglob("runs/.log/**/metrics.jsonl")]:
        for line in path.read_text("utf-8").splitlines():
            logged |= set(json.loads(line))
    logged |= {f"images/{path.stem}" for path in finished.rglob("*.png")}
    assert asked
    of_figures = {"images/anchors", "images/clusters"}  # `figures` draws them where it is asked to
    assert asked <= logged | {"student/1-NN/rare"} | of_figures, asked - logged
    assert {"loss", "spread", "gap", "purity", "teacher/top1", "student/1-NN/all"} <= asked


def test_the_report_holds_the_tables_failures_and_cost(tmp_path: Path) -> None:
    """Of five runs one has no record, and only two have a teacher."""
    made = make(tmp_path)
    facts = facts_of(made.params, made.layout)
    assert (facts.groups, facts.encoders) == (["all", "rare"], ("student", "teacher"))
    assert "| ISD |" in facts.results
    assert "](scores-" not in facts.results
    assert "- BYOL" in facts.failures
    assert "no pretrain and knn record" in facts.failures
    assert "- ISD" not in facts.failures
    assert sum(line.startswith("| ") for line in facts.cost.splitlines()) == 1 + len(made.params.runs)
    assert "not run" in next(line for line in facts.cost.splitlines() if "BYOL" in line)
    grid = build(facts, made.params.tracking)
    bars = [panel for panel in panels(grid["report"]) if panel["viewType"] == "Bar Chart"]
    assert bars[0]["config"]["metrics"] == ["student/1-NN/all", "student/1-NN/rare"]
    assert made.params.report.title == grid["report"]["displayName"]


def test_a_dry_run_asks_no_server(finished: Path, tmp_path: Path, online: Server) -> None:
    params, layout = config.load(finished / "params.yaml")
    for name in ("one.json", "other.json"):
        dashboard(params, layout, tmp_path / name, anonymous=False, console=Console(quiet=True))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert online.requests == []


def test_what_is_sent_is_what_a_dry_run_writes_and_a_second_time_it_is_renewed(
    profile: Path, tmp_path: Path, online: Server
) -> None:
    params, layout = config.load(profile / "params.yaml")
    dashboard(params, layout, tmp_path / "spec.json", anonymous=False, console=Console(quiet=True))
    for _ in range(2):
        dashboard(params, layout, None, anonymous=False, console=Console(quiet=True))
    wanted = json.loads((tmp_path / "spec.json").read_text("utf-8"))
    assert [(view["name"], view["type"]) for view in online.views] == [
        (wanted[part]["name"], wanted[part]["type"]) for part in wanted
    ]
    assert [json.loads(view["spec"]) for view in online.views] == [view["spec"] for view in wanted.values()]
    assert {view["projectName"] for view in online.views} == {"isd-repro"}


def test_a_dashboard_that_cannot_be_sent_says_so(profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = config.load(profile / "params.yaml")
    monkeypatch.setattr(session, "INIT_TIMEOUT", 4.0)
    online.refuse = True
    with pytest.raises(UserError, match="did not take the dashboard"):
        dashboard(params, layout, None, anonymous=False, console=Console(quiet=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="lives on the server"):
        dashboard(params, layout, None, anonymous=False, console=Console(quiet=True))
