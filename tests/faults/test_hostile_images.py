"""Image folders and archives from strangers: nothing is unpacked, nothing hangs, nothing is run, and what is odd is named."""

from __future__ import annotations

import io
import os
import shutil
import struct
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image

from isd_repro.data import opening
from isd_repro.data.opening import MAX_PIXELS, UnreadableError, decode_file
from tests.data import trees
from tests.faults import chain

HANG = 60  # seconds
FILES = trees.images({"n01": 3, "n02": 3}, val=2)
PARAMS = """\
profile: tiny
report: {title: Tiny, caption: Strangers' images}
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


# --- folders ------------------------------------------------------------------------------------------------------------


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        pytest.skip("devices cannot be made here")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (lambda root: os.mkfifo(root / "train/n01/0.png"), "0.png: no regular file"),
    "a device": (lambda root: device(root / "train/n01/0.png"), "0.png: no regular file"),
    "a socket's name": (lambda root: os.mknod(root / "train/n01/0.png", 0o140600), "0.png: cannot be read"),
    "a link to a pipe": (
        lambda root: [os.mkfifo(root / "pipe"), (root / "train/n01/0.png").symlink_to(root / "pipe")],  # type: ignore[func-returns-value]
        "0.png: no regular file",
    ),
    "a link to itself": (lambda root: (root / "train/n01/0.png").symlink_to("0.png"), "0.png: a link that leads nowhere"),
    "a link to nothing": (lambda root: (root / "train/n01/0.png").symlink_to("/nowhere"), "0.png: cannot be read"),
    "a class that is a link to itself": (lambda root: (root / "train/n03").symlink_to("n03"), "n03: a link that leads nowhere"),
    "a file without an end": (
        lambda root: os.truncate(os.open(root / "train/n01/0.png", os.O_CREAT | os.O_WRONLY), 2**40),
        "0.png: 1,099,511,627,776 bytes, at most",
    ),
    "a line's end in a file's name": (
        lambda root: (root / "train/n01/a\nb.png").write_bytes(trees.jpeg(1)),
        r"a\nb.png' has control",
    ),
    "a tab in a class's name": (
        lambda root: (root / "train/n01").rename(root / "train/n\t1"),
        "classes are in train but not in val",
    ),
    "bytes that are no text": (
        lambda root: Path(os.fsdecode(os.fsencode(root) + b"/train/n01/\xff.png")).write_bytes(trees.jpeg(1)),
        "has control or undecodable characters",
    ),
    "a terminal's command": (lambda root: (root / "train/n\x1b]0;x\x07").mkdir(), r"first train/n\x1b]0;x\x07"),
    "text turned round": (
        lambda root: [(root / split / "n01").rename(root / split / "n\u202e01") for split in ("train", "val")],
        "has control or undecodable characters",
    ),
}


@contextmanager
def no_waiting(root: Path) -> Iterator[None]:
    """Whoever waits for the other end of a pipe gets it after a while, so that a hang is a failure and no hang."""
    waited: list[Path] = []

    def let_go() -> None:
        for path in (path for path in root.rglob("*") if path.is_fifo()):
            with suppress(OSError):  # nobody reads it
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                waited.append(path)

    timer = threading.Timer(HANG, let_go)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    assert waited == [], f"waited {HANG} s for the other end of a pipe"


@pytest.mark.parametrize("kind", ODD)
def test_odd_folders_are_refused(kind: str, tmp_path: Path) -> None:
    root = trees.write_plain(tmp_path / "images", FILES)
    make, says = ODD[kind]
    make(root)
    with no_waiting(root):
        result = prepare(tmp_path, root)
    chain.refused(result, says)
    assert all(sign == "\n" or sign.isprintable() for sign in result.err)


@pytest.mark.parametrize(
    "name", ["-rf", "$(touch it-ran)", "; touch it-ran", "`touch it-ran`", "a b", "<b>", "ünï", "CON", "'", '"', "*"]
)
def test_names_that_a_shell_would_obey_are_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {(split, name if cls == "n01" else cls, f"{name}{file}"): content for (split, cls, file), content in FILES.items()}
    result = prepare(tmp_path, trees.write_plain(tmp_path / "images", files))
    assert result.code == 0, result
    table = (tmp_path / "profile/data/prepared/digits/images.tsv").read_text("utf-8")
    assert f"\t{name}\t" in table
    assert not list(tmp_path.rglob("it-ran"))


def test_folders_that_loop_end(tmp_path: Path) -> None:
    """Links are followed to a fixed depth: a class that holds itself is a class."""
    root = trees.write_plain(tmp_path / "images", FILES)
    for cls in ("n01", "n02"):
        (root / "train" / cls / "images").symlink_to(root / "train" / cls)
        (root / "train" / cls / "again").symlink_to(root)
    assert prepare(tmp_path, root).code == 0
    chain.refused(prepare(tmp_path, root, "tiny-imagenet"), "are both train/n01/n01_0.JPEG")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_root_that_is_no_folder(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    os.mkfifo(root) if kind == "pipe" else device(root)
    for source in ("image-folder", "tiny-imagenet", "cifar10"):
        chain.refused(prepare(tmp_path, root, source), "no such folder")


@pytest.mark.parametrize("cls", ["../../escape", "..", ".", "", "/etc", "a/b", "a\x1bb"])
def test_annotations_cannot_leave_the_root(cls: str, tmp_path: Path) -> None:
    root = trees.write_official(tmp_path / "images", FILES)
    path = root / "val/val_annotations.txt"
    path.write_text(path.read_text("utf-8").replace("\tn01\t", f"\t{cls}\t"), "utf-8")
    chain.refused(prepare(tmp_path, root, "tiny-imagenet"))


def test_annotations_that_are_no_text(tmp_path: Path) -> None:
    root = trees.write_official(tmp_path / "images", FILES)
    (root / "val/val_annotations.txt").write_bytes(b"val_0.JPEG\tn\xff\n")
    chain.refused(prepare(tmp_path, root, "tiny-imagenet"), "is not UTF-8 text")
    (root / "val/val_annotations.txt").unlink()
    os.mkfifo(root / "val/val_annotations.txt")
    assert prepare(tmp_path, root, "tiny-imagenet").code == 4


# --- zips ---------------------------------------------------------------------------------------------------------------


def zipped(path: Path, *more: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*trees.official(FILES).items(), *more]:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "name", ["../../escape.png", "/etc/escape.png", "train/../../escape.png", "..\\escape.png", "test/x.png"]
)
def test_entries_outside_are_not_written_anywhere(name: str, tmp_path: Path) -> None:
    result = prepare(tmp_path, zipped(tmp_path / "x.zip", (name, trees.jpeg(1))), "tiny-imagenet")
    assert result.code in {0, 4}, result
    assert not list(tmp_path.rglob("escape.png"))
    assert not Path("/etc/escape.png").exists()


@pytest.mark.parametrize("name", ["train/../images/a.png", "train/n01/images/../../../a.png", "train//images/a.png"])
def test_entries_with_dots_are_no_images(name: str, tmp_path: Path) -> None:
    result = prepare(tmp_path, zipped(tmp_path / "x.zip", (name, trees.jpeg(1))), "tiny-imagenet")
    if result.code:
        chain.refused(result)
    else:
        assert ".." not in (tmp_path / "profile/data/prepared/digits/images.tsv").read_text("utf-8")


def test_a_link_in_a_zip_is_bytes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip")
    info = zipfile.ZipInfo("train/n01/images/link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    chain.refused(prepare(tmp_path, path, "tiny-imagenet"), "1 of 11 images are unreadable", "link.png")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry states its size, and no more than that is ever unpacked."""
    monkeypatch.setattr(opening, "MAX_BYTES", 100_000)
    more = ("train/n01/images/bomb.png", bytes(10_000_000))
    path = zipped(tmp_path / "x.zip", more, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 50_000
    with zipfile.ZipFile(path) as archive, pytest.raises(UnreadableError, match="unpacks to 10,000,000 bytes, at most"):
        opening.unpack(archive, more[0])
    chain.refused(prepare(tmp_path, path, "tiny-imagenet"), "1 of 11 images are unreadable", "bomb.png")
    liar = path.read_bytes().replace(struct.pack("<I", 10_000_000), struct.pack("<I", 1000))
    path.write_bytes(liar)
    chain.refused(prepare(tmp_path, path, "tiny-imagenet"), "1 of 11 images are unreadable", "bomb.png")


def edited(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


ZIPS: dict[str, Callable[[Path], object]] = {
    "encrypted": edited(lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")),
    "of a method that nobody has": edited(
        lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00")
    ),
    "with names that are no text": edited(
        lambda raw: raw.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x08").replace(
            b"n01_0", b"n01_\xff"
        )
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


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A grey PNG that claims a size, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body or zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (MAX_PIXELS + 1, 1), (0, 5)])
def test_a_decompression_bomb_is_unreadable(width: int, height: int) -> None:
    with pytest.raises(UnreadableError):
        decode_file(png(width, height))


def test_the_limit_itself_is_decoded_and_one_more_is_not() -> None:
    side = int(MAX_PIXELS**0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's own warning is an error to the tests and none to users
        opening.open_image(png(side, side))
        with pytest.raises(UnreadableError, match="pixels, at most 89,478,485"):
            opening.open_image(png(side + 1, side + 1))


def test_a_bomb_among_images_is_counted(tmp_path: Path) -> None:
    root = trees.write_plain(tmp_path / "images", FILES | {("train", "n01", "bomb.png"): png(30_000, 30_000)})
    chain.refused(prepare(tmp_path, root), "1 of 11 images are unreadable", "bomb.png")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TIFF", "ICO", "PPM"])
def test_other_formats_are_not_opened(kind: str) -> None:
    """An EPS file under an image's name would make PIL start Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    with pytest.raises(UnreadableError):
        decode_file(buffer.getvalue())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_the_usual_formats_are(kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8)).save(buffer, kind)
    assert decode_file(buffer.getvalue()).size == (16, 8)
