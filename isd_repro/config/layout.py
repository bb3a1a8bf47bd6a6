"""Where a profile keeps its files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from isd_repro.runtime.files import named_path


@dataclass(frozen=True)
class Layout:
    """Paths of a profile's files; `dvc.yaml` names the same paths, and a test compares them."""

    folder: Path  # holds params.yaml
    root: Path  # the repository
    profile: str
    name: str = "params.yaml"

    @property
    def file(self) -> Path:
        """The parameter file."""
        return self.folder / self.name

    def prepared(self, subset: str) -> Path:
        """Folder of one prepared subset: manifest.json, images.tsv and the store."""
        return self.folder / "data" / "prepared" / subset

    def encoder(self, run: str) -> Path:
        """Exported encoders of a run."""
        return self.folder / "runs" / run / "encoder.safetensors"

    def snapshots(self, run: str) -> Path:
        """Encoders saved during a run's training: one file every `efficiency.snapshot_every` epochs."""
        return self.folder / "runs" / run / "snapshots"

    def metrics(self, run: str) -> Path:
        """Every logged row of a run's pretraining."""
        return self.folder / "runs" / run / "metrics.jsonl"

    def log(self, name: str, stage: str) -> Path:
        """Rows and pictures of one stage of a run or subset; not a DVC output. No run's name begins with a dot."""
        return self.folder / "runs" / ".log" / stage / name

    def features(self, run: str) -> Path:
        """Features of the search and query images under each encoder of a run."""
        return self.folder / "runs" / run / "features.safetensors"

    def record(self, run: str, part: str) -> Path:
        """One part of a run's committed record."""
        return self.records / run / f"{part}.json"

    @property
    def results(self) -> Path:
        """The profile's committed results."""
        return self.root / "reports" / self.profile

    @property
    def records(self) -> Path:
        """All records of the profile."""
        return self.results / "records"

    @property
    def report(self) -> Path:
        """The tables and the page that `report` writes."""
        return self.results / "tables"

    @property
    def verified(self) -> Path:
        """Remembered hashes of stores."""
        return self.state("verified")

    @property
    def cards(self) -> Path:
        """The model cards that `report` writes."""
        return self.results / "cards"

    def state(self, fingerprint: str) -> Path:
        """Resume state of unfinished work; outside DVC, because DVC deletes outputs before a stage starts."""
        return state_root(self.root) / fingerprint


def state_root(usual: Path = Path()) -> Path:
    """The folder `.state`, in the folder that ISD_STATE_ROOT names or otherwise in `usual`."""
    named = named_path("ISD_STATE_ROOT", "") if os.environ.get("ISD_STATE_ROOT") else None
    return (named or Path(os.environ.get("DVC_ROOT") or usual)) / ".state"


def snapshot_name(epoch: int) -> str:
    """File name of the encoders after an epoch; names sort in the order of epochs."""
    return f"epoch-{epoch:05d}.safetensors"


def snapshots_in(folder: Path) -> dict[int, Path]:
    """Snapshot files by epoch, in order; empty if the folder does not exist. Other files are ignored."""
    named = [(re.fullmatch(r"epoch-(\d+)\.safetensors", path.name), path) for path in folder.glob("*")]
    return dict(sorted((int(match[1]), path) for match, path in named if match))
