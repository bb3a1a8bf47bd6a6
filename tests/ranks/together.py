"""Ranks without the start of an interpreter for each: forks of a process that has everything loaded.

`Together` is the client. Run as a program, this file is the server: one JSON object a line in, one out. Its ranks find what
torchrun would tell them in their environment, and nobody ends the others when one is gone: that is for them to notice.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0  # seconds after which a case hangs; a machine may be shared


@dataclass(frozen=True)
class Ended:
    """Exit codes by rank, minus the signal where one ended it, and what all printed."""

    codes: list[int]
    said: str


class Together:
    """A server for as long as the block."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "log"
        environment = {**os.environ, "COLUMNS": "200"}
        environment.pop("DVC_ROOT", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def run(self, world: int, folder: Path, *words: str, said: str = "", number: int = 0, to: tuple[int, ...] = ()) -> Ended:
        """`isd-repro` with these words on so many ranks, or the cases of `cases.py`; a signal to some ranks once that is said."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._log.write_text("", "utf-8")
        ask = {
            "world": world,
            "folder": str(folder),
            "words": words,
            "log": str(self._log),
            "said": said,
            "number": number,
            "to": to,
        }
        self._server.stdin.write(json.dumps(ask) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server has died"
        return Ended(json.loads(answer), self._log.read_text("utf-8", errors="replace"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


# --- in a rank ----------------------------------------------------------------------------------------------------------


def child(ask: dict[str, Any], rank: int, port: int) -> None:
    """Become a rank; does not return."""
    code = 70
    try:
        log = os.open(ask["log"], os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(ask["folder"])
        if ask["world"] > 1:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ask["world"], "LOCAL_WORLD_SIZE": ask["world"]}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
            os.environ.update({key: str(value) for key, value in told.items()})
        if ask["words"][0] == "cases":
            from tests.ranks import cases

            cases.main(Path(ask["folder"]), ask["words"][1:])
        else:
            sys.argv = ["isd-repro", *ask["words"]]
            from isd_repro import cli

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
        os._exit(code)


# --- in the server ------------------------------------------------------------------------------------------------------


def serve_one(ask: dict[str, Any]) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    pids = []
    for rank in range(ask["world"]):
        pid = os.fork()
        if pid == 0:
            child(ask, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    struck = not ask["said"]
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() - started > PATIENCE:
                    os.kill(pid, signal.SIGKILL)
        if not struck and ask["said"] in Path(ask["log"]).read_text("utf-8", errors="replace"):
            struck = True
            for rank in ask["to"]:
                os.kill(pids[rank], ask["number"])
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def main() -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    from isd_repro import cli  # noqa: F401
    from isd_repro.provenance import remember_code
    from tests.ranks import cases  # noqa: F401

    remember_code()
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
