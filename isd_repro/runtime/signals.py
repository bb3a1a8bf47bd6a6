"""Clean stops: on a signal, or when the DVC process that started this one has ended."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from isd_repro.runtime.errors import Preempted

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGUSR2", "SIGXCPU")  # the last two: other schedulers; a limit on CPU time
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)  # Windows has the first two
INSIST = 1.0  # seconds after which the same signal ends the process at once; `timeout` and schedulers send one twice in a row


class StopRequest:
    """Is true once a stop was requested; `reason` says by what."""

    def __init__(self) -> None:
        self.reason = ""

    def __call__(self) -> bool:
        """Whether a stop is requested."""
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Request a stop; the first reason is kept."""
        self.reason = self.reason or reason


_REQUESTS: list[StopRequest] = []  # that of the open block, if there is one: signals belong to a process, not to a caller


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block signals only request a stop, and the loop saves its state and ends. A nested block shares the request."""
    if _REQUESTS:
        yield _REQUESTS[0]
        return
    request = StopRequest()
    _REQUESTS.append(request)
    try:
        with _on_signal(lambda number: request.ask(signal.Signals(number).name)):
            yield request
    finally:
        _REQUESTS.clear()


@contextmanager
def interrupt_on_signal() -> Iterator[None]:
    """Within the block every signal raises KeyboardInterrupt, so that half-written files are removed."""
    came: list[int] = []

    def interrupt(number: int) -> None:
        came.append(number)
        raise KeyboardInterrupt

    with _on_signal(interrupt):
        try:
            yield
        except Preempted:
            raise
        except Exception as error:
            if came:  # interrupted compiled code may raise another error, as if a file were damaged
                raise KeyboardInterrupt from error
            raise


def ignore() -> None:
    """Ignore signals from here on: the command has ended, and its exit code stands."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _on_signal(react: Callable[[int], None]) -> Iterator[None]:
    """React to the first signal of each kind; the same one again, some time later, ends the process at once."""
    first: dict[int, float] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        if number not in first:
            first[number] = time.monotonic()
            react(number)
        elif time.monotonic() - first[number] >= INSIST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if not (number.name == "SIGHUP" and handler is signal.SIG_IGN):  # `nohup` means it
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the process that started this one ----------------------------------------------------------------------------------


def follow_dvc() -> None:
    """If DVC started this process, stop it when DVC has ended, as if it had received SIGTERM.

    If only DVC is asked to end or killed, its stage would otherwise keep running and occupy the device for days.
    """
    if "DVC_STAGE" in os.environ:
        follow(_dvc(), "DVC has ended")


def follow(pid: int, reason: str) -> None:
    """Stop this process when another one ends, as if it had received SIGTERM."""

    def wait_and_ask() -> None:
        _wait_for_end(pid)
        ask(reason)

    threading.Thread(target=wait_and_ask, daemon=True, name="follow").start()


def ask(reason: str) -> None:
    """Ask this process to stop: through the open block if there is one, otherwise as SIGTERM would."""
    if _REQUESTS:  # no signal: one that came to the whole group must not count as sent twice
        _REQUESTS[0].ask(reason)
    else:
        os.kill(os.getpid(), signal.SIGTERM)


def _dvc() -> int:
    """The DVC process: the nearest ancestor without DVC_STAGE in its environment, which a shell in between has."""
    pid = os.getppid()
    try:
        while any(entry.startswith(b"DVC_STAGE=") for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # not Linux, or another user's process: the nearest that can be looked at
        pass
    return pid


def _wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or a parent outside the container: being adopted shows its end
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(INSIST)
        return
    select.select([handle], [], [])
