"""Packs images into a store with threads, and continues an external pack that was interrupted.

Pillow releases Python's global lock while it decodes, resizes and encodes, so threads suffice. Images are written in order, and a
bounded number is in progress, so the number of threads does not change the result, and memory does not grow with the source.

An external pack may take hours, so `journal.jsonl` next to its file records its content. After every `BLOCK` images the file is
flushed to the disk, and then one line is added to the journal: the result for each image of the block, and the sha256 of the file
so far. An interrupted pack is continued after the last complete line and ends with the same bytes as an uninterrupted one; if the
file does not have the journal's hash, packing starts from the beginning. The journal stays next to a finished pack, which is
reused if every image of the source still has the bytes that were packed.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from isd_repro.config import params
from isd_repro.data.manifests import Named
from isd_repro.data.sources import Listing, Located, UnreadableError
from isd_repro.data.store import INDEX, StoredImage, StoreInfo, StoreWriter, convert, describe, encode, file_of
from isd_repro.runtime import files

JOURNAL = "journal.jsonl"
BLOCK = 1024  # images between two lines of the journal: what a kill costs at most
_AHEAD = 4  # images under way for each thread
T = TypeVar("T")
R = TypeVar("R")


class PackedImage(NamedTuple):
    """One packed image."""

    sha256: str  # of the source's bytes
    row: StoredImage


Outcome = PackedImage | str  # a string says why the image could not be read


@dataclass
class _Begun:
    """The part of an unfinished or finished pack that its journal confirms."""

    done: list[Outcome] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)  # over the bytes of `done`
    journal_bytes: int = 0  # 0 if there is no journal of this key


@dataclass(frozen=True)
class Packer:
    """Packs the images of a source with several threads.

    Attributes:
        listing: the open source.
        images: the images to pack, in the store's order.
        store: the settings of the store.
        threads: number of threads that read, decode and encode.
        say: called with a message for the user.
        advance: called with the number of finished images, or with a negative number of images that have to be packed again.
        look: called with the number of each image and its result; an exception that it raises ends the packing.
    """

    listing: Listing
    images: Sequence[Located]
    store: params.StoreSettings
    threads: int
    say: Callable[[str], None]
    advance: Callable[[int], None]
    look: Callable[[int, Outcome], None] = lambda at, outcome: None

    def pack(self, folder: Path, key: str = "") -> tuple[list[Outcome], StoreInfo]:
        """Write the store into `folder`; returns the result for each image.

        Args:
            folder: an existing folder.
            key: identifies the images and the settings. If it is given, a journal is kept, and a pack with the same key is
                continued.

        Raises:
            DataError: an image no longer exists.
        """
        begun = self._read_journal(folder, key)
        done = begun.done
        if done:
            self.say(f"continuing after {len(done)} of {len(self.images)} images")
        for at, outcome in enumerate(done):
            self.look(at, outcome)
        self.advance(len(done))
        with ExitStack() as stack:
            writer = stack.enter_context(StoreWriter(folder, self.store, _rows(done), begun.digest))
            journal = stack.enter_context((folder / JOURNAL).open("ab")) if key else None
            if journal is not None:
                journal.truncate(begun.journal_bytes)
                if not begun.journal_bytes:
                    journal.write(_head(key))
            noted = len(done)
            for outcome, content in in_order(self._read, self.images[noted:], self.threads):
                self.look(len(done), outcome)
                if isinstance(outcome, PackedImage):
                    writer.add(content, outcome.row)
                done.append(outcome)
                if journal is not None and (len(done) - noted == BLOCK or len(done) == len(self.images)):
                    journal.write(_line(done[noted:], writer.sync()))
                    files.sync(journal)
                    noted = len(done)
                self.advance(1)
            return done, writer.finish()

    def find_finished(self, root: Path, key: str) -> tuple[Path, list[Outcome], StoreInfo] | None:
        """A finished, complete pack under `root` whose images are still those of the source; they are hashed, not decoded."""
        for folder in sorted(path.parent for path in root.glob(f"[!.]*/{JOURNAL}")):
            found = self._read_journal(folder, key)
            if not found.journal_bytes:
                continue
            info, index = describe(_rows(found.done), self.store, found.digest.hexdigest())
            path = folder / INDEX
            whole = len(found.done) == len(self.images) and path.is_file() and path.read_bytes() == index
            problem = self._changed(found.done) if whole else f"{folder / file_of(self.store)} or {path} is damaged"
            if not problem:
                self.say(f"the images are unchanged since they were packed in {folder}; this pack is used again")
                return folder, found.done, info
            self.say(f"{problem}; {folder} cannot be used, so the images are packed again")
        return None

    def _changed(self, done: Sequence[Outcome]) -> str:
        """Which image has other bytes than were packed; "" where none has."""
        for at, (outcome, found) in enumerate(zip(done, in_order(self.sha256, self.images, self.threads), strict=True)):
            if isinstance(outcome, PackedImage) and outcome.sha256 != found:
                self.advance(-at)
                return f"{name_of(self.images[at])} has changed since it was packed"
            self.advance(1)
        return ""

    def _read(self, image: Located) -> tuple[Outcome, bytes]:
        try:
            payload = self.listing.fetch(image)
            pixels = convert(self.listing.decode(payload), self.store)
        except UnreadableError as error:
            return str(error), b""
        content, row = encode(pixels, self.store)
        return PackedImage(hashlib.sha256(payload).hexdigest(), row), content

    def sha256(self, image: Located) -> str:
        """Of an image's bytes; "" where they cannot be read."""
        try:
            return hashlib.sha256(self.listing.fetch(image)).hexdigest()
        except UnreadableError:
            return ""

    def _read_journal(self, folder: Path, key: str) -> _Begun:
        """What a journal of this key says, up to a torn line or an image that can be read by now, if the file has those bytes."""
        path, found = folder / file_of(self.store), _Begun()
        if not (folder / JOURNAL).is_file() or not path.is_file():
            return found
        with (folder / JOURNAL).open("rb") as journal:
            if journal.readline() != _head(key):
                return found
            head = found.journal_bytes = journal.tell()
            sha256 = found.digest.hexdigest()
            for line in journal:
                block, after = _parse_line(line)
                images = zip(self.images[len(found.done) :], block, strict=False)
                failed = [image for image, one in images if isinstance(one, str)]
                if not block or any(isinstance(self._read(image)[0], PackedImage) for image in failed):
                    break
                found.done, sha256, found.journal_bytes = found.done + block, after, journal.tell()
        with files.naming(path):
            content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        found.digest.update(content[: sum(row.length for row in _rows(found.done))])
        return found if found.digest.hexdigest() == sha256 else _Begun(journal_bytes=head)


def in_order(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Apply `work` to each item with threads; results are in the order of the items, and a bounded number is in progress."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= _AHEAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def name_of(image: Named) -> str:
    """The name of an image in messages and manifests."""
    return "/".join(image.key)


def _rows(done: Iterable[Outcome]) -> list[StoredImage]:
    return [outcome.row for outcome in done if isinstance(outcome, PackedImage)]


def _head(key: str) -> bytes:
    return f"isd-repro pack 2 {key}\n".encode()


def _line(block: Sequence[Outcome], sha256: str) -> bytes:
    images = [outcome if isinstance(outcome, str) else [outcome.sha256, *outcome.row] for outcome in block]
    return json.dumps({"images": images, "sha256": sha256}).encode() + b"\n"


def _parse_line(line: bytes) -> tuple[list[Outcome], str]:
    """A block and the sha256 of the file up to its end; no block where the line is torn."""
    try:
        found = json.loads(line)
    except ValueError:
        return [], ""
    block = [one if isinstance(one, str) else PackedImage(one[0], StoredImage(*one[1:])) for one in found["images"]]
    return block, found["sha256"]
