"""Run a stage under torchrun if `ISD_LAUNCHER` is set, with the signals and exit codes of a single process.

The launcher is a command such as `torchrun --nproc-per-node 4`; words before `torchrun` may be another launcher (`srun ...`). It
describes a machine and changes no number, so it is not a parameter. It is split into words and not passed to a shell. This module
does not import torch.

torchrun exits with 1 whatever the exit codes of its processes, and kills processes that take longer than half a minute to save
their state. Therefore the process that starts torchrun shares a folder with the ranks: it requests a stop there, and each rank
leaves its exit code there.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from isd_repro.runtime import signals
from isd_repro.runtime.errors import EXIT_FAILURE, EXIT_RESUME, ConfigError, UserError

LAUNCHER = "ISD_LAUNCHER"
SHARED = ("pretrain", "extract", "linear")  # stages that several processes can share
_FOLDER, _STARTER = "ISD_LAUNCH_FOLDER", "ISD_LAUNCH_STARTER"  # set for the ranks: the shared folder; node and process
_STOP = "stop"
_EVERY = 0.25  # seconds between two looks


def ranks() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The rank of this process."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def start(stage: str, words: Sequence[str]) -> int | None:
    """Run `isd-repro` with these words under the launcher.

    Returns:
        the exit code, or None if this process has to run the stage itself.

    Raises:
        ConfigError: the launcher is not a torchrun command, or torchrun started a stage that runs in one process only.
        UserError: the launcher cannot be started, or it failed and no rank left an exit code.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if ranks() > 1 and stage not in SHARED:
            raise ConfigError(f"`{stage}` runs in one process, but torchrun started {ranks()}", "start it without torchrun")
        return None
    launcher = os.environ.get(LAUNCHER, "").strip()
    if not launcher or stage not in SHARED:
        return None
    return _run([*command(launcher), "-m", "isd_repro", *words])


def command(launcher: str) -> list[str]:
    """The words of a launcher, with `torchrun` of this Python; `ConfigError` if they are not a torchrun command."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise ConfigError(f"{LAUNCHER}: {launcher!r} cannot be split into words ({error})", "fix the quotes") from error
    if "torchrun" not in words:
        raise ConfigError(f"{LAUNCHER}: {launcher!r} does not call torchrun", "for example: torchrun --nproc-per-node 4")
    own = [sys.executable, "-m", "isd_repro.runtime.torchrun"]
    return [each for word in words for each in (own if word == "torchrun" else [word])]


def _run(words: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="isd-launch-") as name, signals.stop_on_signal() as stop:
        folder = Path(name)
        added = {_FOLDER: name, _STARTER: f"{platform.node()} {os.getpid()}"}
        environment = {key: value for key, value in os.environ.items() if key != LAUNCHER} | added
        try:  # its own process group, so that torchrun gets no signal twice
            child = subprocess.Popen(words, env=environment, process_group=0)
        except OSError as error:
            raise UserError(f"{LAUNCHER}: {words[0]!r} cannot be started ({error.strerror})", "fix the command") from error
        try:
            while child.poll() is None:
                if stop() and not (folder / _STOP).exists():
                    (folder / _STOP).write_text(stop.reason, "utf-8")
                time.sleep(_EVERY)
        finally:
            if child.poll() is None:
                child.terminate()
        codes = [int(path.read_text("utf-8")) for path in folder.iterdir() if path.name != _STOP]
        if child.returncode and not codes:
            hint = "its output above says why; run the same command again to resume"
            raise UserError(f"{LAUNCHER} ended with code {child.returncode}", hint)
        return code_of(codes, child.returncode)


def code_of(codes: Collection[int], launcher: int) -> int:
    """One exit code for all ranks: the common one, otherwise that of the rank that failed by itself."""
    if launcher == 0:
        return 0
    if set(codes) == {EXIT_RESUME}:
        return EXIT_RESUME
    return max((code for code in codes if code not in {0, EXIT_RESUME}), default=EXIT_FAILURE)


# --- in a rank ----------------------------------------------------------------------------------------------------------


def ended(code: int) -> None:
    """Leave this rank's exit code for the `isd-repro` process that started torchrun, if there is one."""
    folder = Path(os.environ.get(_FOLDER, ""))
    if ranks() > 1 and os.environ.get(_FOLDER) and folder.is_dir():
        (folder / str(rank())).write_text(str(code), "utf-8")


def follow() -> None:
    """If torchrun started this process: stop when torchrun or its parent has ended, or when a stop is requested."""
    if ranks() == 1:
        return
    parent = os.getppid()
    asked = Path(os.environ[_FOLDER]) / _STOP if os.environ.get(_FOLDER) else None

    def watch() -> None:
        while os.getppid() == parent:
            if asked is not None and asked.exists():
                return signals.ask(asked.read_text("utf-8") or "a request")
            time.sleep(_EVERY)
        return signals.ask("torchrun has ended")

    threading.Thread(target=watch, daemon=True, name="follow-torchrun").start()
    node, _, pid = os.environ.get(_STARTER, "").rpartition(" ")
    if node == platform.node():
        signals.follow(int(pid), "the process that started torchrun has ended")
