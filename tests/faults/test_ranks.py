"""Several ranks that are killed, signalled, misconfigured or diverge: all end, with words, and the run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from isd_repro.records import EvaluationRecord, read_record
from isd_repro.runtime import launcher as launch
from tests.faults import chain, forks, world
from tests.faults.forks import Blow, Ended
from tests.faults.test_interruptions import step_of

LOST = "another process of this run has ended or cannot be reached"


def run(ranks: int, folder: Path, *words: str, blow: Blow = Blow()) -> Ended:  # noqa: B008 - it is frozen
    return forks.run(folder, *words, ranks=ranks, blow=blow)


@pytest.fixture(scope="module")
def two(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run on two ranks, never disturbed."""
    copy = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("two") / "profile"))
    world.edit(copy, world.LONGER)
    ended = run(2, copy, "pretrain", "isd")
    assert ended.codes == [0, 0], ended.said
    assert ended.said.count("epoch 24/24") == 1  # rank 0 alone speaks
    return copy


@pytest.fixture
def long(folder: Path) -> Path:
    """That run, not begun."""
    world.edit(folder, world.LONGER)
    return folder


def asked_to_resume(folder: Path) -> int:
    """The step that is kept, which `resume-me` names."""
    (state,) = world.states(folder)
    step = step_of(state)
    assert (state / "resume-me").read_text("utf-8").splitlines()[1] == f"step: {step} of 120"
    return step


def assert_resumes(folder: Path, two: Path) -> None:
    """On as many ranks: bit for bit."""
    ended = run(2, folder, "pretrain", "isd")
    assert (ended.codes, "resuming after step" in ended.said) == ([0, 0], True), ended.said
    assert world.encoder(folder) == world.encoder(two)
    assert world.record(folder).curve == world.record(two).curve
    assert world.states(folder) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_the_run_resumes(long: Path, two: Path, rank: int) -> None:
    """The survivor notices by itself; nobody ends it."""
    ended = run(2, long, "pretrain", "isd", blow=Blow(said="epoch 3/", to=(rank,)))
    assert ended.codes[rank] == -signal.SIGKILL, ended.said
    assert ended.codes[1 - rank] == 1, ended.said
    assert LOST in ended.said
    assert "the same command resumes the run, on any number of processes" in ended.said
    assert "Traceback" not in ended.said
    (state,) = world.states(long)
    if rank == 1:
        assert f"last good checkpoint: {state}/checkpoint.pt, of step " in ended.said
    assert world.written(long) == set()
    assert 10 <= step_of(state) < 120  # the third epoch may have been told and not yet saved
    assert_resumes(long, two)
    assert [attempt.outcome for attempt in world.record(long).attempts] == ["killed" if rank == 0 else "failed", "finished"]


def test_a_signal_to_both_ranks_stops_them_once(long: Path, two: Path) -> None:
    ended = run(2, long, "pretrain", "isd", blow=Blow(said="epoch 3/", number=signal.SIGTERM, to=(0, 1)))
    assert (ended.codes, ended.said.count("isd: SIGTERM: stopped after step")) == ([75, 75], 1), ended.said
    asked_to_resume(long)
    assert_resumes(long, two)


def test_a_signal_to_one_rank_stops_all_and_the_run_ends_on_one(long: Path) -> None:
    """And then extracts on two: the same bytes as on one."""
    ended = run(2, long, "pretrain", "isd", blow=Blow(said="epoch 3/", number=signal.SIGTERM, to=(1,)))
    assert (ended.codes, ended.said.count("isd: a signal to another rank: stopped after step")) == ([75, 75], 1), ended.said
    assert f"resuming after step {asked_to_resume(long)}" in world.train(long)
    assert (world.record(long).steps, len(world.record(long).curve)) == (120, 24)
    features = long / "runs" / "isd" / "features.safetensors"
    assert chain.call(long, "extract", "isd").code == 0
    want = features.read_bytes()
    features.unlink()
    ended = run(2, long, "extract", "isd")
    assert ended.codes == [0, 0], ended.said
    assert features.read_bytes() == want


def test_the_linear_protocol_on_two_ranks(done: Path) -> None:
    """The record of one process, written once."""
    path = world.layout_of(done).record("isd", "linear")
    want = read_record(path, EvaluationRecord)
    path.unlink()
    ended = run(2, done, "linear", "isd")
    assert (ended.codes, ended.said.count("linear epoch 2 ")) == ([0, 0], 1), ended.said
    found = read_record(path, EvaluationRecord)
    assert (found.scores, found.predictions, found.settings) == (want.scores, want.predictions, want.settings)


def test_a_run_that_diverges_stops_on_all_ranks_at_one_step(folder: Path) -> None:
    world.edit(folder, ("lr: 0.05", "lr: 1e30"))
    ended = run(2, folder, "pretrain", "isd")
    assert ended.codes == [1, 1], ended.said
    steps = [line.partition("step ")[2].partition(" ")[0] for line in ended.said.splitlines() if line.startswith("error: ")]
    assert (len(steps), len(set(steps))) == (2, 1), ended.said


@pytest.mark.parametrize(
    ("ranks", "words", "code", "text"),
    [
        (3, ("pretrain", "isd"), 3, "optim.batch_size: 16 images for 3 processes"),
        (2, ("knn", "isd"), 3, "`knn` runs in one process, but torchrun started 2"),
        (2, ("extract", "isd"), 4, "encoder.safetensors: no such file"),
    ],
)
def test_what_ranks_cannot_do_is_said(folder: Path, ranks: int, words: tuple[str, ...], code: int, text: str) -> None:
    ended = run(ranks, folder, *words)
    assert ended.codes == [code] * ranks, ended.said
    assert text in ended.said
    assert f"error: rank {ranks - 1} of {ranks}: " in ended.said
    assert world.states(folder) == []


