"""Files of strangers: nothing is unpacked or run, nothing hangs, nothing drives a terminal, and what is wrong is named."""

from __future__ import annotations

import base64
import json
import os
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isd_repro.config.reader import fingerprint
from isd_repro.records import unpack_labels
from isd_repro.report import text
from isd_repro.runtime.errors import DataError, printable
from tests.data import trees
from tests.faults import chain
from tests.report.conftest import make

# --- images -----------------------------------------------------------------------------------------------------------------

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
    folder.mkdir()
    (folder / "params.yaml").write_text(PARAMS.replace("SOURCE", source), "utf-8")
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISD_TEST_ROOT", str(root))
        result = chain.call(folder, "prepare", "digits")
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(folder)} == before
    written = {path.name for path in (folder / "data").rglob("*") if path.is_file()}
    assert written >= {"manifest.json", "images.tsv", "store.npy", "store.u8"} if result.code == 0 else not written
    return result


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to itself": (lambda root: (root / "train/n01/0.png").symlink_to("0.png"), "0.png: cannot be "),
    "a class that is a link to itself": (lambda root: (root / "train/n03").symlink_to("n03"), "n03: cannot be listed"),
    "bytes that are no text": (
        lambda root: Path(os.fsdecode(os.fsencode(root) + b"/train/n01/\xff.png")).write_bytes(trees.jpeg(1)),
        "has control or undecodable characters",
    ),
    "a terminal's command": (lambda root: (root / "train/n\x1b]0;x\x07").mkdir(), r"first train/n\x1b]0;x\x07"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_folders_are_refused(kind: str, tmp_path: Path) -> None:
    root = trees.write_plain(tmp_path / "images", FILES)
    make_it, says = ODD[kind]
    make_it(root)
    result = prepare(tmp_path, root)
    chain.refused(result, says)
    assert all(sign == "\n" or sign.isprintable() for sign in result.err)


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    """Pipes are not waited for, folders that programs leave are no classes, and damaged EXIF data are no one's concern."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01\x02\0\xff\0\0\0\xff\xff\0\0"
    whole = trees.jpeg(1)
    odd = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[20:]  # in place of the JFIF header
    root = trees.write_plain(tmp_path / "images", FILES | {("train", "n01", "odd.JPEG"): odd})
    os.mkfifo(root / "train/n01/pipe.png")
    (root / "train/n02/again").symlink_to(root)
    (root / "train/__MACOSX").mkdir()
    result = prepare(tmp_path, root)
    assert result.code == 0, result
    assert "1 files or folders under train and val were ignored: folders 1" in result.err
    assert "EXIF" not in result.err
    assert (tmp_path / "profile/data/prepared/digits/images.tsv").read_text().count("\n") == len(FILES) + 2


def zipped(path: Path, *more: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*trees.official(FILES).items(), *more]:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["/etc/escape.png", "train/n01/images/../../escape.png"])
def test_entries_outside_are_not_written_anywhere(name: str, tmp_path: Path) -> None:
    result = prepare(tmp_path, zipped(tmp_path / "x.zip", (name, trees.jpeg(1))), "tiny-imagenet")
    if result.code:
        chain.refused(result)
    else:
        assert ".." not in (tmp_path / "profile/data/prepared/digits/images.tsv").read_text("utf-8")
    assert not list(tmp_path.rglob("escape.png"))
    assert not Path("/etc/escape.png").exists()


ENTRY = b"PK\x01\x02\x14\x03\x14\x00"
ZIPS: dict[str, Callable[[bytes], bytes]] = {
    "encrypted": lambda raw: raw.replace(ENTRY + b"\x00\x00", ENTRY + b"\x01\x00"),
    "of a method that nobody has": lambda raw: raw.replace(ENTRY + b"\x00\x00\x00\x00", ENTRY + b"\x00\x00\x63\x00"),
    "cut short": lambda raw: raw[: len(raw) // 2],
    "a text": lambda raw: b"no zip\n" * 100,
}


@pytest.mark.parametrize("kind", ZIPS)
def test_odd_zips_are_refused(kind: str, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip")
    before = path.read_bytes()
    path.write_bytes(ZIPS[kind](before))
    assert path.read_bytes() != before
    chain.refused(prepare(tmp_path, path, "tiny-imagenet"))


# --- words ------------------------------------------------------------------------------------------------------------------

CONTROL = ["\x1b]0;owned\x07", "\u202etxt.exe", "\x00", "\x9b31m", "\u2028", "\ud800"]


@pytest.mark.parametrize("words", CONTROL)
def test_nothing_printed_drives_a_terminal(words: str) -> None:
    assert all(sign == "\n" or sign.isprintable() for sign in printable(f"a{words}b\nc"))
    assert printable("plain, ünï\u00a0<b>\n") == "plain, ünï\u00a0<b>\n"
    for escape in (text.latex, text.markdown, text.csv_cell):
        assert escape(f"a{words}b").isprintable()


def test_evaluate_prints_and_writes_names_as_they_are(done: Path) -> None:
    """A label and names of files that a terminal or a markup would obey."""
    command = "[red]\x1b[31m[/red]"
    chain.refused(chain.call(done, *chain.EVALUATE, "--label", command), "contains invisible characters", code=3)
    odd = ("evaluate", "--ckpt", "\x1b[31m\udcff.safetensors", *chain.EVALUATE[3:], "--label", "[red]x[/red]", "--no-cache")
    (done / "runs/isd/encoder.safetensors").rename(done / odd[2])
    result = chain.call(done, *odd)
    assert result.code == 0, result
    assert (result.out + result.err).replace("\n", "").isprintable()
    assert "[red]x[/red]" in result.out
    assert json.loads(chain.call(done, *odd, "--json").out)["file"] == r"\x1b[31m\udcff.safetensors"


# --- records ----------------------------------------------------------------------------------------------------------------

ABSURD: dict[str, tuple[Any, Callable[[dict[str, Any]], object]]] = {
    "a terminal's command": ("pretrain", lambda tree: tree.update(label="\x1b[2J")),
    "more queries than there can be": ("knn", lambda tree: tree["manifest"].update(query=10**12)),
    "counts beyond a float": ("knn", lambda tree: tree["scores"][0].update(n=10**400, correct=1)),
    "negative counts": ("knn", lambda tree: tree["scores"][0].update(correct=-1)),
    "a metric that is none": ("knn", lambda tree: tree["scores"][0].update(metric="\u0663-NN")),
    "seconds without end": ("knn", lambda tree: tree["provenance"].update(seconds=1e300)),
    "an infinite loss": ("pretrain", lambda tree: tree["curve"][0].update(loss=float("inf"))),
    "no optimiser": ("pretrain", lambda tree: tree.update(config={}, fingerprint=fingerprint({}))),
    "steps beyond a file": ("pretrain", lambda tree: tree.update(steps=10**30)),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_records_are_refused(kind: str, tmp_path: Path) -> None:
    part, change = ABSURD[kind]
    profile = make(tmp_path)
    path = profile.layout.record("isd", part)
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")
    with pytest.raises(DataError) as caught:
        profile.files()
    assert str(path) in caught.value.message


def test_a_packed_bomb_is_not_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(200_000_000), 9)).decode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="more than 10000000 entries"):
        unpack_labels(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
