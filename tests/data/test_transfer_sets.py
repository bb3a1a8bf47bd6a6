"""The target data sets: read from tiny trees in their own layout, divided by class, and named when something is missing."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

from isd_repro.data import transfer_sets
from isd_repro.data.eval_loader import Frame
from isd_repro.data.transfer_sets import SETS, Opened, Part, TransferImages, TransferName
from isd_repro.runtime.errors import DataError
from tests.data.target_trees import CLASSES, MAKERS, Expected, Tree, number_of

ROOT = Path(__file__).parents[2]
NAMES: tuple[Any, ...] = get_args(TransferName)
FRAME = Frame(6, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> TransferName:
    found: TransferName = request.param
    return found


def make(name: TransferName, root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    tree = Tree(root)
    MAKERS[name](tree, monkeypatch)
    monkeypatch.setenv(SETS[name].root_env, str(root))
    return tree.expected


def read(opened: Opened, frame: Frame = FRAME, channels: int = 3, block: int = 7) -> tuple[TransferImages, torch.Tensor]:
    """All images by blocks whose last is filled up with its last image, as extraction asks for them."""
    with ThreadPoolExecutor(2) as pool:
        images = TransferImages(opened, frame, channels, pool)
        count = len(images)
        views = [
            images(torch.arange(start, start + block).clamp(max=count - 1))[: count - start] for start in range(0, count, block)
        ]
    return images, torch.cat(views)


def test_the_table_has_a_row_for_every_name_and_the_document_too() -> None:
    assert set(SETS) == set(NAMES)
    text = (ROOT / "docs" / "transfer.md").read_text("utf-8")
    lines = re.findall(r"^\| `.*$", text, re.MULTILINE)
    rows = {cells[0].strip("` "): cells for cells in (line.strip("|").split("|") for line in lines)}
    assert set(rows) == set(NAMES)
    for key, spec in SETS.items():
        _, reader, needs, validation, metric, note = (cell.strip() for cell in rows[key])
        assert reader == f"`{spec.reader}`"
        assert re.findall(r"`([^`]+)`", needs) == list(spec.needs)
        drawn = "val" not in spec.parts or key == "cifar10-folder"
        assert validation == ("a fifth of train, drawn" if drawn else "its own")
        assert (metric, note) == (spec.metric, spec.note)
    assert all(spec.val_share == 0.2 for spec in SETS.values())  # as the document says
    per_class = {key for key, spec in SETS.items() if spec.metric == "mean-per-class"}
    assert per_class == {"aircraft", "caltech101", "flowers102", "pets"}  # linear.py of linusericsson/ssl-transfer


def test_every_image_is_read_with_its_part_and_label(name: TransferName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(name, tmp_path, monkeypatch)
    opened = transfer_sets.open_set(name)
    found, labels = {}, []
    for at, part in enumerate(opened.part):
        image, label = opened.get(at)
        found[number_of(image)] = part, label
        labels.append(label)
    assert found == expected
    assert len(opened.part) == len(expected)
    if name != "flowers102":  # whose class knows its 102 names itself
        assert opened.classes == CLASSES[name]
    images, _ = read(opened)
    assert images.label.tolist() == labels


def test_what_is_missing_is_named(name: TransferName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SETS[name]
    monkeypatch.delenv(spec.root_env, raising=False)
    with pytest.raises(DataError, match=f"{spec.root_env} is not set") as caught:
        transfer_sets.root_of(name)
    assert f"torchvision.datasets.{spec.reader}" in caught.value.hint
    make(name, tmp_path, monkeypatch)
    for need in spec.needs:
        path = tmp_path / need
        moved = path.rename(tmp_path / "elsewhere")
        before = {found.relative_to(tmp_path) for found in tmp_path.rglob("*")}
        with pytest.raises(DataError, match=re.escape(f"{spec.title} lacks {need}")):
            transfer_sets.open_set(name)
        assert {found.relative_to(tmp_path) for found in tmp_path.rglob("*")} == before, "nothing is made or downloaded"
        moved.rename(path)
    assert transfer_sets.open_set(name).part


def test_division_by_hand(name: TransferName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disjoint, complete, official where the set is, and by class where drawn: a fifth, and 30 a class of Caltech."""
    make(name, tmp_path, monkeypatch)
    opened = transfer_sets.open_set(name)
    images, _ = read(opened)
    division = transfer_sets.divide(name, opened.part, images.label, seed=0)
    parts = {key: getattr(division, key).tolist() for key in ("train", "val", "test")}
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == list(range(len(opened.part)))
    assert all(rows == sorted(rows) for rows in parts.values())
    official = {key: [at for at, part in enumerate(opened.part) if part == key] for key in ("train", "val", "test")}
    sizes = {key: Counter(images.label[torch.tensor(rows)].tolist()) for key, rows in parts.items()}
    if "pool" in opened.part:
        assert sizes == {"train": {0: 24, 1: 24}, "val": {0: 6, 1: 6}, "test": {0: 3, 1: 1}}
    elif official["val"]:
        assert parts == official
    else:
        assert parts["test"] == official["test"]
        assert sorted(parts["train"] + parts["val"]) == official["train"]
        whole = Counter(images.label[torch.tensor(official["train"])].tolist())
        assert set(whole.values()) <= {5, 6}
        assert sizes["val"] == dict.fromkeys(whole, 1)  # a fifth of 5 or 6
    again = transfer_sets.divide(name, opened.part, images.label, seed=0)
    assert all(torch.equal(getattr(division, key), getattr(again, key)) for key in parts)


