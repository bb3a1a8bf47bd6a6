"""Resume state: kept in pairs, believed only where it fits, and named where it does not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_repro.config import reader as config
from isd_repro.data.manifests import open_prepared
from isd_repro.runtime.errors import DataError, Preempted
from isd_repro.train import checkpoint, loop
from isd_repro.train.pretrain import make_plan
from tests.faults import chain, world
from tests.faults.test_interruptions import assert_equal_runs

CPU = torch.device("cpu")


def flipped(content: bytes, bit: int | None = None) -> bytes:
    """One bit of a weight, or the one asked for."""
    at = 8 * (len(content) // 3) + 6 if bit is None else bit
    return content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :]


def marked_as_a_folder(content: bytes) -> bytes:
    """The DOS attribute of a tensor in the archive's index, which no checksum covers; torch would read nothing for it."""
    changed = bytearray(content)
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    changed[at + 38] |= 0x10
    return bytes(changed)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "a text": lambda content: b"no checkpoint\n",
    "zeros": lambda content: bytes(len(content)),
    "a flipped bit": flipped,
    "a tensor marked as a folder": marked_as_a_folder,
}


class Reader:
    """Loads checkpoints of the stopped run as the stage does, from a folder of its own."""

    def __init__(self, stopped: Path, folder: Path) -> None:
        params, layout = config.load(stopped / "params.yaml")
        self.plan = make_plan("isd", params.runs["isd"], open_prepared(layout.prepared("digits")), layout)
        self.optimizer = loop.optimizer_of(self.plan.method, self.plan.run.optim)
        self.path, self.said = folder / "checkpoint.pt", list[str]()
        (state,) = world.states(stopped)
        self.whole = (state / "checkpoint.pt").read_bytes()
        self.path.write_bytes(self.whole)
        checkpoint.previous(self.path).write_bytes((state / "checkpoint.previous.pt").read_bytes())

    def load(self) -> checkpoint.RunProgress:
        return checkpoint.load(self.path, self.plan.fingerprint, self.plan.method, self.optimizer, CPU, self.said.append)


@pytest.fixture
def reader(stopped: Path, tmp_path: Path) -> Reader:
    return Reader(stopped, tmp_path)


# --- damaged files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_it_used(reader: Reader, kind: str) -> None:
    content = DAMAGE[kind](reader.whole)
    reader.path.write_bytes(content)
    assert reader.load().step == 5
    assert (reader.path.parent / "checkpoint.damaged.pt").read_bytes() == content
    assert reader.said[0].startswith(f"{reader.path}: damaged checkpoint")


def test_a_second_damaged_checkpoint_does_not_overwrite_the_first(folder: Path, state: Path, undisturbed: Path) -> None:
    (state / "checkpoint.damaged.pt").write_bytes(b"the first")
    (state / "checkpoint.pt").write_bytes(b"the second")
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        world.at_step(patch, 1, lambda: kept.update({path.name: path.read_bytes() for path in state.glob("*.damaged*")}))
        assert "resuming after step 5" in world.train(folder)
    assert kept == {"checkpoint.damaged.pt": b"the first", "checkpoint.damaged2.pt": b"the second"}
    assert_equal_runs(folder, undisturbed)


def test_only_damaged_checkpoints_are_refused_and_left_as_they_are(reader: Reader) -> None:
    before = checkpoint.previous(reader.path)
    for path in (reader.path, before):
        path.write_bytes(flipped(path.read_bytes()))
    contents = {path: path.read_bytes() for path in reader.path.parent.iterdir()}
    with pytest.raises(DataError, match="damaged checkpoint") as caught:
        reader.load()
    assert str(reader.path) in caught.value.message
    assert str(before) in caught.value.message
    assert caught.value.hint == "delete them to restart this run"
    assert {path: path.read_bytes() for path in reader.path.parent.iterdir()} == contents


