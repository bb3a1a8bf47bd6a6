"""What `verify` is asked, and what it has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.data.manifests import Prepared
from isd_repro.report.faults import Fault
from isd_repro.runtime.progress import Progress

RESTORE = "restore the record from git, or run its stage again"


def bring_back(stage: str) -> str:
    """What to do about a file of a run."""
    return f"bring the run's own file back with `dvc checkout`; or run `{stage}` and what follows it again"


@dataclass(frozen=True)
class Asked:
    """Options; `runs` empty means all of them."""

    runs: tuple[str, ...] = ()
    quick: bool = False
    linear: bool = False  # train every classifier on frozen features again
    snapshots: bool = False  # evaluate the encoders kept during training
    as_json: bool = False


@dataclass
class Walk:
    """Faults, remarks, and what an encoder gave again.

    Attributes:
        replayed: (run, encoder, metric) whose every stored prediction was given again; a data set's metric is `transfer-<set>`.
        snapshots: (run, epoch) whose every score was given again.
        subsets: prepared images by subset; None where they are missing or damaged.
        targets: other data sets, whole, by (set, channels, seed of the division).
    """

    params: Params
    layout: Layout
    asked: Asked
    progress: Progress
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    replayed: set[tuple[str, str, str]] = field(default_factory=set)
    snapshots: set[tuple[str, int]] = field(default_factory=set)
    subsets: dict[str, Prepared | None] = field(default_factory=dict)
    targets: dict[tuple[str, int, int], Any] = field(default_factory=dict)

    def fault(self, file: Path, key: str, found: object, expected: object, hint: str, *runs: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(file, key, str(found), str(expected), hint, runs))

    def note(self, words: str) -> None:
        """Note a remark, once."""
        if words not in self.notes:
            self.notes.append(words)

    def shown(self, path: Path) -> str:
        """A path as a reader of this profile is told it."""
        root = self.layout.root
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
