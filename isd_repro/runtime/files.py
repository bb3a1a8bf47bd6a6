"""Atomic files, locks that end with their process, and temporary folders.

A process holds a lock on what it writes, so the leftovers of a killed process can be distinguished from work in progress by
trying the lock; neither process ids nor file times are used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from isd_repro.runtime.errors import DataError, UserError

_PARTIAL = ".partial"
_NOT_OFFERED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what a file system answers that has no fsync
_ADVICE = (
    ({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, "free disk space or raise the quota, then run the same command again"),
    ({errno.EACCES, errno.EPERM, errno.EROFS}, "check the permissions there and whether the file system is read-only"),
    ({errno.EMFILE, errno.ENFILE}, "raise the limit on open files (ulimit -n)"),
    ({errno.EIO, errno.ESTALE}, "the disk or the network file system failed; check it, then run the same command again"),
    (
        {*_NOT_OFFERED, errno.ENOLCK, errno.ENODEV},
        "this file system lacks an operation that is needed, as flock or mmap; use another one (ISD_STATE_ROOT, ISD_PACK_ROOT)",
    ),
)


class Busy(UserError):
    """Another process holds a lock that this one needs."""


def named_path(variable: str, hint: str) -> Path:
    """The path that an environment variable names; it is not checked whether the path exists.

    Raises:
        DataError: the variable is not set, or its path is relative. DVC runs a stage in the profile's folder, where a relative
            path would mean another folder than on the command line. `hint` says what to set the variable to.
    """
    value = os.environ.get(variable, "")
    if not value:
        raise DataError(f"{variable} is not set", hint)
    path = Path(value).expanduser()
    if not path.is_absolute():
        found = f"{variable}={value} is a relative path, which `dvc repro` would look for in the profile's folder"
        raise DataError(found, f"use an absolute path; from the current folder: {variable}={path.absolute()}")
    return path


def advice(error: OSError) -> str:
    """What a user can do about a system error."""
    usual = "check free disk space and permissions, then run the same command again"
    return next((words for numbers, words in _ADVICE if error.errno in numbers), usual)


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes, *, keep: Path | None = None) -> None:
    """Write a file atomically: after a kill or on a full disk, the path has either the old file or the complete new one.

    Leftovers of killed processes that tried to write the same file are removed.

    Args:
        path: the file.
        content: its whole content.
        keep: the name to which an older file at `path` is moved, once the new one is safe on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        with naming(path), _held(partial):
            with partial.open("wb") as file:
                file.write(content)
                sync(file)
            if keep is not None and path.exists():
                path.replace(keep)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block, add the path to an `OSError` that names no file, such as that of a failed write."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync(file: IO[bytes]) -> None:
    """Flush a file to the disk, if the file system supports this."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Create a file and hold its lock, without which it would be taken for a leftover, if locks are supported."""
    if sys.platform == "win32":  # a locked file can be neither written nor renamed there, and an open one cannot be removed
        yield
        return
    lock = FileLock(partial, fallback_to_soft=False)
    with suppress(OSError):  # writing the file will meet what is more than the lack of locks
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(_PARTIAL)}")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name):
            with suppress(OSError, Timeout), FileLock(other, timeout=0, fallback_to_soft=False):
                other.unlink(missing_ok=True)


def put_aside(path: Path) -> Path:
    """Rename a damaged file so that it is neither read nor overwritten; returns its new path."""
    number = 1
    while (place := path.with_name(f"{path.stem}.damaged{number if number > 1 else ''}{path.suffix}")).exists():
        number += 1
    return path.rename(place)


def check_writable(folder: Path) -> None:
    """Create a folder and a temporary file in it, so that an `OSError` is raised now rather than after days of work."""
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder):
        pass


def _sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename survives a power cut."""
    if sys.platform != "win32":  # where a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some network file systems refuse it
            os.fsync(handle)
        os.close(handle)


# --- hashes ----------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; `DataError` if the file is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that writes it; `dvc repro` runs every stage that is needed")
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path, folder: Path | None = None) -> str:
    """As `sha256_file`, for large files: the file is hashed again only if its size, times or inode have changed.

    The hash is kept in `folder`; without a folder, or if it cannot be written, it is kept only in this process.
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
    """Hold the lock file `path`; the system releases it when the process ends, however that happens.

    Args:
        path: the lock file; its folder is created.
        busy: the message if another process holds the lock; a description of that process is appended.

    Raises:
        Busy: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        with suppress(OSError):
            busy = f"{busy} by {path.read_text('utf-8').strip() or 'another process'}"
        raise Busy(busy, "wait until it has finished, or stop it") from error
    except OSError as error:
        if error.filename:  # it cannot be opened; the lock itself names no file
            raise
        raise UserError(f"{path}: cannot be locked ({error.strerror})", advice(error)) from error
    holder = f"process {os.getpid()} on {platform.node()}"
    try:
        try:
            if sys.platform != "win32":  # where nobody could read it
                with naming(path):
                    path.write_text(holder, "utf-8")
        except OSError:  # the disk is full: we hold the lock, even if nothing is written in it
            path.unlink(missing_ok=True)
            raise
        yield
    finally:
        with suppress(OSError):
            if path.read_text("utf-8") == holder:  # else the folder was renamed, and the name may be another's lock by now
                path.unlink()
        lock.release()


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A new folder that is removed after the block, unless it was renamed; until then `sweep` does not touch it."""
    with exclusive(_lock_of(folder), f"{folder}: is being written"):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path, prefix: str) -> None:
    """Remove folders in `parent` that `temporary` made with this prefix and that killed processes left."""
    names = {path.name.removesuffix(".lock") for path in parent.glob("*") if path.name.startswith(prefix)}
    for name in sorted(names):
        with suppress(UserError, OSError), exclusive(_lock_of(parent / name), name):  # what another user left is theirs
            shutil.rmtree(parent / name, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
