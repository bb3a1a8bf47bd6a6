"""A run that is stopped, crashes or is disturbed ends, when started again, with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_repro import provenance
from isd_repro.provenance import source_hash
from isd_repro.runtime.errors import Preempted, UserError
from isd_repro.tensor_files import load_tensors
from isd_repro.train import checkpoint
from tests.faults import chain, world

EVERY = ("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}")


def assert_equal_runs(folder: Path, undisturbed: Path, *lost: str) -> None:
    """Encoder bytes, every row but its speed and the keys `lost`, and the record but for time, machine and state of the code."""
    assert world.written(folder) == world.COMPLETE
    assert world.states(folder) == []
    ours, theirs = (
        {name: world.parsed(path, path.read_bytes()) for name, path in world.outputs(place).items()}
        for place in (folder, undisturbed)
    )
    for found in (ours, theirs):
        found["metrics"] = [{key: value for key, value in row.items() if key not in lost} for row in found["metrics"]]
    assert ours == theirs


def step_of(state: Path) -> int:
    return int(torch.load(state / "checkpoint.pt", weights_only=True)["progress"]["step"])


def stop(number: signal.Signals = signal.SIGTERM) -> None:
    signal.raise_signal(number)


def test_the_undisturbed_run_has_trained(undisturbed: Path) -> None:
    """Otherwise equal bytes would say nothing."""
    record = world.record(undisturbed)
    assert (record.steps, [row["epoch"] for row in record.curve]) == (15, [1, 2, 3])
    tensors, identity = load_tensors(world.outputs(undisturbed)["encoder"], "encoder")
    assert identity["encoders"] == ["student", "teacher"]
    assert any((tensors[key] != tensors[key.replace("student", "teacher")]).any() for key in tensors if "student" in key)


# --- real processes -----------------------------------------------------------------------------------------------------


def test_a_second_process_and_sigterm(folder: Path, undisturbed_long: Path) -> None:
    """While a run trains, another process is refused; asked to stop, the run saves its state and says how to go on."""
    world.edit(folder, world.LONGER)
    with world.process(folder) as running:
        said = world.wait_for_epochs(running, 1)
        os.kill(running.pid, signal.SIGSTOP)
        chain.refused(chain.call(folder, "pretrain", "isd"), f"already being trained by process {running.pid}", code=1)
        running.send_signal(signal.SIGTERM)
        os.kill(running.pid, signal.SIGCONT)
        said += world.wait_for_epochs(running, 1000)
        assert running.wait() == 75
    text = "".join(said)
    assert "error: isd: SIGTERM: stopped after step" in text
    assert "hint: run the same command again to resume" in text
    assert "Traceback" not in text
    assert world.written(folder) == set()
    (state,) = world.states(folder)
    command = f"command: isd-repro pretrain isd --params {folder}/params.yaml"
    assert (state / "resume-me").read_text("utf-8").splitlines() == ["run: isd", f"step: {step_of(state)} of 120", command]
    assert "resuming after step" in world.train(folder)
    assert_equal_runs(folder, undisturbed_long)


# --- a crash at every write, and a stop at every kind of step --------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_crash_after_a_write(folder: Path, undisturbed: Path, count: int) -> None:
    """Two checkpoints, then encoder, metrics and record: five writes, after each of which a process may end."""
    world.stopped_at(folder, count, after=True)
    if count > 2:
        assert world.encoder(folder) == world.encoder(undisturbed)
    assert "resuming after step" in world.train(folder)
    assert world.record(folder).sources == (source_hash(),)
    assert_equal_runs(folder, undisturbed)


@pytest.mark.parametrize("step", [1, 5, 7])
def test_the_resume_point_is_of_the_step_that_the_signal_met(folder: Path, undisturbed: Path, step: int) -> None:
    """One step and one save, wherever it comes: also where an epoch ends and saves by itself.

    Another signal while it saves, as a scheduler's SIGTERM after its SIGUSR1, is no repetition, and the save is finished.
    """
    saves: list[int] = []
    real = checkpoint.save

    def save(*arguments: Any) -> None:
        saves.append(arguments[-1].step)
        if saves[-1] == step:
            stop()
        real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        world.at_step(patch, step, lambda: stop(signal.SIGUSR1))
        with pytest.raises(Preempted, match=f"SIGUSR1: stopped after step {step};"):
            world.train(folder)
    assert [at for at in saves if at >= step] == [step]
    world.train(folder)
    assert_equal_runs(folder, undisturbed)


def test_after_the_last_step_a_run_is_finished_and_the_next_one_not_begun(folder: Path, undisturbed: Path) -> None:
    text = (folder / "params.yaml").read_text("utf-8")
    other = text[text.index("  isd:\n") :].replace("  isd:\n", "  other:\n").replace("tau_student: 0.1", "tau_student: 0.3")
    (folder / "params.yaml").write_text(text + other, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        world.at_step(patch, 15, stop)
        result = chain.call(folder, "pretrain", "isd", "other")
    chain.refused(result, "SIGTERM: stopped before other", code=75)
    assert_equal_runs(folder, undisturbed)


def test_a_signal_before_anything_is_read_asks_for_the_same_command(folder: Path, undisturbed: Path) -> None:
    """Imports take seconds; a scheduler that stops the run meanwhile starts again what ended with 75."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "remember_code", stop)
        result = chain.call(folder, "pretrain", "isd")
    chain.refused(result, "SIGTERM: stopped before isd", code=75)
    world.train(folder)
    assert_equal_runs(folder, undisturbed)


