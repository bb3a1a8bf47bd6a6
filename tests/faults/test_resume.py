"""Resume state: kept in pairs, believed only where it fits, and named where it does not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_repro.records import PretrainRecord, read_record
from isd_repro.runtime.errors import Preempted
from isd_repro.train import checkpoint, loop
from tests.faults import world
from tests.faults.test_interruptions import assert_equal_runs

Damage = Callable[[bytes], bytes]


def flipped(content: bytes) -> bytes:
    """One bit of a weight."""
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


def marked_as_a_folder(content: bytes) -> bytes:
    """The DOS attribute of a tensor in the archive's index, which no checksum covers; torch would read nothing for it."""
    changed = bytearray(content)
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    changed[at + 38] |= 0x10
    return bytes(changed)


DAMAGE: dict[str, Damage] = {
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "a text": lambda content: b"no checkpoint\n",
    "zeros": lambda content: bytes(len(content)),
    "a flipped bit": flipped,
    "a tensor marked as a folder": marked_as_a_folder,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_point_is_put_aside_and_the_one_before_it_used(
    folder: Path, state: Path, undisturbed: Path, kind: str
) -> None:
    path = state / "checkpoint.pt"
    content = DAMAGE[kind](path.read_bytes())
    path.write_bytes(content)
    kept = {}

    def look(progress: Any) -> bool:
        kept.update({place.name: place.read_bytes() for place in state.glob("*.pt")})
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isd_repro.runtime.signals.StopRequest.__call__", look)
        said = world.train(folder)
    assert f"{path}: damaged checkpoint" in said
    assert "resuming after step 5" in said
    assert kept["checkpoint.damaged.pt"] == content
    assert_equal_runs(folder, undisturbed)


def test_a_second_damaged_point_does_not_overwrite_the_first(folder: Path, state: Path, undisturbed: Path) -> None:
    (state / "checkpoint.damaged.pt").write_bytes(b"the first")
    (state / "checkpoint.pt").write_bytes(b"the second")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", interrupted)
        with pytest.raises(world.Crash):
            world.train(folder)
    assert (state / "checkpoint.damaged.pt").read_bytes() == b"the first"
    assert (state / "checkpoint.damaged2.pt").read_bytes() == b"the second"
    world.train(folder)
    assert_equal_runs(folder, undisturbed)


def interrupted(*_: object) -> None:
    raise world.Crash


def test_only_damaged_points_are_refused_and_left_as_they_are(
    folder: Path, state: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, before = state / "checkpoint.pt", state / "checkpoint.previous.pt"
    for path in (newest, before):
        path.write_bytes(flipped(path.read_bytes()))
    contents = {path: path.read_bytes() for path in (newest, before)}
    failed, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert failed == 4
    assert f"error: {newest}: damaged checkpoint" in error
    assert f"{before}: damaged checkpoint" in error
    assert "hint: delete them to restart this run" in error
    assert {path: path.read_bytes() for path in state.glob("*.pt")} == contents
    assert world.written(folder) == set()
    newest.unlink()
    before.unlink()
    assert "resuming" not in world.train(folder)
    assert_equal_runs(folder, undisturbed)


# --- content that does not fit -------------------------------------------------------------------------------------------


def first_momentum(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(content["optimizer"]["state"].values()))
    return found


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


CONTENT: dict[str, Callable[[dict[str, Any]], object]] = {
    **{f"no {key}": without(key) for key in ("fingerprint", "method", "optimizer", "progress")},
    "no progress.step": without("progress", "step"),
    "an unknown key": lambda content: content["progress"].update(another=1),
    "a step that is a text": lambda content: content["progress"].update(step="10"),
    "a curve of numbers": lambda content: content["progress"].update(curve=[1.0, 2.0]),
    "sums of numbers": lambda content: content["progress"].update(sums={"loss": 1.0}),
    "progress that is a list": lambda content: content.update(progress=[]),
    "a weight too few": lambda content: content["method"].pop("predictor.0.weight"),
    "a weight of another shape": lambda content: content["method"].update({"predictor.0.weight": torch.zeros(3)}),
    "a weight that is no number": lambda content: content["method"]["predictor.0.weight"].fill_(torch.nan),
    "a bank with infinity": lambda content: content["method"]["bank.rows"][3, 0].fill_(torch.inf),
    "a pointer behind the bank": lambda content: content["method"].update({"bank._extra_state": torch.tensor(1000)}),
    "an optimizer without groups": lambda content: content["optimizer"].pop("param_groups"),
    "a momentum of another shape": lambda content: first_momentum(content).update(momentum_buffer=torch.zeros(1, 2)),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_a_point_whose_content_does_not_fit_is_named(
    folder: Path, state: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bytes have their checksums: it was written by something else than this version's `save`."""
    (state / "checkpoint.previous.pt").unlink()
    path = state / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    CONTENT[kind](content)
    torch.save(content, path)
    failed, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert (failed, error.startswith(f"error: {path}: damaged checkpoint (")) == (4, True), error
    assert "Traceback" not in error


@pytest.mark.parametrize("change", [{"step": 1000}, {"step": 4}, {"curve": []}], ids=str)
def test_a_point_that_contradicts_the_run_is_named(
    folder: Path, state: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = state / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    content["progress"].update(change)
    torch.save(content, path)
    failed, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert (failed, f"error: {path}: has " in error, "5 an epoch" in error) == (4, True, True), error


DAMAGED_STATE = {
    "attempts.json": (b"", b"\n", b"[]x", b'[{"started": "x"', b"\xff\xfe", b'{"event": "start"}\n'),
    "metrics.jsonl": (b"\n", b'{"epoch": 1, "lo\n', b"[1, 2]\n", b'{"x": 1.0}\n', b"\xff\xfe\x00\n", b'{"epoch": "one"}\n'),
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, kinds in DAMAGED_STATE.items() for content in kinds])
def test_a_damaged_file_of_the_state_is_put_aside(
    folder: Path, state: Path, undisturbed: Path, name: str, content: bytes
) -> None:
    """Whatever a crash left of it, the run goes on, and what was there is kept."""
    path, kept = state / name, {}
    path.write_bytes(content + (path.read_bytes() if name == "metrics.jsonl" else b""))
    content = path.read_bytes()

    def look(progress: Any) -> bool:
        kept.update({place.name: place.read_bytes() for place in state.glob("*.damaged*")})
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isd_repro.runtime.signals.StopRequest.__call__", look)
        said = world.train(folder)
    assert f"{path}:" in said
    assert "resuming after step 10" in said
    assert kept == {name.replace(".", ".damaged."): content}
    remarks = read_record(world.outputs(folder)["record"], PretrainRecord).warnings
    assert remarks == (("attempts before step 10 are not listed: their file was damaged",) if "attempts" in name else ())
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(undisturbed)["encoder"].read_bytes()


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "lock"])
def test_an_empty_state_file_is_no_hindrance(folder: Path, state: Path, undisturbed: Path, name: str) -> None:
    (state / name).write_bytes(b"")
    assert "resuming after step 10" in world.train(folder)
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(undisturbed)["encoder"].read_bytes()


def test_rows_that_a_power_cut_lost_are_written_again(folder: Path, state: Path, undisturbed: Path) -> None:
    """The checkpoint reached the disk, the end of the rows did not."""
    path = state / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20])
    assert "resuming after step 10" in world.train(folder)
    assert_equal_runs(folder, undisturbed, "purity")  # what was measured beside the curve is gone with the row


