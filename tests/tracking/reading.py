"""Offline runs, read back by W&B's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isd_repro.tracking.history import records_of

Records = list[dict[str, Any]]


def head(records: Records) -> dict[str, Any]:
    """What a run says of itself; nothing where a kill came before."""
    return next((record["run"] for record in records if record["type"] == "run"), {})


def offline_runs(folder: Path) -> dict[str, Records]:
    """All offline runs below a folder, one after the other, by title: what `wandb sync` sends."""
    found: dict[str, Records] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        records = records_of(path)
        found.setdefault(head(records).get("display_name", ""), []).extend(records)
    return found


def history(records: Records) -> list[dict[str, Any]]:
    """The rows of a run, without what W&B adds."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def epochs(folder: Path, title: str) -> list[int]:
    """The epochs whose loss is in the offline runs of a title, each as often as it is there."""
    return sorted(row["epoch"] for row in history(offline_runs(folder).get(title, [])) if "loss" in row)
