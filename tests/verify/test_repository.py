"""The reports of this repository are those that its records give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from isd_repro import cli

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]


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
