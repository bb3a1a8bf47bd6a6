"""Files and locks where the system does not play along: other users, restless file systems, a disk that fills within a line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import FileLock

from isd_repro.runtime import files
from isd_repro.runtime.errors import UserError
from tests.faults import chain, world
from tests.faults.test_full_disk import DISK, files_up_to, own, sound


def test_what_another_user_left_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / ".done-of-somebody").mkdir()
    monkeypatch.setattr(FileLock, "acquire", refuse)
    files.sweep(tmp_path, ".done-")
    assert (tmp_path / ".done-of-somebody").is_dir()


def answering(number: int) -> Callable[..., NoReturn]:
    """A system call that a file system answers with an error; it names no file."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written all the same; what needs a lock says so."""
    monkeypatch.setattr("fcntl.flock", answering(number))
    files.write_atomic(tmp_path / "record.json", b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]
    with pytest.raises(UserError, match="lock: cannot be locked") as caught, files.exclusive(tmp_path / "lock", "held"):
        pass
    assert "flock" in caught.value.hint


def test_a_file_system_without_fsync_or_chmod(folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems are: nothing is lost by it but safety from a power cut."""
    monkeypatch.setattr(os, "fsync", answering(errno.EINVAL))
    for name in ("chmod", "fchmod", "chown", "utime"):
        monkeypatch.setattr(os, name, answering(errno.EPERM))
    assert chain.call(folder, "prepare", "digits").code == 0
    assert chain.call(folder, "pretrain", "isd").code == 0
    found = [world.outputs(place)["encoder"].read_bytes() for place in (folder, undisturbed)]
    assert found[0] == found[1]


def test_a_disk_that_fails_is_an_error_of_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", answering(errno.EIO))
    with pytest.raises(OSError, match=r"record\.json"):
        files.write_atomic(tmp_path / "record.json", b"content")


@pytest.mark.parametrize(("stage", "name"), [("knn", "encoder.safetensors"), ("pretrain", "store.u8")])
def test_a_file_system_without_mapped_files(stage: str, name: str, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = answering(errno.ENODEV)
    monkeypatch.setattr("isd_repro.tensor_files.safe_open", refuse)
    monkeypatch.setattr("numpy.memmap", refuse)
    if stage == "pretrain":
        chain.without(done, stage)
    result = chain.call(done, stage, "isd")
    chain.refused(result, name, "No such device", "lacks an operation that is needed", code=1)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "the disk or the network file system failed"),
        (errno.ENODEV, "mmap"),
    ],
)
def test_advice_fits_the_error(number: int, hint: str) -> None:
    assert hint in files.advice(OSError(number, os.strerror(number)))


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_every_file_has_the_rights_that_the_umask_leaves(umask: int, folder: Path) -> None:
    """For a group that shares a folder, and for one user alone."""
    for name in ("data", "runs"):
        shutil.rmtree(folder / name)
    before = os.umask(umask)
    try:
        assert chain.call(folder, "prepare", "digits").code == 0
        chain.complete(folder)
        chain.call(folder, "evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--k", "1")
    finally:
        os.umask(before)
    wrong = {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for name in ("data", "runs", "reports", ".state")
        for path in (folder / name).rglob("*")
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def test_a_write_that_fails_says_where(tmp_path: Path) -> None:
    with files_up_to(10), pytest.raises(OSError, match=r"record\.json"):
        files.write_atomic(tmp_path / "record.json", b"content" * 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a link to nowhere", "a link to itself", "a file"])
def test_outputs_that_nobody_can_write_are_named_before_the_first_step(kind: str, folder: Path) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    if kind == "a file":
        (folder / "runs").write_text("in the way", "utf-8")
    else:
        (folder / "runs").symlink_to(folder / ("nowhere" if kind.endswith("nowhere") else "runs"))
    result = chain.call(folder, "pretrain", "isd")
    assert (result.code, "epoch" in result.err) == (1, False), result
    assert f"error: {folder}/runs" in result.err
    (folder / "runs").unlink()
    assert chain.call(folder, "pretrain", "isd").code == 0


@pytest.mark.parametrize("kind", ["a link to nowhere", "a folder", "a pipe"])
def test_a_record_that_is_no_file_is_not_a_run_that_was_not_made(kind: str, done: Path) -> None:
    path = done / "reports/tiny/records/isd/knn.json"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(done / "nowhere")
    before = (done / "reports/tiny/tables/table.md").read_bytes()
    chain.refused(chain.call(done, "report"), "knn.json")
    assert (done / "reports/tiny/tables/table.md").read_bytes() == before


@pytest.mark.parametrize("stage", ["pretrain"])
def test_a_disk_without_room_for_another_name(stage: str, finished: Path, tmp_path: Path) -> None:
    """Bytes are free, inodes are not: the same as a full disk."""
    with chain.small_disk(tmp_path / "disk", DISK, names=400) as disk:
        folder = own(finished, disk / "profile")
        chain.without(folder, stage)
        ballast = disk / "ballast"
        ballast.mkdir()
        for number in range(os.statvfs(disk).f_ffree):
            (ballast / str(number)).touch()
        result = chain.call(folder, *chain.STAGES[stage])
        assert result.code != 0, "no name was free, and the stage has not noticed"
        sound(folder, stage, result, finished)
        shutil.rmtree(ballast)
        result = chain.call(folder, *chain.STAGES[stage])
        assert result.code == 0, result
        assert chain.meaning(chain.files(folder)) == chain.meaning(chain.files(finished))
