"""A copy of `dvc.lock` for the case that DVC is stopped while it writes the file.

DVC writes the file in place after every stage. If it is stopped at that moment, the file is left empty or cut off; DVC then
refuses to start, or takes the rest for the whole file and trains again. Therefore each stage that DVC starts first copies the
lock to a file whose first line names the stage and the hash of its parameters and code. Such a copy lacks only the entry of that
stage.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from isd_repro.runtime.errors import DataError, UserError
from isd_repro.runtime.files import write_atomic

_STAGE = re.compile(r"^  ([^\s#-][^\n]*):$", re.MULTILINE)  # a stage's name in the lock
PATIENCE = 2.0  # seconds for which a lock may be cut off because another DVC process is writing it


@dataclass(frozen=True)
class DvcLock:
    """A profile's lock.

    Attributes:
        path: `dvc.lock`, which may not exist yet.
        copy: path of the copy.
        runs_with: hashes of the parameters and the code with which a stage starts now.
        known: runs and subsets in the parameters; stages of other runs may disappear from the lock.
    """

    path: Path
    copy: Path
    runs_with: str
    known: Collection[str]

    def keep(self, stage: str) -> None:
        """Copy the lock at the start of a stage, named as DVC does: `pretrain@isd`.

        Raises:
            UserError: the lock has lost stages since the last copy, or is cut off in its last one.
        """
        kept, until = _read(self.copy)[2], time.monotonic() + PATIENCE
        while (lost := self._lost(text := _text(self.path), kept)) or (kept and self._is_damaged(text)):
            if time.monotonic() >= until:
                what = f"has lost {len(lost)} stages that it had, such as {lost[0]}" if lost else "is cut off"
                raise UserError(
                    f"{self.path}: {what}; this happens when DVC is stopped while it writes the file",
                    f"`isd-repro rescue` restores them without training; if they were removed on purpose, delete {self.copy}",
                )
            time.sleep(PATIENCE / 20)
        head = json.dumps({"stage": stage, "runs_with": self.runs_with})
        with suppress(OSError):  # the copy is a help and no condition
            write_atomic(self.copy, f"# {head}\n{text}".encode())

    def rescue(self, say: Callable[[str], object]) -> None:
        """Restore a lock that is empty or cut off, and add the stage that was running when DVC was stopped, if it had finished.

        Raises:
            UserError: the lock is damaged, and there is no copy.
        """
        stage, ran_with, kept = _read(self.copy)
        text = _text(self.path)
        damaged = self._is_damaged(text)
        if damaged and not stage:
            raise UserError(f"{self.path}: is empty or cut off, and no stage has left a copy", f"git checkout {self.path.name}")
        if damaged or self._lost(text, kept):
            write_atomic(self.copy.with_suffix(".damaged"), text.encode())
            write_atomic(self.path, kept.encode()) if kept else self.path.unlink()
            say(f"{self.path}: restored as it was when {stage} started")
        elif not stage or text != kept:
            say(f"{self.path}: nothing to restore")
            return
        if ran_with != self.runs_with:
            say(f"{stage}: was started with other parameters or code; `dvc repro` decides whether it runs again")
            return
        try:
            commit(stage, self.path.parent)
            say(f"{stage}: had finished; the lock has its outputs now")
        except UserError:
            say(f"{stage}: had not finished; `dvc repro` runs it")

    def _is_damaged(self, text: str) -> bool:
        return self.path.is_file() and not text.endswith("\n")

    def _lost(self, text: str, kept: str) -> list[str]:
        there = set(_STAGE.findall(text))
        lost = [name for name in _STAGE.findall(kept) if name not in there]
        return [name for name in lost if "@" not in name or name.partition("@")[2] in self.known]


def commit(stage: str, folder: Path) -> None:
    """Let DVC write the current hashes of a stage's files into the lock of the profile in `folder`.

    Raises:
        UserError: DVC is not installed or reports an error, for example because a file is missing.
    """
    command = [sys.executable, "-m", "dvc", "commit", "--quiet", "--force", stage]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise UserError(f"dvc commit {stage}: {said}", "the files are in place; run `dvc commit` for this stage yourself")


def remove(runs: Collection[str], folder: Path) -> None:
    """Remove the stages of runs from the lock of the profile in `folder`; the rest of the file keeps its bytes.

    Raises:
        DataError: the lock is cut off.
    """
    path = folder / "dvc.lock"
    text = _text(path)
    if path.is_file() and not text.endswith("\n"):
        raise DataError(f"{path}: is empty or cut off", "restore it with `isd-repro rescue` or from git")
    head, *stages = re.split(r"^(?=  [^\s#-])", text, flags=re.MULTILINE)
    kept = [stage for stage in stages if stage.partition(":")[0].partition("@")[2] not in runs]
    if len(kept) < len(stages):
        write_atomic(path, "".join([head, *kept]).encode()) if kept else path.unlink()


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _read(copy: Path) -> tuple[str, str, str]:
    """Stage, what it ran with, and the lock; empty where there is no copy."""
    head, _, text = _text(copy).partition("\n")
    try:
        said = json.loads(head.removeprefix("# "))
        return str(said["stage"]), str(said["runs_with"]), text
    except (ValueError, TypeError, KeyError):
        return "", "", ""
