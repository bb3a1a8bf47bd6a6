"""A run that is stopped, crashes or fails ends, when started again, with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from isd_repro.provenance import source_hash
from isd_repro.records import PretrainRecord, read_record
from isd_repro.tensor_files import load_tensors
from tests.faults import world


def assert_equal_runs(folder: Path, undisturbed: Path, *lost: str) -> None:
    """Encoder bytes, every row but its speed and the keys `lost`, and the record but for time, machine and state of the code."""
    assert world.written(folder) == world.COMPLETE
    assert world.states(folder) == []
    ours, theirs = world.outputs(folder), world.outputs(undisturbed)
    assert ours["encoder"].read_bytes() == theirs["encoder"].read_bytes()
    assert rows(ours["metrics"], *lost) == rows(theirs["metrics"], *lost)
    records = [json.loads(paths["record"].read_text("utf-8")) for paths in (ours, theirs)]
    for record in records:
        for key in ("provenance", "sources", "attempts"):
            record.pop(key)
    assert records[0] == records[1]


def rows(path: Path, *lost: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in {"images_per_second", "memory_mib", *lost}} for row in found]


def test_the_undisturbed_run_has_trained(undisturbed: Path) -> None:
    """Otherwise equal bytes would say nothing."""
    assert world.written(undisturbed) == world.COMPLETE
    assert world.states(undisturbed) == []
    record = json.loads(world.outputs(undisturbed)["record"].read_text("utf-8"))
    assert record["steps"] == 15
    assert [row["epoch"] for row in record["curve"]] == [1, 2, 3]
    tensors, identity = load_tensors(world.outputs(undisturbed)["encoder"], "encoder")
    assert identity["encoders"] == ["student", "teacher"]
    assert any((tensors[key] != tensors[key.replace("student", "teacher")]).any() for key in tensors if "student" in key)


# --- real processes -----------------------------------------------------------------------------------------------------


def test_a_second_process_and_sigterm(folder: Path, undisturbed_long: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a run trains, another process is refused; asked to stop, the run saves its state and says how to go on."""
    world.edit(folder, world.LONGER)
    with world.process(folder) as running:
        said = world.wait_for_epochs(running, 1)
        os.kill(running.pid, signal.SIGSTOP)
        code, error = world.command(folder, "pretrain", "isd", capsys=capsys)
        assert code == 1
        assert f"already being trained by process {running.pid}" in error
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
    assert {"checkpoint.pt", "metrics.jsonl"} <= {path.name for path in state.iterdir()}
    assert "resuming after step" in world.train(folder)
    assert_equal_runs(folder, undisturbed_long)


# --- a crash at every write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_crash_after_a_write(folder: Path, undisturbed: Path, count: int) -> None:
    """Two checkpoints, then encoder, metrics and record: five writes, after each of which a process may end."""
    with pytest.MonkeyPatch.context() as patch:
        world.crash_at(patch, count, after=True)
        with pytest.raises(world.Crash):
            world.train(folder)
    for name, path in world.outputs(folder).items():
        if path.exists() and name != "metrics":
            assert (path.read_bytes() == world.outputs(undisturbed)[name].read_bytes()) == (name == "encoder")
    assert "resuming after step" in world.train(folder)
    record = read_record(world.outputs(folder)["record"], PretrainRecord)
    assert record.sources == (source_hash(),)
    assert_equal_runs(folder, undisturbed)


def test_five_writes_are_all(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world.crash_at(patch, 6, after=False)
        world.train(folder)
    assert world.outputs(folder)["encoder"].is_file(), "a sixth write would have crashed before the end"


# --- failures of the run itself -----------------------------------------------------------------------------------------


def test_a_changed_parameter_starts_afresh(folder: Path) -> None:
    """The state of the old values is neither used nor lost."""
    with pytest.MonkeyPatch.context() as patch:
        world.crash_at(patch, 3, after=False)
        with pytest.raises(world.Crash):
            world.train(folder)
    (old,) = world.states(folder)
    world.edit(folder, ("tau_student: 0.1", "tau_student: 0.2"))
    assert "resuming" not in world.train(folder)
    assert world.states(folder) == [old]
    assert world.written(folder) == world.COMPLETE
