"""Checks that a zip archive, the format of `torch.save`, matches its index."""

from __future__ import annotations

import errno
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def zip_entries(source: Path | IO[bytes]) -> list[zipfile.ZipInfo]:
    """The index of an archive.

    Raises:
        zipfile.BadZipFile: there is no readable index.
    """
    with _as_bad_zip(), zipfile.ZipFile(source) as archive:
        return archive.infolist()


def check_zip(source: Path | IO[bytes]) -> None:
    """Check what `torch.load` does not: every entry's checksum, and that no entry is marked as a folder.

    torch reads nothing for an entry that is marked as a folder, so that the tensor's memory is uninitialised.

    Raises:
        zipfile.BadZipFile: an entry does not match the index.
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