def test_a_cut_or_a_flipped_bit_is_noticed_or_changes_nothing(reader: Reader) -> None:
    """Bits that are not noticed are in names and times of the archive, which nothing reads."""
    checkpoint.previous(reader.path).unlink()
    progress = reader.load()
    wanted = {key: value.clone() for key, value in reader.plan.method.state_dict().items()}
    draws, refused = random.Random(11), 0
    cuts = [reader.whole[:length] for length in (*range(0, len(reader.whole), 20_000), len(reader.whole) - 1)]
    for content in [*cuts, *(flipped(reader.whole, draws.randrange(8 * len(reader.whole))) for _ in range(40))]:
        reader.path.write_bytes(content)
        try:
            found = reader.load()
        except DataError:
            refused += 1
        else:
            assert len(content) == len(reader.whole)
            assert (found.step, found.curve, found.sources) == (progress.step, progress.curve, progress.sources)
            assert all(torch.equal(value, wanted[key]) for key, value in reader.plan.method.state_dict().items())
    assert refused > len(cuts) + 20


# --- content that does not fit --------------------------------------------------------------------------------------------


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
    "a weight too few": without("method", "predictor.0.weight"),
    "a weight of another shape": lambda content: content["method"].update({"predictor.0.weight": torch.zeros(3)}),
    "a weight that is no number": lambda content: content["method"]["predictor.0.weight"].fill_(torch.nan),
    "a bank with infinity": lambda content: content["method"]["bank.rows"][3, 0].fill_(torch.inf),
    "a pointer behind the bank": lambda content: content["method"].update({"bank._extra_state": torch.tensor(1000)}),
    "an optimizer without groups": without("optimizer", "param_groups"),
    "a momentum of another shape": lambda content: content["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1, 2)),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_a_checkpoint_whose_content_does_not_fit_is_named(reader: Reader, kind: str) -> None:
    """Its bytes have their checksums: it was written by something else than this version's `save`."""
    checkpoint.previous(reader.path).unlink()
    content = torch.load(reader.path, weights_only=True)
    CONTENT[kind](content)
    torch.save(content, reader.path)
    with pytest.raises(DataError, match="damaged checkpoint") as caught:
        reader.load()
    assert str(reader.path) in caught.value.message


def test_a_checkpoint_of_another_configuration_is_refused(reader: Reader) -> None:
    content = torch.load(reader.path, weights_only=True)
    torch.save({**content, "fingerprint": "0123"}, reader.path)
    with pytest.raises(DataError, match=f"belongs to configuration 0123, not {reader.plan.fingerprint}"):
        reader.load()


@pytest.mark.parametrize("change", [{"step": 1000}, {"curve": []}], ids=str)
def test_a_checkpoint_that_contradicts_the_run_is_named(folder: Path, state: Path, change: dict[str, Any]) -> None:
    content = torch.load(state / "checkpoint.pt", weights_only=True)
    content["progress"].update(change)
    torch.save(content, state / "checkpoint.pt")
    chain.refused(chain.call(folder, "pretrain", "isd"), f"error: {state}/checkpoint.pt: has ", "5 an epoch")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attempts.json", b""),
        ("attempts.json", b'{"event": "start"}\n'),
        ("metrics.jsonl", b'{"epoch": 1, "lo\n'),
        ("metrics.jsonl", b"\xff\xfe\x00\n"),
        ("metrics.jsonl", b'{"epoch": "one"}\n'),
    ],
)
def test_a_damaged_file_of_the_state_is_put_aside(
    folder: Path, state: Path, undisturbed: Path, name: str, content: bytes
) -> None:
    """Whatever a crash left of it, the run goes on, and what was there is kept."""
    path, kept = state / name, {}
    content += path.read_bytes() if name == "metrics.jsonl" else b""
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        world.at_step(patch, 1, lambda: kept.update({place.name: place.read_bytes() for place in state.glob("*.damaged*")}))
        said = world.train(folder)
    assert f"{path}:" in said
    assert "resuming after step 10" in said
    assert kept == {name.replace(".", ".damaged."): content}
    remarks = world.record(folder).warnings
    assert remarks == (("attempts before step 10 are not listed: their file was damaged",) if "attempts" in name else ())
    assert world.encoder(folder) == world.encoder(undisturbed)


