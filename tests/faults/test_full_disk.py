"""Disks that are full or read-only: one message, no half-written output, and the same command goes on with room.

Full is played twice: by a file system of a few kilobytes, and, where mounting is not allowed, by the system's own limit on the
size of a file, which fails a write at any byte that the test chooses.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults import chain
from tests.faults.test_files import files_up_to

DISK = 8 * 2**20
FREE = {"prepare": 8, "pretrain": 8, "extract": 8, "knn": 0, "linear": 0, "report": 48}  # KiB
KINDS = ("prepare", "pretrain", "report")  # stages that write in ways of their own
STEP, MOST = {"prepare": 16, "pretrain": 24}, 2400  # KiB; 4 where nothing else is said


def own(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".state"))
    return folder


def leave(folder: Path, free: int) -> Path:
    """Fill the disk up to so many bytes."""
    ballast = folder.parent / "ballast"
    status = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
        file.truncate(max(0, file.seek(0, os.SEEK_END) - free) or 1)
    return ballast


def sound(folder: Path, result: chain.Result, finished: Path) -> None:
    """A failed stage has said so, and each of its outputs is absent or the whole right file."""
    if result.code != 0:
        assert result.code in {1, 4}, result
        assert "hint: free disk space" in result.err, result
        assert str(folder) in result.err.partition("error: ")[2].partition("hint: ")[0], f"which file? {result.err}"
        assert "Traceback" not in result.err
    ours, theirs = chain.files(folder), chain.files(finished)
    assert [name for name, content in ours.items() if content != theirs.get(name)] == [], "left over or not whole"
    assert chain.logs(folder) <= chain.logs(finished)


def again(folder: Path, stage: str, finished: Path) -> None:
    """With room, the same command ends as if nothing had happened."""
    result = chain.call(folder, *chain.STAGES[stage])
    assert result.code == 0, result
    assert chain.files(folder) == chain.files(finished)
    assert chain.logs(folder) == chain.logs(finished)


def fill_and_run(source: Path, disk: Path, stage: str, kilobytes: int) -> int:
    folder = own(source, disk / "profile")
    chain.without(folder, stage)
    ballast = leave(folder, kilobytes * 1024)
    result = chain.call(folder, *chain.STAGES[stage])
    sound(folder, result, source)
    ballast.unlink()
    again(folder, stage, source)
    shutil.rmtree(folder)
    return result.code


@pytest.mark.parametrize("stage", chain.STAGES)
def test_a_full_disk(stage: str, finished: Path, tmp_path: Path) -> None:
    with chain.small_disk(tmp_path / "disk", DISK) as disk:
        assert fill_and_run(finished, disk, stage, FREE[stage]) != 0, "the disk was full, and the stage has not noticed"


@pytest.mark.slow
@pytest.mark.parametrize("stage", chain.STAGES)
def test_a_disk_that_is_full_at_any_page(stage: str, finished: Path, tmp_path: Path) -> None:
    """From no page free until it succeeds: every write of the stage is the one that fails."""
    with chain.small_disk(tmp_path / "disk", DISK) as disk:
        codes = [1]
        for kilobytes in range(0, MOST, STEP.get(stage, 4)):
            codes.append(fill_and_run(finished, disk, stage, kilobytes))
            if codes[-1] == 0:
                break
    assert codes[-1] == 0, "it never had enough room"


def test_a_disk_without_room_for_another_name(finished: Path, tmp_path: Path) -> None:
    """Bytes are free, inodes are not: the same as a full disk."""
    with chain.small_disk(tmp_path / "disk", DISK, names=400) as disk:
        folder, ballast = own(finished, disk / "profile"), disk / "ballast"
        chain.without(folder, "pretrain")
        ballast.mkdir()
        for number in range(os.statvfs(disk).f_ffree):
            (ballast / str(number)).touch()
        result = chain.call(folder, *chain.STAGES["pretrain"])
        assert result.code != 0, "no name was free, and the stage has not noticed"
        sound(folder, result, finished)


@pytest.mark.parametrize("stage", KINDS)
def test_a_write_that_fails_in_the_middle(stage: str, finished: Path, tmp_path: Path) -> None:
    """An older output stays as it was; without one, nothing half-written is there."""
    folder = own(finished, tmp_path / "profile")
    before = chain.files(folder)
    with files_up_to(500):
        assert chain.call(folder, *chain.STAGES[stage]).code != 0
    assert chain.files(folder) == before
    chain.without(folder, stage)
    with files_up_to(1000):
        result = chain.call(folder, *chain.STAGES[stage])
    assert result.code != 0, "nothing as small as this holds the outputs"
    sound(folder, result, finished)


@pytest.mark.parametrize("stage", KINDS)
def test_outputs_that_cannot_be_written(stage: str, finished: Path, tmp_path: Path) -> None:
    """A file system that is read-only, to root too: what is there stays as it is."""
    with chain.small_disk(tmp_path / "disk", DISK) as disk:
        folder = own(finished, disk / "profile")
        chain.without(folder, stage)
        before = chain.files(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        result = chain.call(folder, *chain.STAGES[stage])
        assert result.code in {1, 4}, result
        assert "Read-only file system" in result.err
        assert str(folder) in result.err
        assert "Traceback" not in result.err
        assert chain.files(folder) == before


def test_a_wandb_folder_that_cannot_be_written(
    done: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """W&B is off with one warning; the numbers are those of a run without it."""
    text = (done / "params.yaml").read_text("utf-8")
    (done / "params.yaml").write_text(text.replace('wandb: "off"', "wandb: offline"), "utf-8")
    (tmp_path / "wandb").write_text("a file in the way", "utf-8")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    result = chain.call(done, "knn", "isd")
    assert result.code == 0, result
    assert sum("W&B is off" in record.getMessage() for record in caplog.records) == 1
    assert chain.files(done) == chain.files(finished)
