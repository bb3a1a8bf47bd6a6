"""One process per run, and a clean stop when a signal asks for one."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from isd_repro.errors import UserError

SIGNALS: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """True once a signal arrived; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Has a signal arrived?"""
        return self.asked


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGINT only set the request; the loop saves its state and ends."""
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, _frame: FrameType | None) -> None:
        request.asked = True
        signal.signal(number, previous[number])

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when the process ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"{folder}: this run is already being trained by process {holder}", "wait for it, or stop it"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
