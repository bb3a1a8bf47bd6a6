"""The stage `prepare`: whole or not at all, layout-independent, and open about what it left out or found changed."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from isd_repro.config import params
from isd_repro.config.layout import Layout
from isd_repro.data import manifests
from isd_repro.data.manifests import open_prepared
from isd_repro.data.prepare import prepare
from isd_repro.data.store import StoredImage, StoreWriter
from isd_repro.runtime.errors import DataError
from tests.data import trees
from tests.faults import chain

RULE = params.Unbalanced(name="unbalanced", large=1, rare_images=3, seed=1)
FILES = trees.images({"n01": 6, "n02": 7, "n03": 8}, val=3, ragged=True)


class Bench:
    """A profile with one subset `x`."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder=folder, root=folder, profile="demo")
        self.text = io.StringIO()
        self.folder = self.layout.prepared("x")

    def run(self, subset: params.Subset, name: str = "x", threads: int = 2) -> None:
        report = params.ReportConfig(title="t", caption="c")
        whole = params.Params(profile="demo", report=report, subsets={"x": subset}, runs={})
        prepare(name, whole, self.layout, Console(file=self.text, width=60), threads)

    def others(self) -> list[str]:
        return sorted(path.name for path in self.folder.parent.iterdir()) if self.folder.parent.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("ISD_TEST_ROOT", str(trees.write_plain(tmp_path / "images", FILES)))
    return Bench(tmp_path / "profile")


def test_every_packed_image_is_the_decoded_file(bench: Bench) -> None:
    bench.run(trees.subset(RULE, search=4, query=2))
    found = open_prepared(bench.folder)
    assert [image.key for image in found.manifest.images] == sorted(image.key for image in found.manifest.images)
    for position, image in enumerate(found.manifest.images):
        payload = FILES[image.key]
        assert image.sha256 == hashlib.sha256(payload).hexdigest()
        pixels, _ = found.store.read(torch.tensor([position]))
        assert np.array_equal(pixels[0].numpy().transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(payload))))
    assert len(found.store) == len(found.manifest.images)
    assert bench.others() == ["x"]
    assert f"manifest {found.identity.sha256[:16]}" in bench.text.getvalue()


def test_roles_labels_and_groups(bench: Bench) -> None:
    bench.run(trees.subset(RULE, search=4, query=2))
    found = open_prepared(bench.folder)
    identity = found.identity
    assert (identity.dataset, identity.subset, identity.classes) == ("Tiny images", "x", ("n01", "n02", "n03"))
    [large] = identity.large
    whole = {"n01": 6, "n02": 7, "n03": 8}[large]
    assert (identity.train, identity.search, identity.query) == (whole + 6, 12, 6)
    for role, per_class in (("search", 4), ("query", 2)):
        split = found.split(role)  # type: ignore[arg-type]
        assert torch.bincount(split.label).tolist() == [per_class] * 3
        for at, label in zip(split.index.tolist(), split.label.tolist(), strict=True):
            image = found.manifest.images[at]
            assert image.cls == identity.classes[label]
            assert image.split == ("val" if role == "query" else "train")
    query = found.split("query")
    groups = found.groups(query.label.numpy())
    assert list(groups) == ["all", "rare", "large"]
    assert groups["large"].tolist() == [identity.classes[label] == large for label in query.label.tolist()]
    assert (groups["rare"] == ~groups["large"]).all()
    assert groups["all"].all()
    assert identity.rule["rare_images"] == 3
    assert identity.rule["search_per_class"] == 4


def test_a_long_tailed_subset_has_groups_by_training_images(bench: Bench) -> None:
    rule = params.Exponential(name="exponential", imbalance=6)
    bench.run(trees.subset(rule, query=2, shots=params.Shots(many_above=3, few_below=2)))
    found = open_prepared(bench.folder)
    assert torch.bincount(found.split("train").label).tolist() == [6, 2, 1]
    assert found.identity.shots == {"many": ("n01",), "medium": ("n02",), "few": ("n03",)}
    assert found.identity.rule["shots"] == {"many_above": 3, "few_below": 2}
    groups = found.groups(found.split("query").label.numpy())
    assert {group: int(mask.sum()) for group, mask in groups.items()} == {"all": 6, "many": 2, "medium": 2, "few": 2}


