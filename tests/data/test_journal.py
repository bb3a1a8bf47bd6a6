"""The journal of a pack: what is sealed is gone on with, what is torn or damaged is done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from isd_repro.config import params
from isd_repro.data import journal
from isd_repro.data.encoding import Encoded
from isd_repro.data.journal import JOURNAL, Entry, Journal, entry_of
from isd_repro.data.store import PIXELS, StoreWriter

STORE = params.Store(channels=1)
IMAGES = [None if k % 5 == 3 else Encoded(f"{k:064x}", bytes([k]) * (k + 1), 1, k + 1, 1) for k in range(11)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BLOCK", 4)


def work(folder: Path, until: int = len(IMAGES), *, end: bool = True) -> int:
    """Pack, going on from what there is; how many images were gone on from."""
    book = Journal(folder, "key")
    digest, _ = book.check(folder / PIXELS)
    first = len(book.entries)
    rows = [(entry.height, entry.width, entry.channels, entry.length) for entry in book.entries if entry is not None]
    with StoreWriter(folder, STORE, rows, digest) as writer:
        book.begin()
        for image in IMAGES[first:until]:
            if image is not None:
                writer.add(image.content, image.height, image.width, image.channels)
            book.note(None if image is None else entry_of(image), writer)
        if end:
            book.seal(writer)
            writer.finish()
    return first


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "whole"
    folder.mkdir()
    assert work(folder) == 0
    return files(folder)


def test_what_is_written_is_read(tmp_path: Path, whole: dict[str, bytes]) -> None:
    book = Journal(tmp_path / "whole", "key")
    assert book.entries == [None if image is None else entry_of(image) for image in IMAGES]
    assert [seal.images for seal in book.seals] == [4, 8, 11]
    assert whole[PIXELS] == b"".join(image.content for image in IMAGES if image is not None)
    assert Journal(tmp_path / "whole", "other").entries == []
    assert journal.is_of(tmp_path / "whole", "key")
    assert not journal.is_of(tmp_path / "whole", "ke")
    assert not journal.is_of(tmp_path, "key")


@pytest.mark.parametrize("until", range(len(IMAGES) + 1))
def test_going_on_gives_the_bytes_of_one_go(until: int, tmp_path: Path, whole: dict[str, bytes]) -> None:
    work(tmp_path, until, end=False)
    assert work(tmp_path) == until // 4 * 4
    assert {name: content for name, content in files(tmp_path).items() if name in whole} == whole


def test_a_journal_cut_anywhere_is_gone_on_with(tmp_path: Path, whole: dict[str, bytes]) -> None:
    text = whole[JOURNAL]
    seals = [
        0,
        *(at for at in range(len(text) + 1) if text[:at].endswith(b"\n") and text[:at].splitlines()[-1].startswith(b"= ")),
    ]
    assert len(seals) == 4
    for at in range(0, len(text), 7):
        (tmp_path / PIXELS).write_bytes(whole[PIXELS] + b"more")
        (tmp_path / JOURNAL).write_bytes(text[:at])
        assert work(tmp_path) == 4 * (sum(seal <= at for seal in seals) - 1), at
        assert {name: content for name, content in files(tmp_path).items() if name in whole} == whole, at


def test_damage_is_named_and_done_again_from_its_block(tmp_path: Path, whole: dict[str, bytes]) -> None:
    ends = [seal.bytes for seal in Journal(tmp_path / "whole", "key").seals]
    for at in range(len(whole[PIXELS])):
        for content in (whole[PIXELS][:at] + b"\xff" + whole[PIXELS][at + 1 :], whole[PIXELS][:at]):
            (tmp_path / PIXELS).write_bytes(content)
            (tmp_path / JOURNAL).write_bytes(whole[JOURNAL])
            block = sum(end <= at for end in ends)
            book = Journal(tmp_path, "key")
            _, damage = book.check(tmp_path / PIXELS)
            start = ends[block - 1] if block else 0
            assert f"in bytes {start} to {ends[block]}, images {4 * block} to" in damage
            assert ("cut short" in damage) == (len(content) == at)
            assert len(book.entries) == 4 * block
            assert work(tmp_path) == 4 * block
            assert {name: found for name, found in files(tmp_path).items() if name in whole} == whole


def test_a_lost_file_is_begun_anew(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / JOURNAL).write_bytes(whole[JOURNAL])
    assert work(tmp_path) == 0
    assert {name: found for name, found in files(tmp_path).items() if name in whole} == whole


@pytest.mark.parametrize("strange", ["x\n", "1 2 3\n", "= 99 5 abc\n", f"{'0' * 64} 1 1 1 -1\n", "\n", "\xff\n"])
def test_a_strange_line_ends_what_is_believed(strange: str, tmp_path: Path, whole: dict[str, bytes]) -> None:
    lines = whole[JOURNAL].decode().splitlines(keepends=True)
    for at, want in ((1, 0), (5, 0), (6, 4), (11, 8)):  # before the first image, a seal, and the first image after each seal
        (tmp_path / JOURNAL).write_bytes("".join([*lines[:at], strange, *lines[at:]]).encode("latin-1"))
        assert len(Journal(tmp_path, "key").entries) == want, at


def test_cut_goes_back_to_the_block_before(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for images, left in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (10, 8), (11, 11)):
        book = Journal(tmp_path / "whole", "key")
        book.cut(images)
        assert len(book.entries) == left
    assert Journal(tmp_path / "whole", "key").entries[0] == Entry("0" * 64, 1, 1, 1, 1)
