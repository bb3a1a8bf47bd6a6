"""`isd-repro` in forks of a process that has everything loaded, alone or as ranks, killed or signalled at a chosen moment.

A moment is a time after the start, a word that was printed, or the k-th operation on a file inside the case's folder: an open for
writing, a write, fsync, rename, removal and so on, counted in the fork. A write may be torn: half of it reaches the file.
"""

from __future__ import annotations

import builtins
import io
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 600.0  # seconds after which a case hangs; a machine may be shared
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.chmod"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.loaded"])


@dataclass(frozen=True)
class Blow:
    """A signal and when it comes; without a moment it never does.

    Attributes:
        at: before the file operation of this number, counted from 1.
        torn: that operation, if it is a write, is half done first.
        after: this many seconds after the start.
        said: when this was printed.
        number: the signal.
        to: the ranks that get it.
    """

    at: int = 0
    torn: bool = False
    after: float = -1.0
    said: str = ""
    number: int = int(signal.SIGKILL)
    to: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Ended:
    """Exit codes by rank, minus the signal where one ended it; file operations; seconds; and what all printed."""

    codes: list[int]
    operations: int
    seconds: float
    said: str

    @property
    def code(self) -> int:
        """Of the only process."""
        (code,) = self.codes
        return code


def command(words: tuple[str, ...]) -> None:
    """`isd-repro` with these words."""
    from isd_repro import cli

    sys.argv = ["isd-repro", *words]
    cli.main()


def run(
    folder: Path,
    *words: str,
    ranks: int = 1,
    blow: Blow = Blow(),
    call: Callable[[tuple[str, ...]], None] = command,
    **env: str,
) -> Ended:
    """Call with these words in a folder, on so many ranks; `env` is added to the environment of each.

    Ranks find what torchrun would tell them, and nobody ends the others when one is gone: that is for them to notice.
    """
    operations = SERVER.RawValue("q", 0)
    with tempfile.NamedTemporaryFile() as log:
        forks = [
            SERVER.Process(target=_fork, args=(str(folder), log.name, env | told, blow, operations, call, words))
            for told in _told(ranks)
        ]
        started = time.monotonic()
        for fork in forks:
            fork.start()
        struck = blow.at > 0 or (not blow.said and blow.after < 0)
        while any(fork.is_alive() for fork in forks):
            taken = time.monotonic() - started
            if not struck and (blow.said in Path(log.name).read_text("utf-8", "replace") if blow.said else taken > blow.after):
                struck = True
                for rank in blow.to:
                    with suppress(ProcessLookupError):
                        os.kill(forks[rank].pid or 0, blow.number)
            if taken > PATIENCE:
                for fork in forks:
                    fork.kill()
            time.sleep(0.002)
        codes = [fork.exitcode for fork in forks if fork.exitcode is not None]
        return Ended(codes, operations.value, time.monotonic() - started, Path(log.name).read_text("utf-8", "replace"))


def _told(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank; nothing where there is one process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [{**shared, "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{key: str(value) for key, value in told.items()} for told in each]


# --- in a fork ----------------------------------------------------------------------------------------------------------


def _fork(folder: str, log: str, env: dict[str, str], blow: Blow, operations: Any, call: Any, words: tuple[str, ...]) -> None:
    for number in (signal.SIGHUP, signal.SIGINT):  # whoever runs the tests may have shut them off, as `nohup` does
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    os.environ.pop("DVC_ROOT", None)
    os.environ.update({"COLUMNS": "200", **env})
    if env.get("RANK", "0") == "0":
        _Counter(str(Path(folder).parent), blow, operations).install()
    call(words)


@dataclass
class _Counter:
    """Counts file operations in memory that the tests see, and strikes at the chosen one."""

    root: str
    blow: Blow
    shared: Any
    real_open: Callable[..., Any] = field(default=io.open)

    def install(self) -> None:
        sys.addaudithook(self.hear)
        real_fsync = os.fsync

        def fsync(handle: Any) -> None:
            self.operation()
            real_fsync(handle)

        os.fsync = fsync  # type: ignore[assignment]
        io.open = builtins.open = self.open

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, mode, flags = arguments
            if not (any(letter in mode for letter in "wax+") if isinstance(mode, str) else flags & WRITING):
                return
        elif event in EVENTS:
            name = arguments[0]
        else:
            return
        if isinstance(name, str | bytes) and os.path.abspath(os.fsdecode(name)).startswith(self.root):  # noqa: PTH100 - links are not followed
            self.operation()

    def operation(self, *, write: bool = False) -> bool:
        """Count one; whether it is a write, and the blow due in its middle."""
        self.shared.value += 1
        if self.shared.value != self.blow.at:
            return False
        if write and self.blow.torn:
            return True
        os.kill(os.getpid(), self.blow.number)
        return False

    def open(self, *arguments: Any, **options: Any) -> Any:
        file = self.real_open(*arguments, **options)
        if isinstance(file, io.BufferedWriter | io.BufferedRandom | io.FileIO) and file.writable():
            real = file.write

            def write(content: Any) -> int:
                if self.operation(write=True):
                    real(memoryview(content).cast("B")[: len(content) // 2])
                    file.flush()
                    os.kill(os.getpid(), self.blow.number)
                return real(content)

            file.write = write  # type: ignore[method-assign]
        return file
