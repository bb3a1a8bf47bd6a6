"""External packs: any number of threads, continuing after an interruption, using a finished pack again, and damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from isd_repro import cli
from isd_repro.config import params
from isd_repro.data import packing
from isd_repro.data.manifests import PACK_ROOT, open_prepared
from isd_repro.data.packing import JOURNAL, Packer, in_order
from isd_repro.data.sources import Located
from isd_repro.runtime.errors import DataError
from tests.data import trees
from tests.pipeline.test_prepare import Bench, fail_at

FILES = trees.images({"n01": 14, "n02": 15, "n03": 13}, val=3, ragged=True)
RAW = params.StoreSettings(resize="short-side", side=6, external=True)
JPEG = params.StoreSettings(resize="short-side", side=6, external=True, jpeg_quality=85)
BOTH = pytest.mark.parametrize("store", [RAW, JPEG], ids=["raw", "jpeg"])


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISD_TEST_ROOT", str(trees.write_plain(tmp_path / "images", FILES)))
    monkeypatch.setenv(PACK_ROOT, str(tmp_path / "packs"))
    monkeypatch.setattr(packing, "BLOCK", 8)
    return tmp_path / "packs"


def bytes_of(packs: Path) -> dict[str, bytes]:
    return {path.relative_to(packs).as_posix(): path.read_bytes() for path in packs.rglob("*") if path.is_file()}


def run(folder: Path, subset: params.Subset, threads: int = 1) -> Bench:
    bench = Bench(folder)
    bench.run(subset, threads=threads)
    return bench


@BOTH
def test_any_number_of_threads_writes_the_same_bytes(store: params.StoreSettings, packs: Path, tmp_path: Path) -> None:
    subset = trees.subset(store=store, search=4)
    first = run(tmp_path / "one", subset)
    want = bytes_of(packs)
    shutil.rmtree(packs)
    second = run(tmp_path / "two", subset, threads=5)
    assert bytes_of(packs) == want
    assert len(want) == 3
    for name in ("manifest.json", "images.tsv"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    found = open_prepared(second.folder)
    assert len(found.store) == len(FILES)
    assert set(found.store.sizes.amin(dim=1).tolist()) == {6}


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["stopped", "full"])
def test_an_interrupted_pack_is_gone_on_with(
    store: params.StoreSettings, error: BaseException, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = trees.subset(store=store)
    run(tmp_path / "one", subset)
    want = bytes_of(packs)
    shutil.rmtree(packs)
    bench = Bench(tmp_path / "two")
    for image in (21, 9):
        with monkeypatch.context() as patch:
            fail_at(patch, image, error)
            with pytest.raises((KeyboardInterrupt, DataError)):
                bench.run(subset)
        assert not bench.folder.exists()
        assert all(name.startswith(".partial-") for name in bytes_of(packs))
    asked: list[str] = []
    read = Packer._read

    def noting(self: Packer, image: Located) -> object:
        asked.append(image.file)
        return read(self, image)

    monkeypatch.setattr(Packer, "_read", noting)
    bench.run(subset)
    assert bytes_of(packs) == want
    assert f"continuing after 24 of {len(FILES)} images" in bench.text.getvalue()
    assert len(asked) == len(FILES) - 24
    assert [path.name for path in packs.iterdir()] == [next(iter(want)).split("/")[0]]


def test_torn_journals_and_damaged_blocks_are_packed_again(packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subset = trees.subset(store=RAW)
    run(tmp_path / "one", subset)
    want = bytes_of(packs)
    shutil.rmtree(packs)
    bench = Bench(tmp_path / "two")
    with monkeypatch.context() as patch:
        fail_at(patch, 45, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            bench.run(subset)
    [begun] = packs.iterdir()
    journal, store = (begun / JOURNAL).read_bytes(), (begun / "store.u8").read_bytes()
    ends = [at + 1 for at, sign in enumerate(journal) if sign == ord("\n")]
    cases = [
        (journal[:cut], store + b"more", 8 * max(0, sum(end <= cut for end in ends) - 1)) for cut in range(0, len(journal), 97)
    ]
    cases += [(journal, store[:7] + bytes([store[7] ^ 1]) + store[8:], 0), (journal, store[:-1], 0), (journal, b"", 0)]
    cases += [(journal.replace(b"pack 2 ", b"pack 2 x"), store, 0)]
    for lines, content, kept in cases:
        shutil.rmtree(packs)
        begun.mkdir(parents=True)
        (begun / JOURNAL).write_bytes(lines)
        (begun / "store.u8").write_bytes(content)
        again = run(tmp_path / "three", subset)
        assert bytes_of(packs) == want
        assert (f"continuing after {kept} of" in again.text.getvalue()) == bool(kept), (len(lines), len(content), kept)


def test_a_finished_pack_is_used_again_where_the_images_are_the_same(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = trees.subset(store=JPEG)
    bench = run(tmp_path / "one", subset)
    before = bytes_of(packs)
    manifest = (bench.folder / "manifest.json").read_bytes()
    shutil.rmtree(bench.folder)
    with monkeypatch.context() as patch:
        patch.setattr(Packer, "pack", lambda *_: pytest.fail("packs again"))
        bench.run(subset)
    assert "this pack is used again" in bench.text.getvalue()
    assert (bench.folder / "manifest.json").read_bytes() == manifest
    assert bytes_of(packs) == before
    image = tmp_path / "images" / "val" / "n02" / "val_4.JPEG"
    image.write_bytes(image.read_bytes() + b"\0")
    bench.run(subset)
    assert "val/n02/val_4.JPEG has changed since it was packed" in bench.text.getvalue()
    assert len(list(packs.iterdir())) == 2, "the older pack is another manifest's"


@pytest.mark.parametrize("file", ["store.jpegs", "store.npy"])
def test_a_damaged_pack_is_named_and_made_anew(file: str, packs: Path, tmp_path: Path) -> None:
    subset = trees.subset(store=JPEG)
    bench = run(tmp_path / "one", subset)
    want = bytes_of(packs)
    [path] = packs.rglob(file)
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=file):
        open_prepared(bench.folder)
    bench.run(subset)
    assert f"{path}" in bench.text.getvalue()
    assert "packed again" in bench.text.getvalue()
    assert bytes_of(packs) == want


def test_images_that_cannot_be_read_are_left_out_until_they_can(packs: Path, tmp_path: Path) -> None:
    run(tmp_path / "one", trees.subset(store=RAW))
    want = bytes_of(packs)
    shutil.rmtree(packs)
    image = tmp_path / "images" / "train" / "n02" / "n02_3.JPEG"
    good = image.read_bytes()
    image.write_bytes(good[:200])
    bench = Bench(tmp_path / "two")
    with pytest.raises(DataError, match=r"1 of 51 images are unreadable.* first train/n02/n02_3\.JPEG \(.+\)"):
        bench.run(trees.subset(store=RAW))
    bench.run(trees.subset(store=RAW, corrupt_share=0.1))
    assert "continuing after 51 of 51 images" in bench.text.getvalue()
    first = (bench.folder / "manifest.json").read_bytes()
    bench.run(trees.subset(store=RAW, corrupt_share=0.1))
    assert "this pack is used again" in bench.text.getvalue()
    assert (bench.folder / "manifest.json").read_bytes() == first
    image.write_bytes(good)
    bench.run(trees.subset(store=RAW))
    assert {name: content for name, content in bytes_of(packs).items() if name in want} == want


def test_a_bounded_number_of_images_is_under_way() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return -item

    for taken, value in enumerate(in_order(work, range(100), 2)):
        assert value == -taken
        assert len(begun) <= taken + 8
    assert sorted(begun) == list(range(100))


def test_an_image_that_vanished_ends_the_work(packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Packer._read

    def gone(self: Packer, image: Located) -> object:
        (tmp_path / "images" / "train" / "n03" / "n03_2.JPEG").unlink(missing_ok=True)
        return fetch(self, image)

    monkeypatch.setattr(Packer, "_read", gone)
    with pytest.raises(DataError, match=r"n03_2\.JPEG: cannot be read"):
        run(tmp_path / "one", trees.subset(store=RAW), threads=2)


def test_the_command_packs_once(packs: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.mkdir()
    store = "{resize: short-side, side: 6, external: true, jpeg_quality: 85}"
    (profile / "params.yaml").write_text(
        "profile: tiny\nreport: {title: t, caption: c}\nruns: {}\nsubsets:\n"
        "  x: {source: {name: image-folder, dataset: Tiny, root_env: ISD_TEST_ROOT}, rule: {name: all}, store: "
        f"{store}}}\n"
    )
    words = ["--params", str(profile / "params.yaml")]
    done = CliRunner().invoke(cli.app, ["prepare", "x", "--threads", "1", *words])
    assert done.exit_code == 0, done.output
    before = bytes_of(packs)
    shutil.rmtree(profile / "data")
    done = CliRunner().invoke(cli.app, ["prepare", "x", "--threads", "2", *words])
    assert done.exit_code == 0, done.output
    assert "this pack is used again" in done.output
    assert bytes_of(packs) == before
