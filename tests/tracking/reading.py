"""Offline runs, read back by W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Every record of one offline run; its file is named, since the folder of two in one second ends in a number."""
    (file,) = folder.glob("run-*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def read_wandb(folder: Path) -> list[dict[str, Any]]:
    """Every record of the latest offline run below a folder."""
    return read_run(folder / "wandb" / "latest-run")


def offline_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every offline run below a folder by its title; the id's last part is what it was made from."""
    found = {}
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        records = read_run(path)
        found[next(record["run"] for record in records if record["type"] == "run")["display_name"]] = records
    return found


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run, without what W&B adds."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]
