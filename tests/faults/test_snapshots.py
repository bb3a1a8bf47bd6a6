"""Encoders kept during training: of the epochs asked for, the same after an interruption, and without effect on the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from isd_repro.runtime.errors import Preempted
from isd_repro.tensor_files import load_tensors
from isd_repro.train import loop, schedule
from tests.faults import world

EVERY = ("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}")


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(world.layout_of(folder).snapshots("isd").iterdir())}


def test_snapshots_are_the_encoders_of_their_epochs_and_change_nothing(folder: Path, undisturbed: Path) -> None:
    world.edit(folder, EVERY)
    world.train(folder)
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(undisturbed)["encoder"].read_bytes()
    found = kept(folder)
    assert list(found) == ["epoch-00001.safetensors", "epoch-00002.safetensors"]  # the third epoch's are the run's encoder
    assert kept(undisturbed) == {}
    final, identity = load_tensors(world.outputs(folder)["encoder"], "encoder")
    before = None
    for epoch, name in enumerate(found, 1):
        tensors, about = load_tensors(world.layout_of(folder).snapshots("isd") / name, "encoder")
        assert about == {**identity, "epoch": epoch}
        assert tensors.keys() == final.keys()
        weights = tensors["student.conv1.weight"]
        assert not weights.equal(final["student.conv1.weight"])
        assert before is None or not weights.equal(before)
        before = weights


def test_an_interrupted_run_keeps_the_same_snapshots(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.edit(folder, EVERY)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    world.train(whole)
    rate, steps = schedule.lr_at, iter(range(1000))

    def stop_in_the_second_epoch(epoch: int, optim: object) -> float:
        if next(steps) == 8:
            raise Preempted("stopped", "")
        return rate(epoch, optim)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_at", stop_in_the_second_epoch)
        with pytest.raises(Preempted):
            world.train(folder)
    assert not world.layout_of(folder).snapshots("isd").exists()
    world.train(folder)
    assert kept(folder) == kept(whole)


def test_snapshots_of_an_earlier_run_do_not_stay(folder: Path) -> None:
    stray = world.layout_of(folder).snapshots("isd") / "epoch-00009.safetensors"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of another configuration")
    world.train(folder)
    assert kept(folder) == {}
