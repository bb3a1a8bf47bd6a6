"""Odd image folders and archives: nothing is unpacked or run, nothing hangs, and what is wrong is named."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from isd_repro.data.sources import UnreadableError, decode_file
from tests.data import trees
from tests.faults import chain

FILES = trees.images({"n01": 3, "n02": 3}, val=2)
PARAMS = """\
profile: tiny
report: {title: Tiny, caption: Odd images}
tracking: {wandb: "off"}
subsets:
  digits:
    source: {name: SOURCE, root_env: ISD_TEST_ROOT, dataset: Tiny images}
    rule: {name: all}
runs: {}
"""


def prepare(tmp_path: Path, root: Path, source: str = "image-folder") -> chain.Result:
    """`prepare` on a root; whatever it ends with, nothing lies outside the profile and no part of an output is left."""
    folder = tmp_path / "profile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "params.yaml").write_text(PARAMS.replace("SOURCE", source), "utf-8")
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISD_TEST_ROOT", str(root))
        result = chain.call(folder, "prepare", "digits")
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)} == before
    written = {path.relative_to(folder).as_posix() for path in (folder / "data").rglob("*") if path.is_file()}
    if result.code == 0:
        assert {Path(name).name for name in written} >= {"manifest.json", "images.tsv", "store.npy", "store.u8"}
    else:
        assert not written
    return result


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to itself": (lambda root: (root / "train/n01/0.png").symlink_to("0.png"), "0.png: cannot be "),
    "a link to nothing": (lambda root: (root / "train/n01/0.png").symlink_to("/nowhere"), "0.png: cannot be read"),
    "a class that is a link to itself": (lambda root: (root / "train/n03").symlink_to("n03"), "n03: cannot be listed"),
    "a line's end in a file's name": (
        lambda root: (root / "train/n01/a\nb.png").write_bytes(trees.jpeg(1)),
        r"a\nb.png' has control",
    ),
    "a tab in a class's name": (lambda root: (root / "train/n01").rename(root / "train/n\t1"), "classes are in train but not in"),
    "bytes that are no text": (
        lambda root: Path(os.fsdecode(os.fsencode(root) + b"/train/n01/\xff.png")).write_bytes(trees.jpeg(1)),
        "has control or undecodable characters",
    ),
    "a terminal's command": (lambda root: (root / "train/n\x1b]0;x\x07").mkdir(), r"first train/n\x1b]0;x\x07"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_folders_are_refused(kind: str, tmp_path: Path) -> None:
    root = trees.write_plain(tmp_path / "images", FILES)
    make, says = ODD[kind]
    make(root)
    result = prepare(tmp_path, root)
    chain.refused(result, says)
    assert all(sign == "\n" or sign.isprintable() for sign in result.err)


@pytest.mark.parametrize("name", ["$(touch it-ran)", "a b", "ünï"])
def test_names_that_a_shell_would_obey_are_names(name: str, tmp_path: Path) -> None:
    files = {(split, name if cls == "n01" else cls, f"{name}{file}"): content for (split, cls, file), content in FILES.items()}
    result = prepare(tmp_path, trees.write_plain(tmp_path / "images", files))
    assert result.code == 0, result
    table = (tmp_path / "profile/data/prepared/digits/images.tsv").read_text("utf-8")
    assert f"\t{name}\t" in table
    assert not list(tmp_path.rglob("it-ran"))


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    """Pipes are not waited for, and folders that file servers and notebooks make are no classes."""
    root = trees.write_plain(tmp_path / "images", FILES)
    os.mkfifo(root / "train/n01/pipe.png")
    (root / "train/n02/again").symlink_to(root)
    for name in ("@eaDir", ".ipynb_checkpoints", "__MACOSX"):
        for folder in (root / "train", root / "val", root / "train/n01"):
            (folder / name).mkdir()
            (folder / name / "x.JPEG").write_bytes(b"junk")
    result = prepare(tmp_path, root)
    assert result.code == 0, result
    assert "1 files or folders under train and val were ignored: folders 1" in result.err
    assert (tmp_path / "profile/data/prepared/digits/images.tsv").read_text().count("\n") == len(FILES) + 1


@pytest.mark.parametrize("cls", ["../../escape", "..", ".", "", "/etc", "a/b", "a\x1bb"])
def test_annotations_cannot_leave_the_root(cls: str, tmp_path: Path) -> None:
    root = trees.write_official(tmp_path / "images", FILES)
    path = root / "val/val_annotations.txt"
    path.write_text(path.read_text("utf-8").replace("\tn01\t", f"\t{cls}\t"), "utf-8")
    chain.refused(prepare(tmp_path, root, "tiny-imagenet"))


# --- zips ---------------------------------------------------------------------------------------------------------------


def zipped(path: Path, *more: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*trees.official(FILES).items(), *more]:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name", ["../../escape.png", "/etc/escape.png", "train/../../escape.png", "train/n01/images/../../a.png"]
)
def test_entries_outside_are_not_written_anywhere(name: str, tmp_path: Path) -> None:
    result = prepare(tmp_path, zipped(tmp_path / "x.zip", (name, trees.jpeg(1))), "tiny-imagenet")
    if result.code:
        chain.refused(result)
    else:
        assert ".." not in (tmp_path / "profile/data/prepared/digits/images.tsv").read_text("utf-8")
    assert not list(tmp_path.rglob("escape.png"))
    assert not Path("/etc/escape.png").exists()


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


ZIPS: dict[str, Callable[[Path], object]] = {
    "encrypted": edited(lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")),
    "of a method that nobody has": edited(
        lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00")
    ),
    "cut short": edited(lambda raw: raw[: len(raw) // 2]),
    "empty": edited(lambda raw: b""),
    "a text": edited(lambda raw: b"no zip\n" * 100),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_odd_zips_are_refused(kind: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip")
    before = path.read_bytes()
    ZIPS[kind](path)
    assert path.read_bytes() != before
    chain.refused(prepare(tmp_path, path, "tiny-imagenet"))


# --- images -------------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A grey PNG that claims a size that it does not hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 5)])
def test_a_decompression_bomb_is_unreadable(width: int, height: int) -> None:
    with pytest.raises(UnreadableError):
        decode_file(png(width, height))


def test_corrupt_exif_data_are_no_ones_concern(tmp_path: Path) -> None:
    """Nothing turns images by their EXIF orientation, so a warning of it, without the file's name, would help nobody."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0"
    whole = trees.jpeg(1)
    content = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[20:]  # in place of the JFIF header
    root = trees.write_plain(tmp_path / "images", FILES | {("train", "n01", "odd.JPEG"): content})
    result = prepare(tmp_path, root)
    assert result.code == 0, result
    assert "EXIF" not in result.err


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_other_formats_are_not_opened(kind: str) -> None:
    """An EPS file under an image's name would make PIL start Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    with pytest.raises(UnreadableError):
        decode_file(buffer.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_the_usual_formats_are(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8)).save(buffer, kind)
    assert decode_file(buffer.getvalue()).size == (16, 8)
