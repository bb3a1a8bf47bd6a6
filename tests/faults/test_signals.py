"""Signals at seeded moments, to the child, to the group, to DVC alone; and two processes that want the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from isd_repro import cli
from isd_repro.config import reader as config
from isd_repro.data.prepare import prepare
from isd_repro.evaluations import features
from isd_repro.runtime import files, signals
from isd_repro.runtime.errors import Preempted, UserError
from isd_repro.train import checkpoint, loop
from tests.faults import world
from tests.faults.forks import Blow, Ended, Forks
from tests.faults.test_interruptions import assert_equal_runs
from tests.faults.test_kills import STAGES, Station, run

KINDS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU]


def text_of(state: Path) -> list[str]:
    return (state / "resume-me").read_text("utf-8").splitlines()


def assert_stopped(ended: Ended, folder: Path, kind: str) -> None:
    """Exit 75, a checkpoint, and the words for wrappers."""
    assert (ended.code, ended.orphans) == (75, False), ended.said
    assert f"error: isd: {kind}: stopped after step " in ended.said
    assert "hint: run the same command again to resume" in ended.said
    assert world.written(folder) == set()
    (state,) = world.states(folder)
    step = torch.load(state / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert text_of(state) == ["run: isd", f"step: {step} of 80", f"command: isd-repro pretrain isd --params {folder}/params.yaml"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_makes_a_resume_point(forks: Forks, folder: Path, undisturbed_long: Path, number: signal.Signals) -> None:
    world.edit(folder, world.LONGER)
    ended = forks.run(folder, "pretrain", "isd", blow=Blow(said="epoch 2/", number=number))
    assert_stopped(ended, folder, number.name)
    ended = forks.run(folder, "pretrain", "isd")
    assert (ended.code, "resuming after step" in ended.said) == (0, True), ended.said
    assert_equal_runs(folder, undisturbed_long)


def test_a_signal_to_the_group_counts_once(forks: Forks, folder: Path, undisturbed_long: Path) -> None:
    """DVC and its stage get it at once, DVC dies of it, and the stage sees that as well: three reasons to stop, one stop."""
    world.edit(folder, world.LONGER)
    ended = forks.run(folder, "pretrain", "isd", blow=Blow(said="epoch 2/", number=signal.SIGTERM, to="group"))
    assert_stopped(ended, folder, "SIGTERM")
    assert forks.run(folder, "pretrain", "isd").code == 0
    assert_equal_runs(folder, undisturbed_long)


def test_the_stage_of_a_dvc_that_died_stops(forks: Forks, folder: Path, undisturbed_long: Path) -> None:
    world.edit(folder, world.LONGER)
    ended = forks.run(folder, "pretrain", "isd", blow=Blow(said="epoch 2/", to="parent"))
    assert_stopped(ended, folder, "DVC has ended")
    assert forks.run(folder, "pretrain", "isd").code == 0
    assert_equal_runs(folder, undisturbed_long)


def test_pre_emption_by_a_scheduler(forks: Forks, folder: Path, undisturbed_long: Path) -> None:
    """SIGUSR1 some time before, then SIGTERM while it saves: another signal is no repetition, and the save is finished."""
    world.edit(folder, world.LONGER)
    stopped: list[int] = []
    real = checkpoint.save

    def save(*arguments: object) -> None:
        if progress_of(arguments).step % 5:
            signal.raise_signal(signal.SIGTERM)
        real(*arguments)  # type: ignore[arg-type]

    def stop_now(step: int) -> None:
        if step == 22 and not stopped:
            stopped.append(step)
            signal.raise_signal(signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        at_step(patch, stop_now)
        with pytest.raises(Preempted, match="SIGUSR1: stopped after step 22"):
            world.train(folder)
    world.train(folder)
    assert_equal_runs(folder, undisturbed_long)


def progress_of(arguments: tuple[object, ...]) -> checkpoint.Progress:
    assert isinstance(arguments[-1], checkpoint.Progress)
    return arguments[-1]


def at_step(patch: pytest.MonkeyPatch, call: object) -> None:
    """Call something with the number of every step, counted from 1, while its learning rate is set."""
    real, count = loop._set_lr, iter(range(1, 10**9))

    def set_lr(*arguments: object) -> None:
        call(next(count))  # type: ignore[operator]
        real(*arguments)  # type: ignore[arg-type]

    patch.setattr(loop, "_set_lr", set_lr)


@pytest.mark.parametrize("step", [1, 5, 7])
def test_the_resume_point_is_of_the_step_that_the_signal_met(folder: Path, undisturbed: Path, step: int) -> None:
    """One step and one save, wherever it comes: also where an epoch ends and saves by itself."""
    saves: list[int] = []
    real = checkpoint.save

    def save(*arguments: object) -> None:
        saves.append(progress_of(arguments).step)
        real(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        at_step(patch, lambda at: signal.raise_signal(signal.SIGTERM) if at == step else None)
        with pytest.raises(Preempted, match=f"stopped after step {step};"):
            world.train(folder)
    assert [at for at in saves if at >= step] == [step]
    world.train(folder)
    assert_equal_runs(folder, undisturbed)


def test_after_the_last_step_a_run_is_finished_and_the_next_one_not_begun(
    folder: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "params.yaml").read_text("utf-8")
    other = text[text.index("  isd:\n") :].replace("  isd:\n", "  other:\n").replace("tau_student: 0.1", "tau_student: 0.3")
    (folder / "params.yaml").write_text(text + other, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, lambda at: signal.raise_signal(signal.SIGTERM) if at == 15 else None)
        code, error = world.command(folder, "pretrain", "isd", "other", capsys=capsys)
    assert (code, "SIGTERM: stopped before other" in error) == (75, True), error
    assert_equal_runs(folder, undisturbed)


def test_resume_me_is_gone_when_a_run_is_taken_up_again(folder: Path, undisturbed: Path) -> None:
    """Otherwise a wrapper would repeat for ever what failed for another reason."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, lambda at: signal.raise_signal(signal.SIGTERM) if at == 7 else None)
        with pytest.raises(Preempted):
            world.train(folder)
    (state,) = world.states(folder)
    assert (state / "resume-me").is_file()
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, fail)
        with pytest.raises(UserError, match="on purpose"):
            world.train(folder)
    assert not (state / "resume-me").exists()


