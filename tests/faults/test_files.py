"""Files and locks where others hold them and where the system does not play along."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import FileLock
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data.prepare import prepare
from isd_repro.runtime import files
from isd_repro.runtime.errors import UserError
from tests.faults import chain, world

# --- several processes ------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with files.exclusive(path, "held"):
        with pytest.raises(files.Busy, match=f"held by process {os.getpid()} on "), files.exclusive(path, "held"):
            pass
        assert path.is_file()
    assert list(tmp_path.iterdir()) == []


def test_two_prepares_of_one_subset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, layout = config.load(folder / "params.yaml")
    before, begun, real = world.tree(folder), list[Path](), files.temporary

    def second(place: Path) -> object:
        begun.append(place)
        with pytest.raises(UserError, match=f"already being prepared by process {os.getpid()} on "):
            prepare("digits", params, layout, Console(quiet=True))
        return real(place)

    monkeypatch.setattr(files, "temporary", second)
    prepare("digits", params, layout, Console(quiet=True))
    assert len(begun) == 1
    assert world.differences(world.tree(folder), before) == []


def test_what_the_living_write_is_not_swept(tmp_path: Path) -> None:
    """Folders of another profile that packs into the same place, and files of another process."""
    with files.temporary(tmp_path / ".partial_one") as one:
        (tmp_path / ".partial_two").mkdir()
        files.sweep(tmp_path, ".partial_")
        assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, f"{one.name}.lock"]
    assert list(tmp_path.iterdir()) == []
    dead, living = (tmp_path / f".record.json.{name}.partial" for name in ("abcdefgh", "ijklmnop"))
    another = tmp_path / ".record.json.of-somebody.partial"
    for place in (dead, another):
        place.write_bytes(b"half")
    with FileLock(living):
        files.write_atomic(tmp_path / "record.json", b"whole")
        assert {place.name for place in tmp_path.iterdir()} == {living.name, "record.json", another.name}


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


# --- odd file systems -------------------------------------------------------------------------------------------------------


def answering(number: int) -> Callable[..., NoReturn]:
    """A system call that a file system answers with an error; it names no file."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


def test_what_another_user_left_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".done-of-somebody").mkdir()
    monkeypatch.setattr(FileLock, "acquire", answering(errno.EACCES))
    files.sweep(tmp_path, ".done-")
    assert (tmp_path / ".done-of-somebody").is_dir()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL])
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
    found = [world.encoder(place) for place in (folder, undisturbed)]
    assert found[0] == found[1]


@pytest.mark.parametrize(("stage", "name"), [("knn", "encoder.safetensors"), ("pretrain", "store.u8")])
def test_a_file_system_without_mapped_files(stage: str, name: str, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isd_repro.tensor_files.safe_open", answering(errno.ENODEV))
    monkeypatch.setattr("numpy.memmap", answering(errno.ENODEV))
    result = chain.call(done, stage, "isd")
    chain.refused(result, name, "No such device", "lacks an operation that is needed", code=1)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a disk that fills in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_says_where_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files_up_to(10), pytest.raises(OSError, match=r"record\.json") as caught:
        files.write_atomic(tmp_path / "record.json", b"content" * 10)
    assert "free disk space" in files.advice(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", answering(errno.EIO))
    with pytest.raises(OSError, match=r"record\.json") as caught:
        files.write_atomic(tmp_path / "record.json", b"content")
    assert "the disk or the network file system failed" in files.advice(caught.value)


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_every_file_has_the_rights_that_the_umask_leaves(umask: int, folder: Path) -> None:
    """For a group that shares a folder, and for one user alone."""
    for name in ("data", "runs"):
        shutil.rmtree(folder / name)
    before = os.umask(umask)
    try:
        assert chain.call(folder, "prepare", "digits").code == 0
        chain.complete(folder)
        assert chain.call(folder, *chain.EVALUATE).code == 0
    finally:
        os.umask(before)
    wrong = {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for name in ("data", "runs", "reports", ".state")
        for path in (folder / name).rglob("*")
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


@pytest.mark.parametrize("kind", ["a link to nowhere", "a file"])
def test_outputs_that_nobody_can_write_are_named_before_the_first_step(kind: str, folder: Path) -> None:
    shutil.rmtree(folder / "runs", ignore_errors=True)
    if kind == "a file":
        (folder / "runs").write_text("in the way", "utf-8")
    else:
        (folder / "runs").symlink_to(folder / "nowhere")
    result = chain.call(folder, "pretrain", "isd")
    assert (result.code, "epoch" in result.err) == (1, False), result
    assert f"error: {folder}/runs" in result.err


@pytest.mark.parametrize("kind", ["a link to nowhere", "a pipe"])
def test_a_record_that_is_no_file_is_not_a_run_that_was_not_made(kind: str, done: Path) -> None:
    path = done / "reports/tiny/records/isd/knn.json"
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(done / "nowhere")
    before = (done / "reports/tiny/tables/table.md").read_bytes()
    chain.refused(chain.call(done, "report"), "knn.json")
    assert (done / "reports/tiny/tables/table.md").read_bytes() == before
