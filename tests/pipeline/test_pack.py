"""External packs: several processes, going on, using a finished one again, and what is said of damage."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from isd_repro import cli
from isd_repro.config import params
from isd_repro.data import crew, journal, sources
from isd_repro.data.prepared import PACK_ROOT, open_prepared
from isd_repro.data.sources import Located
from isd_repro.data.store import StoreWriter
from isd_repro.runtime.errors import DataError
from tests.data import trees
from tests.pipeline.test_prepare import Bench

FILES = trees.images({"n01": 14, "n02": 15, "n03": 13}, val=3, ragged=True)
RAW = params.Store(resize="short-side", size=6, external=True)
JPEG = params.Store(resize="short-side", size=6, external=True, jpeg_quality=85)


@pytest.fixture
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISD_TEST_ROOT", str(trees.write_plain(tmp_path / "images", FILES)))
    monkeypatch.setenv(PACK_ROOT, str(tmp_path / "packs"))
    monkeypatch.setattr(journal, "BLOCK", 8)
    monkeypatch.setattr(crew, "CHUNK", 3)
    return tmp_path / "packs"


def bytes_of(packs: Path) -> dict[str, bytes]:
    return {path.relative_to(packs).as_posix(): path.read_bytes() for path in packs.rglob("*") if path.is_file()}


def run(folder: Path, subset: params.Subset, *, processes: int = 1) -> Bench:
    bench = Bench(folder)
    bench.run(subset, processes=processes)
    return bench


@pytest.mark.parametrize("store", [RAW, JPEG], ids=["raw", "jpeg"])
def test_processes_and_threads_write_the_same_bytes(
    store: params.Store, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = trees.subset(store=store, search=4)
    first = run(tmp_path / "one", subset)
    want = bytes_of(packs)
    shutil.rmtree(packs)
    second = run(tmp_path / "two", subset, processes=2)
    assert bytes_of(packs) == want
    assert len(want) == 3
    for name in ("manifest.json", "images.tsv"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    found = open_prepared(second.folder)
    assert len(found.store) == len(FILES)
    assert min(found.store.sizes.amin(dim=1).tolist()) == max(found.store.sizes.amin(dim=1).tolist()) == 6


@pytest.mark.parametrize("store", [RAW, JPEG], ids=["raw", "jpeg"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["stopped", "full"])
def test_what_was_packed_is_gone_on_with(
    store: params.Store, error: BaseException, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = trees.subset(store=store)
    run(tmp_path / "one", subset)
    want = bytes_of(packs)
    shutil.rmtree(packs)
    add, read = StoreWriter.add, crew.Reader.all
    written: list[int] = []
    asked: list[str] = []

    def failing(self: StoreWriter, content: bytes, height: int, width: int, channels: int) -> None:
        written.append(1)
        if len(written) in (21, 30):
            raise error
        add(self, content, height, width, channels)

    def noting(self: crew.Reader, images: Sequence[Located]) -> object:
        asked.extend(f"{image.split}/{image.file}" for image in images)
        return read(self, images)

    bench = Bench(tmp_path / "two")
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", failing)
        for _ in range(2):
            with pytest.raises((KeyboardInterrupt, DataError)):
                bench.run(subset)
            assert not bench.folder.exists()
            assert all(name.startswith(".partial-") for name in bytes_of(packs))
    with monkeypatch.context() as patch:
        patch.setattr(crew.Reader, "all", noting)
        bench.run(subset)
    assert bytes_of(packs) == want
    assert f"going on after 24 of {len(FILES)} images" in bench.text.getvalue()
    assert len(asked) == len(FILES) - 24
    assert [path.name for path in packs.iterdir()] == [next(iter(want)).split("/")[0]]
    open_prepared(bench.folder)


def test_a_finished_pack_is_used_again_where_the_images_are_the_same(
    packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = trees.subset(store=JPEG)
    bench = run(tmp_path / "one", subset)
    before = bytes_of(packs)
    manifest = (bench.folder / "manifest.json").read_bytes()
    shutil.rmtree(bench.folder)
    with monkeypatch.context() as patch:
        patch.setattr(crew, "packed", lambda *_: pytest.fail("packs again"))
        bench.run(subset)
    assert "which is used again" in bench.text.getvalue()
    assert (bench.folder / "manifest.json").read_bytes() == manifest
    assert bytes_of(packs) == before
    image = tmp_path / "images" / "val" / "n02" / "val_4.JPEG"
    image.write_bytes(image.read_bytes() + b"\0")
    bench.run(subset)
    assert "val/n02/val_4.JPEG is not what was packed" in bench.text.getvalue()
    assert len(list(packs.iterdir())) == 2, "the older pack is another manifest's"
    assert open_prepared(bench.folder).identity.sha256 != manifest.decode()


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
    assert "packing afresh" in bench.text.getvalue()
    assert bytes_of(packs) == want
    open_prepared(bench.folder)


def test_an_image_that_was_mended_gets_its_place(packs: Path, tmp_path: Path) -> None:
    subset = trees.subset(store=RAW)
    run(tmp_path / "one", subset)
    want = bytes_of(packs)
    shutil.rmtree(packs)
    image = tmp_path / "images" / "train" / "n02" / "n02_3.JPEG"
    good = image.read_bytes()
    image.write_bytes(good[:200])
    bench = Bench(tmp_path / "two")
    with pytest.raises(DataError, match="1 of 51 images are unreadable"):
        bench.run(subset)
    image.write_bytes(good)
    bench.run(subset)
    assert "train/n02/n02_3.JPEG could not be read and now can" in bench.text.getvalue()
    assert bytes_of(packs) == want


def test_unreadable_images_are_left_out_by_a_pack_too_and_by_its_reuse(packs: Path, tmp_path: Path) -> None:
    image = tmp_path / "images" / "train" / "n02" / "n02_3.JPEG"
    good = image.read_bytes()
    image.write_bytes(good[:200])
    bench = run(tmp_path / "one", trees.subset(store=RAW, corrupt_share=0.1))
    first = (bench.folder / "manifest.json").read_bytes()
    bench.run(trees.subset(store=RAW, corrupt_share=0.1))
    assert "which is used again" in bench.text.getvalue()
    assert (bench.folder / "manifest.json").read_bytes() == first
    image.write_bytes(good)
    bench.run(trees.subset(store=RAW, corrupt_share=0.1))
    assert len(open_prepared(bench.folder).store) == len(FILES)


def test_a_bounded_number_of_images_is_under_way(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the source: readers never run further ahead of the writer than the window."""
    source = trees.subset().source
    begun: list[str] = []
    one = crew.Reader.one

    def noting(self: crew.Reader, image: Located) -> object:
        begun.append(image.file)
        return one(self, image)

    monkeypatch.setattr(crew.Reader, "one", noting)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with sources.open_source(source) as listing:
        for taken, image in enumerate(crew.packed(listing.images, listing, source, RAW, 1), start=1):
            assert image is not None
            assert len(begun) <= taken + 8
    assert len(begun) == len(FILES)


