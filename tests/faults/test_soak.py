"""One run through a long random schedule of everything that can happen to it, and DVC killed in the middle of its work."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isd_repro import artifacts
from isd_repro.artifacts import PretrainRecord
from tests.faults import world
from tests.faults.forks import Blow, Ended, Forks
from tests.faults.test_interruptions import assert_equal_runs
from tests.faults.test_resume import DAMAGE

ROOT = Path(__file__).parents[2]
TURNS = 60


def blow_of(draws: random.Random, typical: Ended) -> Blow:
    """Half of them kill, half of them ask; the early ones often meet the start, the others anything up to some epochs."""
    number = draws.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
    if draws.random() < 0.7:
        most = typical.operations // 6
        return Blow(at=draws.randint(1, most), torn=number == signal.SIGKILL and draws.random() < 0.5, number=number)
    return Blow(after=draws.uniform(0, typical.seconds / 6), number=number)


def damage(draws: random.Random, folder: Path) -> str:
    """Spoil the newest resume point of a run that has two; what was done."""
    points = list(folder.glob(".state/*/checkpoint.pt"))
    if not points or not (points[0].with_name("checkpoint.previous.pt")).is_file() or draws.random() < 0.7:
        return "nothing"
    kind = draws.choice([*DAMAGE, "gone"])
    if kind == "gone":
        points[0].unlink()
    else:
        points[0].write_bytes(DAMAGE[kind](points[0].read_bytes()))
    return kind


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_long_soak(forks: Forks, folder: Path, undisturbed_long: Path, tmp_path: Path, seed: int) -> None:
    world.edit(folder, world.LONGER)
    shutil.copytree(folder, tmp_path / "typical")
    typical = forks.run(tmp_path / "typical", "pretrain", "isd")
    draws, story = random.Random(seed), []
    codes: list[int] = []
    while len(codes) < TURNS:
        story.append(f"damage {damage(draws, folder)}")
        blow = blow_of(draws, typical)
        ended = forks.run(folder, "pretrain", "isd", blow=blow)
        story.append(f"{blow} -> {ended.code}")
        about = "\n".join([f"seed {seed}", *story, ended.said])
        assert ended.code in (-blow.number, 75, 130, 0), about  # by the signal itself where it came before the command's handlers
        assert not ended.orphans, about
        codes.append(ended.code)
        if ended.code == 0:
            break
    ended = forks.run(folder, "pretrain", "isd") if codes[-1] else ended
    about = "\n".join([f"seed {seed}", *story, ended.said])
    assert ended.code == 0, about
    assert len(codes) >= 10, f"too short to say anything: {about}"
    assert {-9, 75} <= set(codes), about
    assert_equal_runs(folder, undisturbed_long)
    record = artifacts.read_record(world.outputs(folder)["record"], PretrainRecord)
    assert record.attempts[-1].last_step == 80
    assert {attempt.outcome for attempt in record.attempts} >= {"killed", "stopped", "finished"}, about


# --- DVC ------------------------------------------------------------------------------------------------------------------------


def repository(folder: Path) -> dict[str, str]:
    """A DVC repository whose only long stage is the run of `world`; the environment for its commands."""
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "isd_repro", folder / "isd_repro", ignore=shutil.ignore_patterns("__pycache__"))
    world.edit(folder, ("epochs: 3", "epochs: 80"))
    with (folder / "params.yaml").open("a", encoding="utf-8") as file:
        lists = "".join(f"{name}_runs: []\n" for name in ("linear", "few_label", "transfer", "trajectory"))
        file.write(f"evaluation: {{linear: {{}}}}\n{lists}")  # dvc.yaml names them
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    shutil.rmtree(folder / "data")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}


def wait_for_epochs(folder: Path, count: int, running: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while sum(path.read_bytes().count(b"\n") for path in folder.glob(".state/*/metrics.jsonl")) < count:
        assert running.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until, "no epoch in two minutes"
        time.sleep(0.05)


def repro(folder: Path, environment: dict[str, str], target: str) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            ["dvc", "repro", target], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


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
def test_dvc_killed_with_its_stage_and_alone(folder: Path) -> None:
    environment = repository(folder)
    with repro(folder, environment, "pretrain@isd") as running:  # both at once
        wait_for_epochs(folder, 3, running)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    with repro(folder, environment, "pretrain@isd") as running:  # DVC alone: its stage saves and ends
        wait_for_epochs(folder, 20, running)
        running.kill()
        running.wait()
    (state,) = (path.parent for path in folder.glob(".state/*/run.json"))
    until = time.monotonic() + 60
    while not (state / "resume-me").is_file():
        assert time.monotonic() < until, "the stage goes on without DVC"
        time.sleep(0.05)
    assert not world.outputs(folder)["record"].exists()
    with repro(folder, environment, "pretrain@isd") as running:  # the stage is asked to stop, DVC answers 255
        wait_for_epochs(folder, 40, running)
        os.kill(child_of(running.pid), signal.SIGTERM)
        assert running.wait() == 255
    assert (state / "resume-me").is_file()
    assert "resuming after step" in repro_again(folder, environment, "pretrain@isd")
    assert [path.name for path in (folder / ".state").iterdir()] == ["verified"]  # what was hashed stays known
    record = artifacts.read_record(world.outputs(folder)["record"], PretrainRecord)
    assert [attempt.outcome for attempt in record.attempts] == ["killed", "stopped", "stopped", "finished"]
    encoder = world.outputs(folder)["encoder"].read_bytes()
    shutil.rmtree(folder / "runs")
    world.train(folder)
    assert world.outputs(folder)["encoder"].read_bytes() == encoder


def child_of(pid: int) -> int:
    """The stage: the newest process below DVC."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])