# --- other places, other code ------------------------------------------------------------------------------------------------


def test_a_profile_that_was_moved_goes_on(folder: Path, state: Path, undisturbed: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "profile"
    moved.parent.mkdir()
    folder.rename(moved)
    assert "resuming after step 10" in world.train(moved)
    assert_equal_runs(moved, undisturbed)


def test_a_state_under_the_name_of_another_is_refused(folder: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.edit(folder, ("tau_student: 0.1", "tau_student: 0.2"))
    with pytest.MonkeyPatch.context() as patch:
        world.crash_at(patch, 1, after=False)
        with pytest.raises(world.Crash):
            world.train(folder)
    (other,) = [path for path in world.states(folder) if path != state]
    shutil.copytree(state, other, dirs_exist_ok=True)
    failed, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert (failed, f"belongs to configuration {state.name}, not {other.name}" in error) == (4, True), error


def test_other_code_is_refused_and_goes_on_only_when_told(
    folder: Path, state: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    was = checkpoint.code_of("isd", torch.device("cpu"))
    monkeypatch.setattr(checkpoint, "code_of", lambda *_: {**was, "nn/bank.py": "0123456789ab"})
    failed, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert failed == 1
    assert f"nn/bank.py was {was['nn/bank.py']}, is 0123456789ab" in error
    assert "train/loop.py" not in error
    assert "delete the folder to restart; or set ISD_RESUME_CHANGED=1" in error
    assert world.written(folder) == set()
    monkeypatch.setenv("ISD_RESUME_CHANGED", "1")
    assert "resuming after step 10" in world.train(folder)
    record = read_record(world.outputs(folder)["record"], PretrainRecord)
    assert record.warnings == (
        f"resumed after step 10 with different code (nn/bank.py was {was['nn/bank.py']}, is 0123456789ab)",
    )
    assert world.outputs(folder)["encoder"].read_bytes() == world.outputs(undisturbed)["encoder"].read_bytes()


def test_another_number_of_threads_is_refused_unless_the_profile_states_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums over several threads are rounded in another order."""
    world.edit(folder, ("numerics: {seed: 0", "numerics: {threads: 1, seed: 0"))
    one = world.stopped_at(folder, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert "resuming after step 10" in world.train(folder)  # with one, as stated
        assert torch.get_num_threads() == 2
        world.edit(folder, ("threads: 1, ", ""))
        other = world.stopped_at(folder, 3)
    finally:
        torch.set_num_threads(before)
    assert other.name != one.name
    failed, error = world.command(folder, "pretrain", "isd", capsys=capsys)
    assert failed == 1
    assert f"{other}: this run was trained up to step 10 with different arithmetic: cpu was " in error
    assert "2 threads, is " in error
    assert "OMP_NUM_THREADS" in error


def test_the_code_of_a_run_is_what_makes_its_numbers() -> None:
    names = set(checkpoint.code_of("isd", torch.device("cpu")))
    assert names >= {"methods/isd.py", "nn/bank.py", "nn/ema.py", "nn/backbones.py", "nn/batchnorm.py", "nn/heads.py"}
    assert names >= {"train/loop.py", "train/schedule.py", "data/augment.py", "data/loader.py", "torch"}
    assert not {"methods/moco.py", "train/pretrain.py", "cli.py"} & names


# --- clock and attempts ------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_nothing(folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back by years between two processes, and at every look within one."""
    state = world.stopped_at(folder, 3)
    for path in state.iterdir():
        path.touch()
    jumps = iter(range(0, 10**9, 86_400))
    monkeypatch.setattr(time, "time", lambda: 1.0e8 - next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: 10**17 - 10**9 * next(jumps))
    assert "resuming after step 10" in world.train(folder)
    assert_equal_runs(folder, undisturbed)
    record = read_record(world.outputs(folder)["record"], PretrainRecord)
    assert all(0 <= attempt.seconds < 600 for attempt in record.attempts)
    assert 0 <= record.provenance.seconds < 600


def test_the_record_has_every_attempt(folder: Path) -> None:
    """One that fails, one that is killed after its first checkpoint, one that is stopped, one that finishes."""
    with pytest.MonkeyPatch.context() as patch:
        world.crash_at(patch, 1, after=False)
        with pytest.raises(world.Crash):
            world.train(folder)
    with pytest.MonkeyPatch.context() as patch:
        real = checkpoint.Attempts.note
        patch.setattr(checkpoint.Attempts, "note", lambda self, *how: None if how else real(self))  # a killed one says nothing
        world.crash_at(patch, 2, after=False)
        with pytest.raises(world.Crash):
            world.train(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isd_repro.runtime.signals.StopRequest.__call__", lambda self: True)
        with pytest.raises(Preempted):
            world.train(folder)
    world.train(folder)
    record = read_record(world.outputs(folder)["record"], PretrainRecord)
    found = [(attempt.outcome, attempt.first_step, attempt.last_step) for attempt in record.attempts]
    assert found == [("failed", 0, 5), ("killed", 0, 5), ("stopped", 5, 6), ("finished", 6, 15)]
    assert {attempt.device for attempt in record.attempts} == {f"cpu ({checkpoint.arithmetic()})"}
