"""Which processes worked on a run: a file of lines that only grows, kept with the resume state.

A process writes a line when it starts, one at each resume point and one at its end; one that was killed has no end.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from isd_repro.config.fields import Frozen, Natural
from isd_repro.records import Attempt
from isd_repro.runtime.errors import DataError, Preempted
from isd_repro.train.checkpoint import Progress

Outcome = Literal["finished", "stopped", "failed"]


class _Line(Frozen):
    event: Literal["start", "saved", "finished", "stopped", "failed"]
    step: Natural
    seconds: Annotated[float, Field(ge=0)] = 0.0  # since the start
    started: str = ""
    device: str = ""


class Attempts:
    """Those before this process, and this one."""

    def __init__(self, path: Path, progress: Progress, device: torch.device, kernels: str = "") -> None:
        """`kernels` is told beside the device; `DataError` where the file has a line that is none of ours."""
        self._path, self._progress = path, progress
        self._before = read(path)
        self._began = time.monotonic()
        self._start = _Line(event="start", step=progress.step, started=_now(), device=_name(device) + kernels)
        if path.is_file():  # a kill may have cut the last line short
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._write(self._start)

    def saved(self) -> None:
        """A resume point was written."""
        self._write(self._line("saved"))

    def so_far(self, outcome: Outcome) -> tuple[Attempt, ...]:
        """All attempts, this one as if it ended now."""
        return (*self._before, *_fold([self._start, self._line(outcome)]))

    def end(self, outcome: Outcome) -> None:
        """The process ends."""
        self._write(self._line(outcome))

    def _line(self, event: Literal["saved", "finished", "stopped", "failed"]) -> _Line:
        return _Line(event=event, step=self._progress.step, seconds=round(time.monotonic() - self._began, 3))

    def _write(self, line: _Line) -> None:
        content = line.model_dump_json(exclude_defaults=True).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(content) != len(content):  # the disk is full; the next line must not follow half of this one
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


@contextmanager
def recorded(path: Path, progress: Progress, device: torch.device, kernels: str = "") -> Iterator[Attempts]:
    """Within the block this process is the run's newest attempt; how the block ends is how the attempt ends."""
    attempts = Attempts(path, progress, device, kernels)
    try:
        yield attempts
    except BaseException as error:
        with suppress(OSError):  # what went wrong is what the user must see
            attempts.end("stopped" if isinstance(error, Preempted | KeyboardInterrupt) else "failed")
        raise
    attempts.end("finished")


def read(path: Path) -> tuple[Attempt, ...]:
    """Every attempt that the file tells of; `DataError` names a line that is wrong."""
    if not path.is_file():
        return ()
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            lines.append(_Line.model_validate_json(text))
        except ValidationError as error:
            hint = "delete the file: only the list of attempts is lost"
            raise DataError(f"{path}:{number}: no line of an attempt: {error.errors()[0]['msg']}", hint) from error
    if lines and lines[0].event != "start":
        raise DataError(f"{path}:1: an attempt without a start", "delete the file: only the list of attempts is lost")
    return tuple(_fold(lines))


def _fold(lines: list[_Line]) -> Iterator[Attempt]:
    """Attempts from their lines; whichever has no end was killed."""
    starts = [at for at, line in enumerate(lines) if line.event == "start"]
    for first, after in zip(starts, [*starts[1:], len(lines)], strict=True):
        start, last = lines[first], lines[after - 1]
        outcome = "killed" if last.event in ("start", "saved") else last.event
        yield Attempt.model_validate(
            {
                "started": start.started,
                "seconds": last.seconds,
                "first_step": start.step,
                "last_step": last.step,
                "outcome": outcome,
                "device": start.device,
            }
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
