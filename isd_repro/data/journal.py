"""What an unfinished pack holds already, so that a killed `prepare` goes on where it was.

The journal lies beside the pack's file. After every `BLOCK` images the file is brought to the disk first and then the journal
gets one line for each image and a line that seals them with the file's length and sha256 so far. What follows the last seal,
in the journal or in the file, was lost to the kill and is done again; so the finished pack has the bytes of one that nothing
disturbed. What is sealed must still have its hash: from the first block that has another, the work is done again too.

Lines: `isd-repro pack 1 <key>`; an image `<sha256 of the source> <height> <width> <channels> <length>`, or `-` for one
that could not be read; a seal `= <images> <bytes> <sha256>`.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Literal, NamedTuple

from isd_repro.data.encoding import Encoded
from isd_repro.data.store import Digest, StoreWriter

JOURNAL = "journal.txt"
BLOCK = 1024  # images between two seals: what a kill costs at most
_CHUNK = 2**22  # bytes read at once


class Entry(NamedTuple):
    """One image of a pack."""

    sha256: str  # of the source's bytes
    height: int
    width: int
    channels: int
    length: int  # bytes in the pack's file


def entry_of(image: Encoded) -> Entry:
    """What a journal says of an image."""
    return Entry(image.sha256, image.height, image.width, image.channels, len(image.content))


class Seal(NamedTuple):
    """What a pack held when a block was complete."""

    images: int
    bytes: int
    sha256: str


class Journal:
    """The journal of one pack, `folder / JOURNAL`.

    Attributes:
        entries: the images sealed so far, in order; None is one that could not be read.
        seals: one for each block.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Read what there is; a journal of another key is as none."""
        self._path = folder / JOURNAL
        self._head = _head(key)
        self.entries: list[Entry | None] = []
        self.seals: list[Seal] = []
        self._new: list[Entry | None] = []
        self._read()

    def cut(self, images: int) -> None:
        """Forget the blocks that end after this number of images."""
        self.seals = [seal for seal in self.seals if seal.images <= images]
        del self.entries[self.seals[-1].images if self.seals else 0 :]

    def check(self, path: Path) -> tuple[Digest, str]:
        """Compare the pack's file with every seal, and forget the blocks from the first that is not as it was.

        Returns:
            The running hash of the blocks that are left, and what is wrong with the others; "" where nothing is.
        """
        good = hashlib.sha256()
        before = Seal(0, 0, "")
        digest = good.copy()
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            for seal in self.seals:
                left = seal.bytes - before.bytes
                while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                    digest.update(chunk)
                    left -= len(chunk)
                if left or digest.hexdigest() != seal.sha256:
                    self.cut(before.images)
                    where = f"bytes {before.bytes} to {seal.bytes}, images {before.images} to {seal.images - 1}"
                    return good, f"{path}: {'cut short' if left else 'damaged'} in {where}: not what {JOURNAL} seals"
                good, before = digest.copy(), seal
        return good, ""

    def begin(self) -> None:
        """Bring the file to what is sealed; call it before `note`."""
        lines = [self._head]
        first = 0
        for seal in self.seals:
            lines += [_line(entry) for entry in self.entries[first : seal.images]]
            lines.append(_sealed(seal))
            first = seal.images
        partial = self._path.with_name(f"{JOURNAL}.partial")
        with partial.open("w", encoding="ascii") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)

    def note(self, entry: Entry | None, writer: StoreWriter) -> None:
        """One more image is in the writer's file, or could not be read; every `BLOCK` of them are sealed."""
        self._new.append(entry)
        if len(self._new) >= BLOCK:
            self.seal(writer)

    def seal(self, writer: StoreWriter) -> None:
        """Make sure of what was noted last."""
        if not self._new:
            return
        seal = Seal(len(self.entries) + len(self._new), writer.bytes, writer.sync())
        with self._path.open("a", encoding="ascii") as file:
            file.writelines(_line(entry) for entry in self._new)
            file.write(_sealed(seal))
            file.flush()
            os.fsync(file.fileno())
        self.entries += self._new
        self.seals.append(seal)
        self._new = []

    def _read(self) -> None:
        """Whole blocks; a torn or strange line ends the reading."""
        if not self._path.is_file():
            return
        with self._path.open(encoding="ascii", errors="replace", newline="\n") as file:
            if file.readline() != self._head:
                return
            found: list[Entry | None] = []
            for line in file:
                seal = _seal(line)
                if seal is not None and seal.images == len(self.entries) + len(found):
                    self.entries += found
                    self.seals.append(seal)
                    found = []
                    continue
                entry = _entry(line)
                if seal is not None or entry is False:
                    return
                found.append(entry)


def is_of(folder: Path, key: str) -> bool:
    """Whether a folder holds a journal of this key."""
    path = folder / JOURNAL
    if not path.is_file():
        return False
    with path.open(encoding="ascii", errors="replace", newline="\n") as file:
        return file.readline(len(_head(key)) + 1) == _head(key)


def _head(key: str) -> str:
    return f"isd-repro pack 1 {key}\n"


def _line(entry: Entry | None) -> str:
    return "-\n" if entry is None else " ".join(map(str, entry)) + "\n"


def _entry(line: str) -> Entry | Literal[False] | None:
    """An image's line; False where it is none."""
    if line == "-\n":
        return None
    words = line.removesuffix("\n").split(" ")
    if not line.endswith("\n") or len(words) != 5 or len(words[0]) != 64 or not all(word.isdecimal() for word in words[1:]):
        return False
    return Entry(words[0], *map(int, words[1:]))


def _sealed(seal: Seal) -> str:
    return f"= {seal.images} {seal.bytes} {seal.sha256}\n"


def _seal(line: str) -> Seal | None:
    words = line.removesuffix("\n").split(" ")
    if not line.endswith("\n") or len(words) != 4 or words[0] != "=" or not (words[1].isdecimal() and words[2].isdecimal()):
        return None
    return Seal(int(words[1]), int(words[2]), words[3])