def test_resume_me_is_gone_when_a_run_is_taken_up_again(folder: Path) -> None:
    """Otherwise a wrapper would repeat for ever what failed for another reason."""

    def fail() -> None:
        raise UserError("on purpose")

    for call, error, left in ((stop, Preempted, True), (fail, UserError, False)):
        with pytest.MonkeyPatch.context() as patch:
            world.at_step(patch, 7, call)
            with pytest.raises(error):
                world.train(folder)
        (state,) = world.states(folder)
        assert (state / "resume-me").exists() == left


def test_a_changed_parameter_starts_afresh(folder: Path, state: Path) -> None:
    """The state of the old values is neither used nor lost."""
    world.edit(folder, ("tau_student: 0.1", "tau_student: 0.2"))
    assert "resuming" not in world.train(folder)
    assert world.states(folder) == [state]
    assert world.written(folder) == world.COMPLETE


# --- encoders kept during training ------------------------------------------------------------------------------------------


def test_snapshots_are_the_encoders_of_their_epochs_and_change_nothing(folder: Path, undisturbed: Path) -> None:
    """Also of a run that was interrupted; those of an earlier run do not stay."""
    world.edit(folder, EVERY)
    snapshots = world.layout_of(folder).snapshots("isd")
    snapshots.mkdir(parents=True)
    (snapshots / "epoch-00009.safetensors").write_bytes(b"of another configuration")
    with pytest.MonkeyPatch.context() as patch:
        world.at_step(patch, 9, stop)
        with pytest.raises(Preempted):
            world.train(folder)
    world.train(folder)
    assert world.encoder(folder) == world.encoder(undisturbed)
    names = sorted(path.name for path in snapshots.iterdir())
    assert names == ["epoch-00001.safetensors", "epoch-00002.safetensors"]  # the third epoch's are the run's encoder
    assert list(world.layout_of(undisturbed).snapshots("isd").iterdir()) == []
    final, identity = load_tensors(world.outputs(folder)["encoder"], "encoder")
    found = [load_tensors(snapshots / name, "encoder") for name in names]
    assert [about for _, about in found] == [{**identity, "epoch": epoch} for epoch in (1, 2)]
    one, other, last = (tensors["student.conv1.weight"] for tensors in (found[0][0], found[1][0], final))
    assert not any(first.equal(second) for first, second in ((one, other), (other, last), (one, last)))
