"""Files with the scores and training curves of a profile for `dvc metrics`, `dvc plots` and `dvc exp show`.

They contain the student's scores, as the main tables do. All other numbers are in `tables/cells.csv`.
"""

from __future__ import annotations

import json

from isd_repro.report.export import table_csv
from isd_repro.report.run_records import Records

ENCODER = "student"
HEADS = {"spread": "embedding std", "gap": "cosine distance"}  # of keys that records have
METRICS = "metrics.json"
CURVES = "plots/training.csv"
SCORES = "plots/scores.csv"


def render(records: Records) -> dict[str, bytes]:
    """Every file by its path in `reports/<profile>/`; equal records give equal bytes."""
    scores = [
        (name, key[1], key[2], round(score.top1, 4))
        for name, run in records.runs.items()
        for evaluation in run.own.values()
        for key, score in sorted(evaluation.scores.items())
        if key[0] == ENCODER
    ]
    metrics: dict[str, dict[str, float]] = {}
    for name, metric, group, top1 in scores:
        metrics.setdefault(name, {})[f"{ENCODER}/{metric}/{group}"] = top1
    curves = [(name, row) for name, run in records.runs.items() if run.pretrain for row in run.pretrain.curve]
    measured = sorted({key for _, row in curves for key in row} - {"epoch"})
    heads = ["run", "epoch", *(HEADS.get(key, key) for key in measured)]
    rows = [[name, f"{row['epoch']:g}", *(f"{row[key]:.6g}" if key in row else "" for key in measured)] for name, row in curves]
    return {
        METRICS: (json.dumps(metrics, indent=1) + "\n").encode(),
        CURVES: table_csv([heads, *rows]).encode(),
        SCORES: table_csv([["run", "metric", "group", "top-1"], *([*key, f"{value:g}"] for *key, value in scores)]).encode(),
    }
