"""The reviewers' views: described from the records alone, without W&B or network, and built once by W&B's public classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.report.dashboard import dashboard, describe
from isd_repro.runtime.errors import UserError
from isd_repro.tracking import session
from tests.report.conftest import make
from tests.tracking.server import Server

QUIET = Console(quiet=True)


def panels(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [panel for each in node for panel in panels(each)]
    if isinstance(node, dict):
        return [node] if "kind" in node else [panel for each in node.values() for panel in panels(each)]
    return []


def test_the_panels_draw_what_stages_log(finished: Path) -> None:
    """Every key that a panel asks for is a key of some row or picture of the real stages."""
    params, layout = config.load(finished / "params.yaml")
    drawn = [panel for panel in panels(describe(params, layout)) if panel["kind"] != "parallel"]
    asked = {key for panel in drawn for key in panel["keys"]}
    logged = {"images/anchors", "images/clusters"}  # `figures` draws them where it is asked to
    for path in [layout.metrics("isd"), *finished.rglob("runs/.log/**/metrics.jsonl")]:
        for line in path.read_text("utf-8").splitlines():
            logged |= set(json.loads(line))
    logged |= {f"images/{path.stem}" for path in finished.rglob("*.png")}
    assert asked <= logged, asked - logged
    assert {"loss", "spread", "gap", "purity", "teacher/top1", "student/1-NN/all", "teacher/linear-last/all"} <= asked


def test_the_report_holds_the_tables_and_compares_runs(tmp_path: Path) -> None:
    made = make(tmp_path)
    views = describe(made.params, made.layout)
    assert views["report"]["title"] == made.params.report.title
    (tables,) = (block["markdown"] for block in views["report"]["blocks"] if "markdown" in block)
    assert "| ISD |" in tables
    assert "Cost" in tables
    assert "](scores-" not in tables
    (compared,) = [panel for panel in panels(views["workspace"]) if panel["kind"] == "parallel"]
    assert {"c:method.name", "c:optim.lr", "student/1-NN/all", "student/1-NN/rare"} <= set(compared["keys"])
    by_method = [panel for panel in panels(views["workspace"]) if panel.get("group_by") == "method.name"]
    assert {"loss", "student/1-NN/all"} <= {key for panel in by_method for key in panel["keys"]}


def test_a_dry_run_asks_no_server_and_what_is_sent_is_sent_once(profile: Path, tmp_path: Path, online: Server) -> None:
    params, layout = config.load(profile / "params.yaml")
    for name in ("one.json", "other.json"):
        dashboard(params, layout, tmp_path / name, anonymous=False, console=QUIET)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert online.requests == []
    for _ in range(2):
        dashboard(params, layout, None, anonymous=False, console=QUIET)
    report, workspace = online.views
    wanted = json.loads((tmp_path / "one.json").read_text("utf-8"))
    assert report["displayName"] == wanted["report"]["title"]
    assert workspace["displayName"] == wanted["workspace"]["name"]
    for view, part in ((report, "report"), (workspace, "workspace")):
        assert view["projectName"] == "isd-repro"
        assert all(json.dumps(panel["title"]) in view["spec"] for panel in panels(wanted[part]))
        assert "profile:tiny" in view["spec"]


def test_a_dashboard_that_cannot_be_sent_says_so(profile: Path, online: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = config.load(profile / "params.yaml")
    monkeypatch.setattr(session, "INIT_TIMEOUT", 2.0)
    online.refuse = True
    with pytest.raises(UserError, match="did not accept the dashboard"):
        dashboard(params, layout, None, anonymous=False, console=QUIET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="exists only on the W&B server"):
        dashboard(params, layout, None, anonymous=False, console=QUIET)
