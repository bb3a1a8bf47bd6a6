"""What DVC shows of a profile is what its records say."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from isd_repro.config import reader as config
from isd_repro.report import dvc_files, run_records

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "pipelines" / "tiny-imagenet" / "params.yaml"  # every evaluation; other data sets and snapshots among them
RECORDS = ROOT / "reports" / "tiny-imagenet" / "records"


def test_scores_and_curves_are_those_of_the_records() -> None:
    records = run_records.load(*config.load(PARAMS))
    files = dvc_files.render(records)
    assert files == dvc_files.render(records)

    stated: dict[str, dict[str, float]] = {}
    curves: list[tuple[str, int, float]] = []
    for run in records.runs:
        for path in sorted((RECORDS / run).glob("*.json")):
            record = json.loads(path.read_text("utf-8"))
            for score in record.get("scores", []):  # those on other data sets and of snapshots stand deeper
                if score["encoder"] == "student":
                    key = f"student/{score['metric']}/{score['group']}"
                    stated.setdefault(run, {})[key] = round(100 * score["correct"] / score["n"], 4)
            curves += [(run, int(row["epoch"]), float(f"{row['loss']:.6g}")) for row in record.get("curve", [])]
    metrics = json.loads(files["metrics.json"])
    assert metrics == stated
    assert list(metrics) == list(records.runs), "runs stand in the order of the parameters"

    rows = list(csv.DictReader(io.StringIO(files["plots/training.csv"].decode())))
    assert [(row["run"], int(row["epoch"]), float(row["loss"])) for row in rows] == curves
    assert {"cosine distance", "embedding std"} <= set(rows[0])
    bars = list(csv.DictReader(io.StringIO(files["plots/scores.csv"].decode())))
    assert {(row["run"], f"student/{row['metric']}/{row['group']}"): float(row["top-1"]) for row in bars} == {
        (run, key): value for run, scores in stated.items() for key, value in scores.items()
    }
