"""Which code made a run's numbers, so that a resume under other code is never silent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from isd_repro.runtime.errors import UserError
from isd_repro.train.checkpoint import Progress

ANYWAY = "ISD_RESUME_CHANGED"  # environment variable; 1 goes on under changed code

_PACKAGE = Path(__file__).parents[1]
_FIXED = (
    "train/process_group.py",
    "runtime/ranks.py",
    "data/augment.py",
    "data/loader.py",
    "train/loop.py",
    "train/schedule.py",
)


def code_of(method: str) -> dict[str, str]:
    """Short sha256 by file of what a step's numbers are computed with, and the version of torch.

    What only reads, writes, checks and stops is left out: mending a message must not end a run of days.
    """
    files = [_PACKAGE / name for name in (*_FIXED, f"methods/{method}.py")] + list((_PACKAGE / "nn").glob("*.py"))
    hashes = {path.relative_to(_PACKAGE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in sorted(files)}
    return {**hashes, "torch": str(torch.__version__)}  # a plain string: its own type is none that a resume point may hold


def take_over(progress: Progress, now: Mapping[str, str], state: Path) -> None:
    """Note the code that trains from here on.

    Raises:
        UserError: it is not the code of the resume point, and `ISD_RESUME_CHANGED=1` does not say to go on.
    """
    before = progress.code
    if progress.step and before != now:
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        changes = [f"{name} was {before.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names]
        if os.environ.get(ANYWAY) != "1":
            raise UserError(
                f"{state}: other code than now trained this run up to step {progress.step}: {'; '.join(changes)}",
                f"restore that code; or delete the folder to start afresh; or set {ANYWAY}=1 to go on, and the record says so",
            )
        progress.remarks.append(f"resumed after step {progress.step} under other code ({'; '.join(changes)})")
    progress.code = dict(now)
