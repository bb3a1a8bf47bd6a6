"""An evaluation is one file: the package is copied without it, the guide's file and block are added, and everything follows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.pipeline.test_repro import ROOT, change, clone, shell  # noqa: F401 - a fixture

GUIDE = (ROOT / "docs" / "new-evaluation.md").read_text("utf-8")


def block(path: str) -> str:
    """What the guide includes from a file, as a reader copies it."""
    found = re.search(rf"<!-- include {re.escape(path)} -->\n```\w+\n(.*?)\n```\n", GUIDE, re.DOTALL)
    assert found
    return found[1] + "\n"


def test_the_guide_shows_the_files_that_are_tested() -> None:
    for path in ("isd_repro/evaluations/weighted_knn.py", "tests/pipeline/weighted_knn.yaml"):
        assert block(path).strip() == (ROOT / path).read_text("utf-8").strip(), f"run `python docs/include.py`: {path} changed"


@pytest.mark.slow
def test_one_file_and_one_block_make_a_command_a_column_a_row_and_a_verdict(clone: Path) -> None:  # noqa: F811
    file = clone / "isd_repro" / "evaluations" / "weighted_knn.py"
    file.unlink()
    env = {"PYTHONPATH": str(clone), "WANDB_MODE": "offline"}
    assert "weighted-knn" not in shell(clone, "isd-repro", "--help", env=env)
    assert not re.search(r"weighted.?knn", "".join(path.read_text("utf-8") for path in (clone / "isd_repro").rglob("*.py")))

    file.write_text(block("isd_repro/evaluations/weighted_knn.py"), "utf-8")
    pipeline = clone / "dvc.yaml"
    stages, report, rest = pipeline.read_text("utf-8").partition("  report:\n")
    pipeline.write_text(f"{stages}{block('tests/pipeline/weighted_knn.yaml')}\n{report}{rest}", "utf-8")
    change(clone, "evaluation", "weighted_knn", value={"k": [5, 10]})

    assert "weighted by similarity" in shell(clone, "isd-repro", "weighted-knn", "--help", env=env)
    shell(clone, "dvc", "repro", env=env)
    table = (clone / "reports/demo/tables/table.md").read_text("utf-8")
    assert "10-NN, weighted" in table
    record = json.loads((clone / "reports/demo/records/isd/weighted_knn.json").read_text("utf-8"))
    stated = {(s["encoder"], s["metric"], s["group"]): 100 * s["correct"] / s["n"] for s in record["scores"]}
    row = json.loads((clone / "runs/.log/weighted_knn/isd/metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert row["teacher/10-NN-weighted/rare"] == pytest.approx(stated["teacher", "10-NN-weighted", "rare"])
    assert any("demo-isd-weighted-knn" in path.name for path in (clone / "wandb").glob("offline-run-*"))

    shell(clone, "sh", "-c", "isd-repro verify --json > verify.json", env=env)
    found = json.loads((clone / "verify.json").read_text("utf-8"))
    verdicts = {n["verdict"] for n in found["numbers"] if n["metric"] == "10-NN-weighted" and n["kind"] == "score"}
    assert (found["ok"], verdicts) == (True, {"re-evaluated"})