# --- the launcher ---------------------------------------------------------------------------------------------------------


def start(folder: Path, *words: str, launcher: str = "torchrun --nproc-per-node 2", **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ISD_LAUNCHER": launcher, **env}
    command = [sys.executable, "-m", "isd_repro", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ends(running: subprocess.Popen[str], lines: list[str]) -> str:
    """All that it said, once it has ended."""
    assert running.stderr is not None
    said = "".join([*lines, running.stderr.read()])
    running.wait()
    assert "Traceback" not in said
    return said


def test_a_stage_under_the_launcher_is_stopped_and_resumed(long: Path, two: Path) -> None:
    """Real torchrun: SIGTERM to the one process that the user knows; all save, and 75 is its exit code, too."""
    with start(long, "pretrain", "isd") as running:
        lines = world.wait_for_epochs(running, 2)
        running.terminate()
        said = ends(running, lines)
    assert (running.returncode, "stopped after step" in said) == (75, True), said
    assert_resumes(long, two)


@pytest.mark.slow
def test_a_rank_killed_under_the_launcher(long: Path, two: Path) -> None:
    with start(long, "pretrain", "isd") as running:
        lines = world.wait_for_epochs(running, 2)
        (torchrun,) = children(running.pid)
        os.kill(children(torchrun)[1], signal.SIGKILL)
        said = ends(running, lines)
    assert (running.returncode, LOST in said, "was ended by SIGKILL" in said) == (1, True, True), said
    with start(long, "pretrain", "isd") as running:
        said = ends(running, [])
    assert (running.returncode, "resuming after step" in said) == (0, True), said
    assert world.encoder(long) == world.encoder(two)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["starter", "torchrun"])
def test_ranks_do_not_outlive_who_started_them(folder: Path, which: str) -> None:
    world.edit(folder, ("epochs: 3", "epochs: 16000"))
    with start(folder, "pretrain", "isd") as running:
        world.wait_for_epochs(running, 2)
        (torchrun,) = children(running.pid)
        ranks = children(torchrun)
        assert len(ranks) == 2
        os.kill(running.pid if which == "starter" else torchrun, signal.SIGKILL)
        until = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in ranks):
            assert time.monotonic() < until, "a rank goes on alone"
            time.sleep(0.1)
        running.kill()
    (state,) = world.states(folder)
    assert (state / "resume-me").is_file()


@pytest.mark.slow
def test_dvc_repro_with_a_launcher(long: Path, tmp_path: Path, two: Path) -> None:
    """torchrun, told to stop, makes its stage end with 75, and `dvc repro` goes on from there.

    Without the launcher, which is the machine's and no parameter, a second `dvc repro` finds nothing to do.
    """
    stage = {"cmd": "isd-repro pretrain isd", "deps": ["data/prepared/digits"], "outs": ["runs/isd/encoder.safetensors"]}
    with (long / "dvc.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({"stages": {"pretrain": stage}}, file)
    command = tmp_path / "isd-repro"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m isd_repro "$@"\n', "utf-8")
    command.chmod(0o755)
    plain = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    launched = {**plain, "ISD_LAUNCHER": "torchrun --nproc-per-node 2"}
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=long, env=plain, check=True)
    repro: dict[str, Any] = {"args": [*dvc, "repro"], "cwd": long, "text": True}
    with subprocess.Popen(**repro, env=launched, stderr=subprocess.PIPE, start_new_session=True) as running:
        lines = world.wait_for_epochs(running, 2)
        os.kill(below(running.pid, "isd_repro.runtime.torchrun"), signal.SIGTERM)
        said = ends(running, lines)
    assert (running.returncode != 0, "exited with 75" in said) == (True, True), said
    step = asked_to_resume(long)
    ended = subprocess.run(**repro, env=launched, capture_output=True, check=False)
    assert (ended.returncode, f"resuming after step {step}" in ended.stderr) == (0, True), ended.stdout + ended.stderr
    assert world.encoder(long) == world.encoder(two)
    ended = subprocess.run(**repro, env=plain, capture_output=True, check=False)
    assert "didn't change, skipping" in ended.stdout, ended.stdout


def below(pid: int, words: str) -> int:
    """The first descendant whose command has these words."""
    waiting = children(pid)
    while waiting:
        each = waiting.pop(0)
        if words in Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode():
            return each
        waiting += children(each)
    raise AssertionError(f"no process below {pid} runs {words}")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("launcher", "text"),
    [("nice", "does not call torchrun"), ("torchrun '", "cannot be split into words"), ("$(torchrun)", "does not call torchrun")],
)
def test_a_launcher_that_is_none(folder: Path, launcher: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISD_LAUNCHER", launcher)
    chain.refused(chain.call(folder, "pretrain", "isd"), text, code=3)


def test_the_words_of_a_launcher() -> None:
    run = [sys.executable, "-m", "isd_repro.runtime.torchrun"]
    assert launch.command("srun -N 2 torchrun --nnodes 2;id") == ["srun", "-N", "2", *run, "--nnodes", "2;id"]


@pytest.mark.parametrize(
    ("codes", "launcher", "want"),
    [([0, 0], 0, 0), ([75, 75], 1, 75), ([1, 4], 1, 4), ([75, 1], 1, 1), ([0], 1, 1), ([75], 1, 75)],
)
def test_one_exit_code_for_all(codes: list[int], launcher: int, want: int) -> None:
    assert launch.code_of(codes, launcher) == want
