"""Files that are whole or absent, locks that end with their process, and the soundness of archives.

Whoever writes holds a lock (`flock`) on what it writes, so what a killed process left behind can be told from work in
progress by trying its lock: neither process ids nor file times are looked at.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from isd_repro.runtime.errors import DataError, UserError

_PARTIAL = ".partial"
_TRIES = 100  # for a name that other processes remove as often; an end, where a file system never gives a file the same identity


class Busy(UserError):
    """Another process holds what this one needs."""


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Write a file so that a reader, a kill or a full disk sees the old file or the whole new one.

    What killed processes left of earlier attempts at the same file is removed.

    Args:
        path: the file.
        content: all of it.
        keep: the name that an older file at `path` gets, once the new one is safe on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_partials(path)
    file = _open_partial(path)
    name = Path(file.name)
    try:
        with file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                name.chmod(0o644)
                if keep is not None and path.exists():
                    path.replace(keep)
                name.replace(path)
            except BaseException:
                name.unlink(missing_ok=True)
                raise
    except OSError as error:  # a write that fails does not say where; closing the file fails once more
        error.filename = error.filename or str(path)
        raise
    _sync_folder(path.parent)


def _open_partial(path: Path) -> IO[bytes]:
    """A locked file beside `path`; without the lock it would be taken for a leftover."""
    for _ in range(_TRIES):
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL, delete=False)  # noqa: SIM115
        try:
            _lock(file)
        except BlockingIOError:  # just being swept
            file.close()
            continue
        except OSError:  # a file system without locks: nothing is swept there
            return file
        if _is_at(file, Path(file.name)):
            return file
        file.close()
        Path(file.name).unlink(missing_ok=True)
    raise _restless(path)


def _restless(path: Path) -> UserError:
    hint = "the file system gives one file several identities, or loses it; use another"
    return UserError(f"{path}: cannot be locked: what is opened is not what has the name, {_TRIES} times", hint)


def _sweep_partials(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(_PARTIAL)}")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name):
            with suppress(OSError), other.open("r+b") as file:
                _lock(file)
                other.unlink()


def check_writable(folder: Path) -> None:
    """Make a folder, and a file in it that nobody sees: `OSError` now rather than after days of work."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it
            os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; `DataError` where the file is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that makes it; `dvc repro` runs all that are needed")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path, folder: Path | None = None) -> str:
    """As `sha256_file` for large files: hashed once, and again only where size, times or inode have changed since.

    What was found is kept in `folder`; without one, or where it cannot be written, it is kept for this process.
    """
    found = path.stat()
    identity = [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    if folder is None:
        return _hashed(path, *identity)
    memory = folder / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, RecursionError):
        kept = json.loads(memory.read_bytes())
        if isinstance(kept, dict) and kept.get("file") == identity:
            return str(kept["sha256"])
    digest = _hashed(path, *identity)
    with suppress(OSError):  # a torn line is no JSON, and then the file is hashed again
        folder.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps({"file": identity, "sha256": digest}), "utf-8")
    return digest


@cache
def _hashed(path: Path, *_identity: str | int) -> str:
    return sha256_file(path)


# --- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path`, which is gone after the block; the system releases it however the process ends.

    Args:
        path: the lock file; its folder is made.
        busy: what is said where another process holds it, followed by that process.

    Raises:
        Busy: another process holds it.
        UserError: the file system does not keep a file's identity.
    """
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:  # the folder was removed just now, by a process that finished
            continue
        with file:
            try:
                _lock(file)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise Busy(f"{busy} by {holder}", "wait for it, or stop it") from error
            if not _is_at(file, path):  # removed between open and lock, by a process that finished
                continue
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                yield
            finally:
                if _is_at(file, path):
                    path.unlink()
            return
    raise _restless(path)


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A new folder that is gone after the block, unless it was renamed; `sweep` leaves it alone meanwhile."""
    with exclusive(_lock_of(folder), f"{folder}: is being written"):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, prefix: str) -> None:
    """Remove folders that `temporary` made in `parent` and killed processes left, those whose name begins with `prefix`."""
    if not parent.is_dir():
        return
    names = {path.name.removesuffix(".lock") for path in parent.iterdir() if path.name.startswith(prefix)}
    for name in sorted(names):
        with suppress(UserError, OSError), exclusive(_lock_of(parent / name), name):  # what another user left is theirs
            shutil.rmtree(parent / name, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _lock(file: IO[Any]) -> None:
    """`BlockingIOError` where another process holds it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


# --- archives ---------------------------------------------------------------------------------------------------------


def zip_entries(source: Path | IO[bytes]) -> list[zipfile.ZipInfo]:
    """The index of an archive.

    Raises:
        zipfile.BadZipFile: there is none that can be read.
    """
    with _as_bad_zip(), zipfile.ZipFile(source) as archive:
        return archive.infolist()


def check_zip(source: Path | IO[bytes]) -> None:
    """Compare all that `torch.load` does not: every entry's checksum, and that none is marked as a folder.

    torch reads nothing where an entry is so marked and leaves the tensor's memory as it was found.

    Raises:
        zipfile.BadZipFile: an entry is not what the index says.
    """
    with _as_bad_zip(), zipfile.ZipFile(source) as archive:
        folder = next((info.filename for info in archive.infolist() if info.is_dir() or info.external_attr & 0x10), None)
        if folder is not None:
            raise zipfile.BadZipFile(f"{folder} is marked as a folder")
        wrong = archive.testzip()
        if wrong is not None:
            raise zipfile.BadZipFile(f"{wrong} does not have its checksum")


@contextmanager
def _as_bad_zip() -> Iterator[None]:
    """A zip reader on bytes that are not its own raises almost anything; what the disk says passes."""
    try:
        yield
    except zipfile.BadZipFile:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
            raise
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from error