def test_the_hash_does_not_depend_on_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = {
        "plain": trees.write_plain(tmp_path / "plain", FILES),
        "official": trees.write_official(tmp_path / "official", FILES),
        "zip": trees.write_zip(tmp_path / "tiny.zip", trees.official(FILES)),
    }
    hashes, stores = set(), set()
    for name, root in roots.items():
        for source in ("tiny-imagenet", "image-folder") if name == "plain" else ("tiny-imagenet",):
            monkeypatch.setenv("ISD_TEST_ROOT", str(root))
            bench = Bench(tmp_path / f"profile-{name}-{source}")
            bench.run(trees.subset(RULE, search=4, source=source))
            found = open_prepared(bench.folder)
            hashes.add(found.identity.sha256)
            stores.add(found.store.info.sha256)
            assert str(tmp_path) not in (bench.folder / "manifest.json").read_text()
            assert str(tmp_path) not in (bench.folder / "images.tsv").read_text()
    assert len(hashes) == len(stores) == 1


def test_one_changed_byte_changes_the_hash_and_is_reported(bench: Bench, tmp_path: Path) -> None:
    bench.run(trees.subset())
    before = open_prepared(bench.folder).identity.sha256
    bench.run(trees.subset())
    assert open_prepared(bench.folder).identity.sha256 == before
    assert "other bytes" not in bench.text.getvalue()
    path = tmp_path / "images" / "train" / "n02" / "n02_0.JPEG"
    path.write_bytes(path.read_bytes() + b"\0")  # decodes to the same pixels
    bench.run(trees.subset())
    assert open_prepared(bench.folder).identity.sha256 != before
    assert "1 images have changed since this subset was last prepared: train/n02/n02_0.JPEG" in bench.text.getvalue()


def test_unreadable_images_are_left_out_and_counted(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "images" / "train" / "n02" / "n02_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"1 of 30 images are unreadable, .* first train/n02/n02_3\.JPEG"):
        bench.run(trees.subset())
    assert bench.others() == []
    with pytest.raises(DataError, match=r"corrupt_share 0\.03 allows"):
        bench.run(trees.subset(corrupt_share=0.03))
    bench.run(trees.subset(corrupt_share=0.04))
    found = open_prepared(bench.folder)
    assert "skipped 1 of 30 images that cannot be read: train/n02/n02_3.JPEG (" in bench.text.getvalue()
    assert json.loads((bench.folder / "manifest.json").read_text())["dropped"] == ["train/n02/n02_3.JPEG"]
    assert len(found.store) == len(found.manifest.images) == 29
    for position, image in enumerate(found.manifest.images):
        pixels, _ = found.store.read(torch.tensor([position]))
        wanted = Image.open(io.BytesIO(FILES[image.key]))
        assert np.array_equal(pixels[0].numpy().transpose(1, 2, 0), np.asarray(wanted))


def test_a_class_that_loses_all_its_images_is_an_error(bench: Bench, tmp_path: Path) -> None:
    for path in (tmp_path / "images" / "val" / "n03").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="class n03 has no readable query image"):
        bench.run(trees.subset(corrupt_share=1.0))
    assert bench.others() == []


def fail_at(monkeypatch: pytest.MonkeyPatch, image: int, error: BaseException) -> None:
    """Let the store's writer fail at this image, counted from 1."""
    add, written = StoreWriter.add, [0]

    def failing(self: StoreWriter, content: bytes, row: StoredImage) -> None:
        written[0] += 1
        if written[0] == image:
            raise error
        add(self, content, row)

    monkeypatch.setattr(StoreWriter, "add", failing)


