"""The profiles of the protocols, and the points of their designs, are those that their scripts write."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from reports import protocols

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("reports/*/make_profile*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_profile_is_that_of_its_script(script: str) -> None:
    for path, text in runpy.run_path(str(ROOT / script))["texts"]().items():
        assert path.read_text("utf-8") == text, f"{path}: run python {script}"


@pytest.mark.parametrize(
    "script", sorted({*ROOT.glob("reports/*/*.py")} - {ROOT / name for name in SCRIPTS}), ids=lambda path: path.name
)
def test_what_other_scripts_import_exists(script: Path) -> None:
    """They run once in months, and nothing else imports them."""
    runpy.run_path(str(script))


def test_the_points_of_claim_2_are_those_of_their_script() -> None:
    script = ROOT / "reports" / "claim-2" / "draw_points.py"
    points = runpy.run_path(str(script))["draw"]()
    assert script.with_name("points.csv").read_text("utf-8") == protocols.table(points)
