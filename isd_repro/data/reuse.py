"""A finished external pack, found again and used where the source still has the bytes that were packed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from isd_repro.config import params
from isd_repro.data import crew, journal
from isd_repro.data.journal import Entry, Journal
from isd_repro.data.sources import Listing, Located
from isd_repro.data.store import INDEX, StoreInfo, file_of, index_of


def find(
    root: Path,
    key: str,
    store: params.Store,
    images: Sequence[Located],
    listing: Listing,
    *,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> tuple[Path, list[Entry | None], StoreInfo] | None:
    """A finished pack under `root` whose journal has this key, whose file is whole and whose images are still the source's.

    Every image's file is read and hashed, but not decoded; what could not be read then must still be unreadable.

    Args:
        root: the folder of packs.
        key: as the journal has it.
        store: settings of the pack.
        images: what it must hold, in its order.
        listing: the source, open.
        say: takes one plain line for the user.
        advance: as of `packing.build`.
    """
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name.startswith(".") or not journal.is_of(folder, key):
            continue
        book = Journal(folder, key)
        info = _describe(folder, book, store, len(images), say)
        if info is not None and _unchanged(folder, book.entries, images, listing, say, advance):
            say(f"the images are as they were packed in {folder}, which is used again")
            return folder, book.entries, info
    return None


def _describe(folder: Path, book: Journal, store: params.Store, images: int, say: Callable[[str], None]) -> StoreInfo | None:
    """What a manifest says of the pack; None where it is damaged, which is said."""
    path = folder / file_of(store)
    _, damage = book.check(path)
    rows, offset = [], 0
    for entry in filter(None, book.entries):
        rows.append((offset, entry.height, entry.width, entry.channels, entry.length))
        offset += entry.length
    index = index_of(rows, store)
    if not damage and (len(book.entries) != images or not path.is_file() or path.stat().st_size != offset):
        damage = f"{path}: not of the length that its journal seals"
    if not damage and (not (folder / INDEX).is_file() or (folder / INDEX).read_bytes() != index):
        damage = f"{folder / INDEX}: missing or damaged"
    if damage:
        say(f"{damage}; packing afresh")
        return None
    return StoreInfo(
        settings=store,
        images=len(rows),
        bytes=offset,
        sha256=book.seals[-1].sha256,
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _unchanged(
    folder: Path,
    entries: Sequence[Entry | None],
    images: Sequence[Located],
    listing: Listing,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> bool:
    """Whether every image has the bytes that were packed; the first that has not is named."""
    reader = crew.Reader(listing, params.Store())
    for at, (image, entry, sha256) in enumerate(zip(images, entries, crew.hashed(images, listing), strict=True)):
        unreadable = sha256 is None or (entry is None and reader.one(image) is None)
        if unreadable != (entry is None) or (entry is not None and sha256 != entry.sha256):
            say(f"{image.split}/{image.cls}/{image.file} is not what was packed in {folder}; packing afresh")
            advance(-at)
            return False
        advance(1)
    return True
