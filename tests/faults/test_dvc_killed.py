"""DVC killed in the middle of its work, alone and with its stage: what it started saves, ends, and is resumed by `dvc repro`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults import world

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds without any progress; a busy machine may take minutes to load what a stage needs


def repository(folder: Path) -> dict[str, str]:
    """A DVC repository whose only long stage is the run of `world`; the environment for its commands."""
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "isd_repro", folder / "isd_repro", ignore=shutil.ignore_patterns("__pycache__"))
    world.edit(folder, ("epochs: 3", "epochs: 80"))
    with (folder / "params.yaml").open("a", encoding="utf-8") as file:
        lists = "".join(f"{name}: []\n" for name in set(re.findall(r"\$\{(\w+_runs)\}", (ROOT / "dvc.yaml").read_text("utf-8"))))
        file.write(f"evaluation: {{linear: {{}}}}\n{lists}")  # dvc.yaml names them
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    shutil.rmtree(folder / "data")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}


def wait_for_epochs(folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    """Until so many rows are there; a machine that is busy may take its time, as long as rows come."""
    seen, until = -1, 0.0
    while (found := sum(path.read_bytes().count(b"\n") for path in folder.glob(".state/*/metrics.jsonl"))) < count:
        if found != seen:
            seen, until = found, time.monotonic() + PATIENCE
        assert running.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until, f"no epoch after the first {seen} in ten minutes"
        time.sleep(0.02)


@contextmanager
def repro(folder: Path, environment: dict[str, str], target: str, before: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """`dvc repro` in a group of its own, behind words of a shell, killed where the test fails."""
    start = ["sh", "-c", f"{before} exec dvc repro {target}"]
    with (
        (folder / "log").open("ab") as log,
        subprocess.Popen(start, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True) as running,
    ):
        try:
            yield running
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise


def repro_again(folder: Path, environment: dict[str, str], target: str) -> str:
    """`dvc repro`, repeated while DVC itself still finds the lock of a process that was killed: the documented retry."""
    output = ""
    for _ in range(10):
        done = subprocess.run(["dvc", "repro", target], cwd=folder, env=environment, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        if done.returncode == 0:
            return output
        assert "is busy" in output or "Unable to acquire lock" in output, output
        time.sleep(2)
    raise AssertionError(f"DVC stays locked\n{output}")


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_dvc_killed_with_its_stage_and_alone(folder: Path, shell: str) -> None:
    """DVC starts its stages by the shell of the user, which may become the stage (bash) or stay above it (dash)."""
    if not Path(shell).exists():
        pytest.skip(f"there is no {shell}")
    environment = {**repository(folder), "SHELL": shell}
    with repro(folder, environment, "pretrain@isd") as running:  # both at once
        wait_for_epochs(folder, 3, running)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    with repro(folder, environment, "pretrain@isd") as running:  # DVC alone: its stage saves and ends
        wait_for_epochs(folder, 12, running)
        running.kill()
        running.wait()
    (state,) = (path.parent for path in folder.glob(".state/*/run.json"))
    wait_for_its_end(state)
    assert not world.outputs(folder)["record"].exists()
    with repro(folder, environment, "pretrain@isd") as running:  # the stage is asked to stop, DVC answers 255
        wait_for_epochs(folder, 24, running)
        os.kill(below(running.pid)[-1], signal.SIGTERM)
        assert running.wait() == 255
    assert (state / "resume-me").is_file(), "DVC has answered, and no wrapper can tell"
    with repro(folder, environment, "pretrain@isd") as running:  # what DVC started is asked: a shell ends before its stage
        wait_for_epochs(folder, 36, running)
        os.kill(below(running.pid)[0], signal.SIGTERM)
        assert running.wait() == 255
    wait_for_its_end(state)
    with repro(folder, environment, "pretrain@isd", "trap '' USR1;") as running:  # as docs/reliability.md tells a scheduler
        wait_for_epochs(folder, 48, running)
        os.killpg(running.pid, signal.SIGUSR1)
        assert running.wait() == 255
    assert (state / "resume-me").is_file(), "DVC has not waited for its stage"
    assert "resuming after step" in repro_again(folder, environment, "pretrain@isd")
    left = {path.name for path in (folder / ".state").iterdir()}
    assert left == {"verified", "dvc"}, "what was hashed and the copy of dvc.lock stay"
    record = world.record(folder)
    assert [attempt.outcome for attempt in record.attempts] == ["killed", "stopped", "stopped", "stopped", "stopped", "finished"]
    encoder = world.encoder(folder)
    shutil.rmtree(folder / "runs")
    world.train(folder)
    assert world.encoder(folder) == encoder


def wait_for_its_end(state: Path) -> None:
    """Until a stage that outlives its DVC has said that it can be resumed, and has let go of the run."""
    until = time.monotonic() + PATIENCE
    while not (state / "resume-me").is_file() or (state / "lock").exists():
        assert time.monotonic() < until, "the stage goes on without DVC"
        time.sleep(0.05)


def below(pid: int) -> list[int]:
    """The processes below one, from the nearest to the last: a shell, if it stays, and the stage."""
    found: list[int] = []
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[-1])
        found.append(pid)
    return found
