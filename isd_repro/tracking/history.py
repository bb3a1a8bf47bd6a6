"""The data of a run that W&B already has, on its server or in its files on this machine, so that nothing is sent twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isd_repro.tracking import session
from isd_repro.tracking.metrics import AXES, Row, finite, key_of

PUBLISHED = "published"  # key of a run's summary: digest of all that was sent
COST = frozenset({"images_per_second", "memory_mib", "seconds"})  # differ each time an epoch is computed
_MEDIA = ("images/", "tables/")
READER = (sys.executable, "-m", "wandb", "leet", "inspect", "--json")
_READING = 60.0  # seconds that it may take for one file


@dataclass
class History:
    """Rows, pictures and tables that W&B has.

    Attributes:
        rows: by epoch and step, several rows of the same epoch merged.
        media: keys of pictures and tables.
        digest: of everything that was published; empty if nothing was.
        until: W&B also has all rows of epochs before this one.
    """

    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    media: set[str] = field(default_factory=set)
    digest: str = ""
    until: float = 0

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether all values of a row are there; what it cost to compute may differ."""
        if row.get(AXES[0], self.until) < self.until:
            return True
        there = self.rows.get(key_of(row), {})
        return all(there.get(key) == value for key, value in finite(row).items() if key not in COST)

    def add(self, item: Mapping[str, Any]) -> None:
        """Add a row of W&B's history or summary; its pictures and tables are nested or flattened to `<key>._type`."""
        names = {key.partition(".")[0] for key in item}
        self.media |= {key for key in names if key.startswith(_MEDIA)}
        self.rows.setdefault(key_of(item), {}).update(item)


def of_summary(run: Any) -> History:
    """The history of a run that W&B resumed, by its summary: rows arrive in order, so a kill loses only the last ones."""
    found = History()
    if run.resumed:
        last = dict(run.summary)
        found.add({key: value.get("last") if hasattr(value, "get") else value for key, value in last.items()})
        found.until = last.get(AXES[0], 0)
    return found


def on_server(run: Any) -> History:
    """The history of a run that W&B resumed, from its server; exceptions of W&B are passed on."""
    import wandb

    found = History()
    if run.resumed:
        stored = wandb.Api(timeout=int(session.INIT_TIMEOUT)).run(f"{run.entity}/{run.project}/{run.id}")
        if stored.lastHistoryStep >= 0:
            for row in stored.scan_history(use_cache=False):
                found.add(row)
        summary = dict(run.summary)
        found.add(dict.fromkeys(summary))
        found.digest = str(summary.get(PUBLISHED, ""))
    return found


def on_disk(folder: Path, run_id: str, project: str, new: Path | None = None) -> History:
    """The history in W&B's own files of this run, which `wandb sync` sends or has sent.

    Args:
        folder: W&B writes below `<folder>/wandb`.
        run_id: W&B's id of the run.
        project: W&B's project; files of other projects are ignored.
        new: folder of an attempt that has just begun, which is empty; not reading it saves a second.
    """
    found = History()
    for _, records in _files(folder, run_id, project, new=new):
        for record in records:
            if record["type"] == "history":
                found.add(record["history"]["item"])
            elif record["type"] == "summary":
                found.digest = record["summary"].get("update", {}).get(PUBLISHED, found.digest)
    return found


def mark_synced(folder: Path, run_id: str, project: str) -> None:
    """Mark offline files of a run as synced, as W&B itself does, because the server already has their content.

    `wandb sync` does not ask the server what it has, and would send every epoch again.
    """
    for path, _ in _files(folder, run_id, project, "offline-run-*"):
        path.with_suffix(".wandb.synced").touch()


def records_of(path: Path) -> list[dict[str, Any]]:
    """What one of W&B's files holds; a killed process leaves it without an end, or without anything."""
    lines = subprocess.run(
        [*READER, str(path)], capture_output=True, text=True, check=False, timeout=_READING
    ).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def _files(
    folder: Path, run_id: str, project: str, pattern: str = "*run-*", new: Path | None = None
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """W&B's files of a run of one project, with what each holds."""
    for path in sorted((folder / "wandb").glob(f"{pattern}/run-{run_id}.wandb")):
        if new is not None and path.parent.samefile(new):
            continue
        records = records_of(path)
        if project in {record["run"].get("project") for record in records if record["type"] == "run"}:
            yield path, records