def test_what_a_power_cut_took_is_written_again(folder: Path, state: Path, undisturbed: Path) -> None:
    """The checkpoint reached the disk; the end of the rows and the other files did not."""
    for name in ("run.json", "lock"):
        (state / name).write_bytes(b"")
    lines = (state / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (state / "metrics.jsonl").write_bytes(lines[0] + lines[1][:20])
    assert "resuming after step 10" in world.train(folder)
    assert_equal_runs(folder, undisturbed, "purity")  # what was measured beside the curve is gone with the row


# --- other places, other clocks, other code ---------------------------------------------------------------------------------


def test_a_profile_that_was_moved_goes_on_whatever_the_clock_says(
    folder: Path, state: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back by years between two processes, and at every look within one."""
    jumps = iter(range(0, 10**9, 86_400))
    monkeypatch.setattr(time, "time", lambda: 1.0e8 - next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: 10**17 - 10**9 * next(jumps))
    moved = folder.rename(tmp_path / "moved")
    assert "resuming after step 10" in world.train(moved)
    assert_equal_runs(moved, undisturbed)
    record = world.record(moved)
    assert all(0 <= attempt.seconds < 600 for attempt in record.attempts)
    assert 0 <= record.provenance.seconds < 600


def test_other_code_is_refused_and_goes_on_only_when_told(
    folder: Path, state: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = checkpoint.code_of("isd", CPU)
    monkeypatch.setattr(checkpoint, "code_of", lambda *_: {**was, "nn/bank.py": "0123456789ab"})
    result, change = chain.call(folder, "pretrain", "isd"), f"nn/bank.py was {was['nn/bank.py']}, is 0123456789ab"
    chain.refused(result, change, "delete the folder to restart; or set ISD_RESUME_CHANGED=1", code=1)
    assert "train/loop.py" not in result.err
    assert world.written(folder) == set()
    monkeypatch.setenv("ISD_RESUME_CHANGED", "1")
    assert "resuming after step 10" in world.train(folder)
    record = world.record(folder)
    assert record.warnings == (f"resumed after step 10 with different code ({change})",)
    assert world.encoder(folder) == world.encoder(undisturbed)


def test_another_number_of_threads_is_refused_unless_the_profile_states_it(folder: Path) -> None:
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
    found = f"{other}: this run was trained up to step 10 with different arithmetic: cpu was "
    chain.refused(chain.call(folder, "pretrain", "isd"), found, "2 threads, is ", "OMP_NUM_THREADS", code=1)


def test_the_code_of_a_run_is_what_makes_its_numbers() -> None:
    names = set(checkpoint.code_of("isd", CPU))
    assert names >= {"methods/isd.py", "nn/bank.py", "nn/ema.py", "nn/backbones.py", "nn/batchnorm.py", "nn/heads.py"}
    assert names >= {"train/loop.py", "train/schedule.py", "data/augment.py", "data/loader.py", "torch"}
    assert not {"methods/moco.py", "train/pretrain.py", "cli.py"} & names


def test_the_record_has_every_attempt(folder: Path) -> None:
    """One that fails, one that is killed after its first checkpoint, one that is stopped, one that finishes."""
    world.stopped_at(folder, 1)
    with pytest.MonkeyPatch.context() as patch:
        real = checkpoint.Attempts.note
        patch.setattr(checkpoint.Attempts, "note", lambda self, *how: None if how else real(self))  # a killed one says nothing
        world.stopped_at(folder, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isd_repro.runtime.signals.StopRequest.__call__", lambda self: True)
        with pytest.raises(Preempted):
            world.train(folder)
    world.train(folder)
    record = world.record(folder)
    found = [(attempt.outcome, attempt.first_step, attempt.last_step) for attempt in record.attempts]
    assert found == [("failed", 0, 5), ("killed", 0, 5), ("stopped", 5, 6), ("finished", 6, 15)]
    assert {attempt.device for attempt in record.attempts} == {f"cpu ({checkpoint.arithmetic()})"}