def test_a_processes_errors_reach_the_user(packs: Path, tmp_path: Path) -> None:
    source = trees.subset().source
    with sources.open_source(source) as listing:
        (tmp_path / "images" / "train" / "n03" / "n03_2.JPEG").unlink()
        with pytest.raises(DataError, match=r"n03_2\.JPEG: cannot be read"):
            list(crew.packed(listing.images, listing, source, RAW, 2))


def test_the_command_packs_and_prepare_then_finds_it(packs: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile"
    profile.mkdir()
    store = "{resize: short-side, size: 6, external: true, jpeg_quality: 85}"
    (profile / "params.yaml").write_text(
        "profile: tiny\nreport: {title: t, caption: c}\nruns: {}\nsubsets:\n"
        "  x: {source: {name: image-folder, dataset: Tiny, root_env: ISD_TEST_ROOT}, rule: {name: all}, store: "
        f"{store}}}\n  y: {{source: {{name: digits, dataset: D}}, rule: {{name: all}}}}\n"
    )
    words = ["--params", str(profile / "params.yaml")]
    done = CliRunner().invoke(cli.app, ["data", "pack", "x", "--processes", "1", *words])
    assert done.exit_code == 0, done.output
    before = bytes_of(packs)
    shutil.rmtree(profile / "data")
    done = CliRunner().invoke(cli.app, ["prepare", "x", *words])
    assert done.exit_code == 0, done.output
    assert "which is used again" in done.output
    assert bytes_of(packs) == before
    done = CliRunner().invoke(cli.app, ["data", "pack", "y", *words])
    assert "subsets.y.store.external: false" in str(done.exception)


def test_a_jpeg_pack_is_what_training_reads(packs: Path, tmp_path: Path) -> None:
    found = open_prepared(run(tmp_path / "one", trees.subset(store=JPEG)).folder, workers=2)
    raw = open_prepared(run(tmp_path / "two", trees.subset(store=RAW)).folder)
    assert found.identity.sha256 == raw.identity.sha256
    index = torch.arange(len(FILES))
    difference = np.abs(found.store.read(index)[0].numpy().astype(int) - raw.store.read(index)[0].numpy().astype(int))
    assert 0 < difference.mean() < 40
