"""Offline runs, read back by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def read_run(folder: Path) -> Records:
    """Every record of one offline run; its file is named, since the folder of two in one second ends in a number."""
    (file,) = folder.glob("run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def read_wandb(folder: Path) -> Records:
    """Every record of the latest offline run below a folder."""
    return read_run(folder / "wandb" / "latest-run")


def head(records: Records) -> dict[str, Any]:
    """What a run says of itself; nothing where a kill came before."""
    return next((record["run"] for record in records if record["type"] == "run"), {})


def offline_runs(folder: Path) -> dict[str, Records]:
    """All offline runs below a folder, one after the other, by title: what `wandb sync` sends."""
    found: dict[str, Records] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        records = read_run(path)
        found.setdefault(head(records).get("display_name", ""), []).extend(records)
    return found


def history(records: Records) -> list[dict[str, Any]]:
    """The rows of a run, without what W&B adds."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def epochs(folder: Path, title: str) -> list[int]:
    """The epochs whose loss is in the offline runs of a title, each as often as it is there."""
    return sorted(row["epoch"] for row in history(offline_runs(folder).get(title, [])) if "loss" in row)
