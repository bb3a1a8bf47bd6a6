"""A method is one file: the package is copied, one file and one run are added, and the demo table has its row."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.pipeline.test_repro import ROOT, shell

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["barlow_twins", "../../mine/barlow_twins"])
def test_one_file_and_one_run_make_a_row(tmp_path: Path, name: str) -> None:
    """No other edit: the method's name stands nowhere in the package."""
    shutil.copytree(ROOT / "isd_repro", tmp_path / "isd_repro", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "isd_repro" / "methods" / f"{name}.py"
    file.resolve().parent.mkdir(exist_ok=True)
    shutil.copy(HERE / "barlow_twins.py", file)
    text = (ROOT / "params.yaml").read_text("utf-8")
    run = (HERE / "barlow_twins.yaml").read_text("utf-8").replace("name: barlow_twins", f"name: {name}")
    text = re.sub(r"epochs: [1-9]\d*", "epochs: 2", f"{text.rstrip()}\n{run}")  # the untrained encoder keeps its 0
    (tmp_path / "params.yaml").write_text(text, "utf-8")

    env = {"PYTHONPATH": str(tmp_path)}
    shell(tmp_path, "isd-repro", "prepare", "digits", env=env)
    for stage in ("pretrain", "extract", "knn"):
        shell(tmp_path, "isd-repro", stage, "untrained", "barlow-twins", env=env)
    shell(tmp_path, "isd-repro", "report", env=env)
    output = shell(tmp_path, "isd-repro", "show", env=env)

    row = next(
        line for line in (tmp_path / "reports/demo/tables/table.md").read_text("utf-8").splitlines() if "Barlow Twins" in line
    )
    assert re.search(r"\d+\.\d", row), row
    assert "Barlow Twins" in output


def test_the_guide_shows_the_file_that_is_tested() -> None:
    """docs/new-method.md includes the two files; `python docs/include.py` writes them in."""
    guide = (ROOT / "docs" / "new-method.md").read_text("utf-8")
    for name in ("barlow_twins.py", "barlow_twins.yaml"):
        assert (HERE / name).read_text("utf-8").strip() in guide, f"run `python docs/include.py`: {name} changed"