def test_a_draw_depends_on_the_seed_and_never_on_the_test_labels() -> None:
    label = torch.arange(400) % 4
    part = ["train"] * 200 + ["test"] * 200
    first = transfer_sets.divide("cifar10", part, label, seed=0)  # type: ignore[arg-type]
    assert len(first.val) == 40
    assert Counter(label[first.val].tolist()) == dict.fromkeys(range(4), 10)
    other = transfer_sets.divide("cifar10", part, label, seed=1)  # type: ignore[arg-type]
    assert not torch.equal(first.val, other.val)
    shuffled = torch.cat([label[:200], label[200:][torch.randperm(200, generator=torch.Generator().manual_seed(0))]])
    assert not torch.equal(shuffled, label)
    same = transfer_sets.divide("cifar10", part, shuffled, seed=0)  # type: ignore[arg-type]
    assert torch.equal(first.val, same.val)
    assert torch.equal(first.train, same.train)


def test_too_few_images_to_draw_from_are_named() -> None:
    with pytest.raises(DataError, match="Caltech-101: class number 0 has 30 images, but 30 are drawn for train"):
        transfer_sets.divide("caltech101", ["pool"] * 30, torch.zeros(30, dtype=torch.int64), seed=0)
    with pytest.raises(DataError, match="Food-101: its test part is empty"):
        transfer_sets.divide("food101", ["train"] * 30, torch.zeros(30, dtype=torch.int64), seed=0)


def test_a_folder_may_have_val_between_or_in_place_of_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("cifar10-folder", tmp_path, monkeypatch)
    (tmp_path / "test").rename(tmp_path / "val")
    assert Counter(transfer_sets.open_set("cifar10-folder").part) == {"train": 12, "test": 12}
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    assert Counter(transfer_sets.open_set("cifar10-folder").part) == {"train": 12, "val": 12, "test": 12}
    shutil.rmtree(tmp_path / "test" / "cat")
    with pytest.raises(DataError, match="its parts have different classes"):
        transfer_sets.open_set("cifar10-folder")
    shutil.rmtree(tmp_path / "test")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match="neither test/<class>/ nor val/<class>/"):
        transfer_sets.open_set("cifar10-folder")


def test_damaged_lists_and_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("food101", tmp_path, monkeypatch)
    (tmp_path / "food-101" / "images" / "waffles" / "test3.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Food-101: image 21 \(counted from 0, test part\) cannot be read"):
        read(transfer_sets.open_set("food101"))
    (tmp_path / "food-101" / "images" / "apple_pie" / "train0.jpg").unlink()
    with pytest.raises(DataError, match=r"Food-101: image 0 .*No such file"):
        read(transfer_sets.open_set("food101"))
    (tmp_path / "food-101" / "meta" / "train.json").write_text("{")
    with pytest.raises(DataError, match="Food-101 cannot be read") as caught:
        transfer_sets.open_set("food101")
    assert "torchvision.datasets.Food101" in caught.value.hint


def test_views_are_the_evaluations_view_of_each_image() -> None:
    """Images of different sizes in one block: plain colours stay what they are, a left half stays left, grey becomes three."""
    made = [Image.new("RGB", (10 + at, 8), (10 * at, 255 - at, 7)) for at in range(9)]
    made.append(Image.new("L", (12, 12), 99))
    half = Image.new("RGB", (8, 8), (0, 0, 0))
    half.paste((255, 255, 255), (4, 0, 8, 8))
    made.append(half)
    parts: tuple[Part, ...] = tuple("train" for _ in made)
    opened = Opened(SETS["food101"], ("one",), parts, lambda at: (made[at], 0))
    images, views = read(opened, Frame(4, 0.8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), block=4)
    assert views.shape == (len(made), 3, 4, 4)
    back = views * 0.25 + 0.5
    for at in range(9):
        assert torch.allclose(back[at], torch.tensor([10 * at, 255 - at, 7])[:, None, None] / 255, atol=1e-6)
    assert torch.allclose(back[9], torch.full((3, 4, 4), 99 / 255), atol=1e-6)
    assert torch.allclose(back[10, :, :, 0], torch.zeros(3, 4), atol=1e-6)
    assert torch.allclose(back[10, :, :, 3], torch.ones(3, 4), atol=1e-6)
    assert len(set(images.digest)) == len(made)
    other, _ = read(opened, block=3)
    assert other.digest == images.digest


def test_identity_follows_pixels_roles_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sha(root: Path, seed: int = 0) -> str:
        monkeypatch.setenv("ISD_CIFAR10_ROOT", str(root))
        opened = transfer_sets.open_set("cifar10-folder")
        images, _ = read(opened)
        division = transfer_sets.divide("cifar10-folder", opened.part, images.label, seed)
        found = transfer_sets.identity("cifar10-folder", images, opened, division, seed)
        assert (found.train, found.search, found.query) == (10, 12, 12)
        assert (found.subset, found.classes) == ("cifar10-folder", ("bird", "cat"))
        return found.sha256

    make("cifar10-folder", tmp_path / "one", monkeypatch)
    first = sha(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert sha(tmp_path / "two") == first
    assert sha(tmp_path / "one", seed=1) != first
    (tmp_path / "two" / "test" / "cat" / "0.jpg").write_bytes((tmp_path / "two" / "test" / "cat" / "1.jpg").read_bytes())
    assert sha(tmp_path / "two") != first