@pytest.mark.parametrize(
    ("error", "seen", "words"),
    [(KeyboardInterrupt(), KeyboardInterrupt, "^$"), (OSError(28, "No space left on device"), DataError, "No space left")],
)
def test_a_failure_amid_packing_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException, seen: type[BaseException], words: str
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, 5, error)
        with pytest.raises(seen, match=words):
            bench.run(trees.subset())
    assert bench.others() == []
    with pytest.raises(DataError, match="no such file"):
        open_prepared(bench.folder)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_failed_run_keeps_the_older_result(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run(trees.subset())
    before = open_prepared(bench.folder).identity
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench.run(trees.subset(RULE))
    assert open_prepared(bench.folder).identity == before
    assert bench.others() == ["x"]


def test_what_a_kill_left_behind_is_removed(bench: Bench) -> None:
    leftover = bench.folder.parent / ".partial_x_00000000"
    other = bench.folder.parent / ".partial_x-y_00000000"
    for folder in (leftover, other):
        folder.mkdir(parents=True)
        (folder / "store.u8").write_bytes(b"half")
    bench.run(trees.subset())
    assert bench.others() == [other.name, "x"]


def test_queries_that_are_copies_of_training_images_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and the key that its hint names: one query of seven is a training image under another name."""
    copies = {("val", "n01", "copy_0.JPEG"): FILES["train", "n01", "n01_0.JPEG"]}
    files = {name: content for name, content in FILES.items() if name[:2] != ("val", "n01")} | copies
    monkeypatch.setenv("ISD_TEST_ROOT", str(trees.write_plain(tmp_path / "images", files)))
    source = {"name": "image-folder", "root_env": "ISD_TEST_ROOT", "dataset": "Tiny images"}
    subset: dict[str, object] = {"source": source, "rule": {"name": "all"}}
    profile = {"profile": "demo", "report": {"title": "t", "caption": "c"}, "subsets": {"x": subset}, "runs": {}}
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "params.yaml").write_text(json.dumps(profile), "utf-8")
    found = "1 of 7 queries (14.3%) have the bytes of a training or search image"
    refused = chain.call(folder, "prepare", "x")
    chain.refused(refused, f"subset 'x': {found}, more than 1%", "set subsets.x.allow_shared_images: true")
    assert not [path for path in folder.rglob("*") if path.name in ("manifest.json", "images.tsv", "store.u8")]
    subset["allow_shared_images"] = True
    (folder / "params.yaml").write_text(json.dumps(profile), "utf-8")
    allowed = chain.call(folder, "prepare", "x")
    assert allowed.code == 0, allowed
    assert f"prepare x: {found}" in allowed.err
    identity = open_prepared(folder / "data/prepared/x").identity
    assert (identity.shared, identity.query) == (1, 7)


def test_copies_end_the_work_at_the_image_that_is_one_too_many(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "val" / "n03" / "copy.JPEG").write_bytes(FILES["train", "n01", "n01_0.JPEG"])
    monkeypatch.setattr(StoreWriter, "add", lambda *_: pytest.fail("the first image is a copy, and was packed"))
    with pytest.raises(DataError, match=r"subset 'x': 1 of 10 queries \(10\.0%\) have the bytes of a training or search image"):
        bench.run(trees.subset())
    assert bench.others() == []


def test_an_external_store_is_found_through_the_environment(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = trees.subset(RULE, store=params.StoreSettings(resize="square", side=6, external=True))
    monkeypatch.delenv(manifests.PACK_ROOT, raising=False)
    with pytest.raises(DataError, match="ISD_PACK_ROOT is not set"):
        bench.run(subset)
    monkeypatch.setenv(manifests.PACK_ROOT, str(tmp_path / "packs"))
    bench.run(subset)
    assert sorted(path.name for path in bench.folder.iterdir()) == ["images.tsv", "manifest.json"]
    digest = open_prepared(bench.folder).identity.sha256
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [f"{digest}-square-6-c3"]
    assert str(tmp_path) not in (bench.folder / "manifest.json").read_text()
    bench.run(subset)
    assert [path.name for path in (tmp_path / "packs").iterdir()] == [f"{digest}-square-6-c3"]
    (tmp_path / "packs").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"store\.npy: no such file"):
        open_prepared(bench.folder)
    monkeypatch.setenv(manifests.PACK_ROOT, str(tmp_path / "moved"))
    found = open_prepared(bench.folder)
    assert found.store.read(torch.tensor([0]))[0].shape == (1, 3, 6, 6)