def fail(step: int) -> None:
    raise UserError("on purpose")


@pytest.mark.parametrize("number", KINDS, ids=lambda number: number.name)
def test_each_signal_asks_for_a_stop(number: signal.Signals) -> None:
    with signals.stop_on_signal() as stop:
        signal.raise_signal(number)
        assert stop.reason == number.name


def test_the_same_signal_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with signals.stop_on_signal() as stop:
        assert not stop()
        for moment in (100.0, 100.5):
            clock[0] = moment
            signal.raise_signal(signal.SIGTERM)
        assert (stop(), stop.reason) == (True, "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_same_signal_again_ends_the_process_at_once() -> None:
    code = (
        "import signal, time\nfrom isd_repro.runtime import signals\nsignals.INSIST = 0.0\n"
        "with signals.stop_on_signal() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print(stop.reason, flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n"), done.stderr


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


# --- the other stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "pretrain"])
def test_a_signal_to_another_stage(forks: Forks, line: dict[str, Station], tmp_path: Path, stage: str) -> None:
    """Nothing half-written, the promised exit code, and the repetition ends as if nothing had been."""
    station = line[stage]
    resumable = stage == "evaluate"
    seen = set()
    for turn in range(1):
        seed = f"{stage} signal {turn}"
        draws = random.Random(seed)
        place = tmp_path / str(turn)
        shutil.copytree(station.before, place)
        blow = Blow(at=draws.randint(1, station.ended.operations), number=draws.choice(KINDS))
        ended = run(forks, place, station.words, blow)
        about = f"seed {seed!r}, {blow}\n{ended.said}"
        assert ended.code in (0, 75 if resumable else 130, 130), about
        assert "Traceback" not in ended.said, about
        seen.add(ended.code)
        left = [path for path in place.rglob("*") if path.name.startswith(".partial") or path.suffix == ".partial"]
        left = [path for path in left if path.suffix != ".lock"]  # a lock file that nobody holds is no hindrance
        if stage == "prepare, external":  # an unfinished pack stays: the repetition goes on from its journal
            left = [path for path in left if path.parent.name != "packs" or not path.name.startswith(".partial-")]
        assert left == [], about
        assert run(forks, place, station.words).code == 0
        different = world.differences(world.tree(place), world.tree(station.after))
        assert different == [], f"{different}; {about}"
    assert seen != {0}, "no signal came in time"


@pytest.mark.parametrize(("options", "promised"), [((), 75), (("--no-cache",), 130)], ids=["kept", "not kept"])
def test_an_evaluation_that_is_stopped_while_it_extracts(
    folder: Path, undisturbed: Path, options: tuple[str, ...], promised: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is kept decides whether it can go on."""
    ask = ["evaluate", "--ckpt", str(world.outputs(undisturbed)["encoder"]), "--prepared", "data/prepared/digits", *options]
    real = features.require_finite

    def extracted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "require_finite", extracted)
        code, error = world.command(folder, *ask, capsys=capsys)
    assert (code, "run the same command again" in error) == (promised, promised == 75), error
    assert list(folder.glob(".state/features/once-*")) == []
    assert world.command(folder, *ask, capsys=capsys)[0] == 0


# --- two processes ----------------------------------------------------------------------------------------------------------


def test_two_prepares_of_one_subset(folder: Path, tmp_path: Path) -> None:
    params, layout = config.load(folder / "params.yaml")
    before = world.tree(folder)
    begun: list[str] = []
    real = files.temporary

    def second(place: Path) -> object:
        begun.append(str(place))
        assert len(begun) == 1, "the second one works, too"
        with pytest.raises(UserError, match=f"already being prepared by process {os.getpid()} on "):
            prepare("digits", params, layout, Console(quiet=True))
        return real(place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "temporary", second)
        prepare("digits", params, layout, Console(quiet=True))
    assert len(begun) == 1
    assert world.differences(world.tree(folder), before) == []


def test_a_living_prepare_is_not_swept(tmp_path: Path) -> None:
    """Another profile with the same external folder begins while this one packs."""
    with files.temporary(tmp_path / ".partial_one") as one:
        (one / "store.u8").write_bytes(b"pixels")
        (tmp_path / ".partial_two").mkdir()
        files.sweep(tmp_path, ".partial_")
        assert (one / "store.u8").read_bytes() == b"pixels"
        assert sorted(path.name for path in tmp_path.iterdir()) == [".partial_one", ".partial_one.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    dead, living = (tmp_path / f".record.json.{name}.partial" for name in ("abcdefgh", "ijklmnop"))
    another = tmp_path / ".record.json.of-somebody.partial"
    for place in (dead, another):
        place.write_bytes(b"half")
    with FileLock(living):
        files.write_atomic(path, b"whole")
        assert {place.name for place in tmp_path.iterdir()} == {living.name, "record.json", another.name}


def test_a_lock_is_held_once_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.exclusive(path, "held"):
        with pytest.raises(files.Busy, match=f"held by process {os.getpid()} on "), files.exclusive(path, "held"):
            pass
        assert path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_new_file_is_named_before_its_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut must not reorder: content, then name, then folder."""
    order: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "content"
        order.append(f"{kind}, {'named' if (tmp_path / 'x').exists() else 'unnamed'}")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_atomic(tmp_path / "x", b"content")
    assert order == ["content, unnamed", "folder, named"]


def test_the_words_at_an_interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stage(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "_stage", stage)
    code, error = world.command(folder, "knn", "isd", capsys=capsys)
    assert (code, error) == (130, "interrupted: finished outputs are kept, partial files were removed\n")
