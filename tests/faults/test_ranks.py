"""Several ranks that are killed, signalled, misconfigured or diverge: all end, with words, and the run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from isd_repro.records import EvaluationRecord, PretrainRecord, read_record
from isd_repro.runtime import launcher as launch
from isd_repro.runtime.errors import ConfigError
from tests.faults import world
from tests.ranks.together import Together

LOST = "another process of this run has ended or cannot be reached"


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    with Together(tmp_path_factory.mktemp("together")) as server:
        yield server


@pytest.fixture(scope="module")
def two(prepared: Path, together: Together, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run on two ranks, never disturbed."""
    copy = tmp_path_factory.mktemp("two") / "profile"
    shutil.copytree(prepared, copy)
    world.edit(copy, world.LONGER)
    ended = together.run(2, copy, "pretrain", "isd")
    assert ended.codes == [0, 0], ended.said
    assert ended.said.count("epoch 16/16") == 1  # rank 0 alone speaks
    return copy


def record_of(folder: Path) -> PretrainRecord:
    return read_record(world.outputs(folder)["record"], PretrainRecord)


def step_of(folder: Path) -> int:
    (state,) = world.states(folder)
    return int(torch.load(state / "checkpoint.pt", weights_only=True)["progress"]["step"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_the_run_resumes(together: Together, folder: Path, two: Path, rank: int) -> None:
    """On as many ranks: bit for bit. The survivor notices by itself; nobody ends it."""
    world.edit(folder, world.LONGER)
    ended = together.run(2, folder, "pretrain", "isd", said="epoch 3/", number=signal.SIGKILL, to=(rank,))
    assert ended.codes[rank] == -signal.SIGKILL, ended.said
    assert ended.codes[1 - rank] == 1, ended.said
    assert LOST in ended.said
    assert "the same command resumes the run, on any number of processes" in ended.said
    assert "Traceback" not in ended.said
    if rank == 1:
        assert f"last good checkpoint: {world.states(folder)[0]}/checkpoint.pt, of step " in ended.said
    assert world.written(folder) == set()
    assert 10 <= step_of(folder) < 80  # the third epoch may have been told and not yet saved
    ended = together.run(2, folder, "pretrain", "isd")
    assert (ended.codes, "resuming after step" in ended.said) == ([0, 0], True), ended.said
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(two)["encoder"].read_bytes()
    assert record_of(folder).curve == record_of(two).curve
    assert [attempt.outcome for attempt in record_of(folder).attempts] == ["killed" if rank == 0 else "failed", "finished"]
    assert world.states(folder) == []


@pytest.mark.parametrize("to", [(1,), (0, 1)], ids=["other", "both"])
def test_a_signal_to_any_rank_stops_all_with_their_state_saved(
    together: Together, folder: Path, two: Path, to: tuple[int]
) -> None:
    world.edit(folder, world.LONGER)
    ended = together.run(2, folder, "pretrain", "isd", said="epoch 3/", number=signal.SIGTERM, to=to)
    assert ended.codes == [75, 75], ended.said
    words = "a signal to another rank" if to == (1,) else "SIGTERM"
    assert ended.said.count(f"isd: {words}: stopped after step") == 1, ended.said
    (state,) = world.states(folder)
    assert (state / "resume-me").read_text("utf-8").splitlines()[1] == f"step: {step_of(folder)} of 80"
    ended = together.run(2, folder, "pretrain", "isd")
    assert ended.codes == [0, 0], ended.said
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(two)["encoder"].read_bytes()


def test_a_run_of_two_ranks_ends_on_one(together: Together, folder: Path) -> None:
    """And then extracts on two: the same bytes as on one."""
    world.edit(folder, world.LONGER)
    ended = together.run(2, folder, "pretrain", "isd", said="epoch 3/", number=signal.SIGTERM, to=(1,))
    assert ended.codes == [75, 75], ended.said
    step = step_of(folder)
    assert f"resuming after step {step}" in world.train(folder)
    assert (record_of(folder).steps, len(record_of(folder).curve)) == (80, 16)
    features = folder / "runs" / "isd" / "features.safetensors"
    assert together.run(1, folder, "extract", "isd").codes == [0]
    want = features.read_bytes()
    features.unlink()
    ended = together.run(2, folder, "extract", "isd")
    assert ended.codes == [0, 0], ended.said
    assert features.read_bytes() == want


def test_the_linear_protocol_on_two_ranks(together: Together, folder: Path) -> None:
    """The record of one process, written once."""
    for stage in ("pretrain", "extract", "linear"):
        ended = together.run(1, folder, stage, "isd")
        assert ended.codes == [0], ended.said
    path = world.layout_of(folder).record("isd", "linear")
    want = read_record(path, EvaluationRecord)
    path.unlink()
    ended = together.run(2, folder, "linear", "isd")
    assert ended.codes == [0, 0], ended.said
    assert ended.said.count("linear epoch 40 ") == 1
    found = read_record(path, EvaluationRecord)
    assert (found.scores, found.predictions, found.settings) == (want.scores, want.predictions, want.settings)


def test_a_run_that_diverges_stops_on_all_ranks_at_one_step(together: Together, folder: Path) -> None:
    world.edit(folder, ("lr: 0.05", "lr: 1e30"))
    ended = together.run(2, folder, "pretrain", "isd")
    assert ended.codes == [1, 1], ended.said
    steps = [line.partition("step ")[2].partition(" ")[0] for line in ended.said.splitlines() if line.startswith("error: ")]
    assert len(steps) == 2, ended.said
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("ranks", "words", "code", "text"),
    [
        (3, ("pretrain", "isd"), 3, "optim.batch_size: 16 images for 3 processes"),
        (2, ("pretrain", "no-such"), 3, "no run 'no-such'"),
        (2, ("knn", "isd"), 3, "`knn` runs in one process, but torchrun started 2"),
        (2, ("extract", "isd"), 4, "encoder.safetensors: no such file"),
    ],
)
def test_what_ranks_cannot_do_is_said(
    together: Together, folder: Path, ranks: int, words: tuple[str, ...], code: int, text: str
) -> None:
    ended = together.run(ranks, folder, *words)
    assert ended.codes == [code] * ranks, ended.said
    assert text in ended.said
    assert f"error: rank {ranks - 1} of {ranks}: " in ended.said
    assert world.states(folder) == []


# --- the launcher ---------------------------------------------------------------------------------------------------------


def start(folder: Path, *words: str, launcher: str = "torchrun --nproc-per-node 2", **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ISD_LAUNCHER": launcher, **env}
    command = [sys.executable, "-m", "isd_repro", *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_stage_under_the_launcher_is_stopped_and_resumed(folder: Path, together: Together, two: Path) -> None:
    """Real torchrun: SIGTERM to the one process that the user knows; all save, and 75 is its exit code, too."""
    world.edit(folder, world.LONGER)
    with start(folder, "pretrain", "isd") as running:
        lines = world.wait_for_epochs(running, 2)
        running.terminate()
        assert running.stderr is not None
        said = "".join([*lines, running.stderr.read()])
    assert (running.returncode, "stopped after step" in said) == (75, True), said
    assert "Traceback" not in said
    ended = together.run(2, folder, "pretrain", "isd")
    assert ended.codes == [0, 0], ended.said
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(two)["encoder"].read_bytes()


@pytest.mark.slow
def test_a_rank_killed_under_the_launcher(folder: Path, two: Path) -> None:
    world.edit(folder, world.LONGER)
    with start(folder, "pretrain", "isd") as running:
        lines = world.wait_for_epochs(running, 2)
        subprocess.run(["kill", "-9", str(ranks_below(running.pid)[1])], check=True)
        assert running.stderr is not None
        said = "".join([*lines, running.stderr.read()])
    assert running.returncode == 1, said
    assert LOST in said
    assert "was ended by SIGKILL" in said
    assert "Traceback" not in said
    with start(folder, "pretrain", "isd") as running:
        assert running.stderr is not None
        said = running.stderr.read()
    assert (running.returncode, "resuming after step" in said) == (0, True), said
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(two)["encoder"].read_bytes()


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


def dvc_folder(prepared: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A profile with a `dvc.yaml` of one stage, and the environment in which DVC finds `isd-repro` and a launcher."""
    folder = tmp_path / "profile"
    shutil.copytree(prepared, folder)
    world.edit(folder, world.LONGER)
    stages = {
        "pretrain": {"cmd": "isd-repro pretrain isd", "deps": ["data/prepared/digits"], "outs": ["runs/isd/encoder.safetensors"]}
    }
    with (folder / "dvc.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump({"stages": stages}, file)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "isd-repro").write_text(f'#!/bin/sh\nexec {sys.executable} -m isd_repro "$@"\n', "utf-8")
    (bin_folder / "isd-repro").chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    run = [sys.executable, "-m", "dvc"]
    subprocess.run([*run, "init", "--no-scm", "-q"], cwd=folder, env=environment, check=True)
    return folder, {**environment, "ISD_LAUNCHER": "torchrun --nproc-per-node 2"}


REPRO = [sys.executable, "-m", "dvc", "repro"]


@pytest.mark.slow
def test_dvc_repro_with_a_launcher(prepared: Path, tmp_path: Path, two: Path) -> None:
    """From `dvc.yaml` as it is: the setting is the machine's, and the second `dvc repro` without it finds nothing to do."""
    folder, environment = dvc_folder(prepared, tmp_path)
    ended = subprocess.run(REPRO, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(two)["encoder"].read_bytes()
    environment.pop("ISD_LAUNCHER")
    ended = subprocess.run(REPRO, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert "didn't change, skipping" in ended.stdout, ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["isd_repro.runtime.torchrun", "isd_repro pretrain"])
def test_sigterm_to_the_launcher_below_dvc(prepared: Path, tmp_path: Path, two: Path, whom: str) -> None:
    """torchrun, or the stage that started it, is told to stop: the stage ends with 75, and `dvc repro` goes on from there."""
    folder, environment = dvc_folder(prepared, tmp_path)
    with subprocess.Popen(
        REPRO, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        lines = world.wait_for_epochs(running, 2)
        os.kill(below(running.pid, whom), signal.SIGTERM)
        assert running.stderr is not None
        said = "".join([*lines, running.stderr.read()])
    assert (running.returncode != 0, "exited with 75" in said) == (True, True), said
    (state,) = world.states(folder)
    step = step_of(folder)
    assert (state / "resume-me").read_text("utf-8").splitlines()[1] == f"step: {step} of 80"
    ended = subprocess.run(REPRO, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, f"resuming after step {step}" in ended.stderr) == (0, True), ended.stdout + ended.stderr
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(two)["encoder"].read_bytes()


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


def ranks_below(pid: int) -> list[int]:
    (torchrun,) = children(pid)
    return children(torchrun)


@pytest.mark.parametrize(
    ("launcher", "text"),
    [("nice", "does not call torchrun"), ("torchrun '", "cannot be split into words"), ("$(torchrun)", "does not call torchrun")],
)
def test_a_launcher_that_is_none(
    folder: Path, launcher: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISD_LAUNCHER", launcher)
    code, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert (code, text in error) == (3, True), error


def test_the_words_of_a_launcher() -> None:
    run = [sys.executable, "-m", "isd_repro.runtime.torchrun"]
    assert launch.command("srun -N 2 torchrun --nnodes 2;id") == ["srun", "-N", "2", *run, "--nnodes", "2;id"]
    with pytest.raises(ConfigError):
        launch.command("")


@pytest.mark.parametrize(
    ("codes", "launcher", "want"),
    [
        ({"0": 0, "1": 0}, 0, 0),
        ({"0": 75, "1": 75}, 1, 75),
        ({"0": 1, "1": 4}, 1, 4),
        ({"0": 75, "1": 1}, 1, 1),
        ({"0": 0}, 1, 1),
        ({"0": 75}, 1, 75),
    ],
)
def test_one_exit_code_for_all(codes: dict[str, int], launcher: int, want: int) -> None:
    assert launch.code_of(codes, launcher) == want
