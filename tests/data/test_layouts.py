"""Layouts that image sets come in: each lists the same images, and what cannot be read is answered with what to do."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isd_repro.config import params
from isd_repro.data import manifests
from isd_repro.data.manifests import Image, Manifest
from isd_repro.data.sources import cifar, open_images, stl10
from isd_repro.data.subsets import select
from isd_repro.runtime.errors import DataError
from tests.data import trees
from tests.data.trees import write

FILES = trees.images({"n01": 3, "n02": 4}, val=2)
FLAT = {file: cls for split, cls, file in FILES if split == "val"}
KAGGLE = "ImageId,PredictionString\n" + "".join(f"{file[:-5]},{cls} 1 2 3 4 {cls} 5 6 7 8 \n" for file, cls in FLAT.items())


def flat(base: str = "", val: str = "val") -> dict[str, bytes]:
    """ImageNet as it is downloaded: classes in train, and all validation images in one folder."""
    train = {f"{base}train/{cls}/{file}": content for (split, cls, file), content in FILES.items() if split == "train"}
    return train | {f"{base}{val}/{file}": content for (split, _, file), content in FILES.items() if split == "val"}


def plain(train: str = "train", val: str = "val") -> dict[str, bytes]:
    return {f"{train if split == 'train' else val}/{cls}/{file}": content for (split, cls, file), content in FILES.items()}


def listed(root: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISD_VAL_LABELS", str(write(root.parent, {"labels.txt": text}) / "labels.txt"))
    return write(root, flat())


def devkit(root: Path) -> Path:
    """The development kit of ILSVRC 2012 with two synsets, whose numbers are not in the order of their WordNet ids."""
    from scipy.io import savemat

    renamed = {file: f"ILSVRC2012_val_{at:08d}.JPEG" for at, file in enumerate(FLAT, start=1)}
    images = {f"{name.rpartition('/')[0]}/{renamed.get(Path(name).name, Path(name).name)}": one for name, one in flat().items()}
    synsets = np.array([(1, "n02", 0), (2, "n01", 0)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = "".join(f"{1 if cls == 'n02' else 2}\n" for cls in FLAT.values())
    return write(
        root, {**images, f"{folder}/meta.mat": buffer.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}
    )


def folders(root: Path, *names: str) -> Path:
    """The plain layout and empty folders."""
    for name in names:
        (write(root, plain()) / name).mkdir(parents=True)
    return root


def tiny(root: Path, **change: bytes | str | None) -> Path:
    """Tiny-ImageNet with a file of val/ changed, added or, where it is None, removed."""
    for name, content in change.items():
        place = {"annotations": "val/val_annotations.txt"}.get(name, f"val/images/{name}.JPEG")
        files = trees.official(FILES) | {place: content}
        write(root, {path: found for path, found in files.items() if found is not None})
    return root


def tarred(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as made:
        made.addfile(tarfile.TarInfo("train"))
    return path


Make = Callable[[Path, pytest.MonkeyPatch], Path]
LAYOUTS: dict[str, Make] = {
    "train/<class>, val/<class>": lambda root, _: write(root, plain()),
    "test in place of val": lambda root, _: write(root, plain(val="test")),
    "capitalised": lambda root, _: write(root, plain("Train", "Validation")),
    "val beside a test without labels": lambda root, _: write(root, plain() | {"test/images/1.JPEG": b"x"}),
    "Imagenette": lambda root, _: write(
        root, plain("imagenette2-320/train", "imagenette2-320/val") | {"imagenette2-320/noisy_imagenette.csv": b"x"}
    ),
    "a zip with a top folder": lambda root, _: trees.write_zip(root.with_suffix(".zip"), plain(), prefix="imagewoof2/"),
    "one folder deeper": lambda root, _: write(root, plain("imagenette2/train", "imagenette2/val")),
    "Tiny-ImageNet": lambda root, _: trees.write_official(root, FILES),
    "Tiny-ImageNet's zip": lambda root, _: trees.write_zip(root.with_suffix(".zip"), trees.official(FILES)),
    "a zip without a top folder": lambda root, _: trees.write_zip(root.with_suffix(".zip"), plain(), prefix=""),
    "Kaggle's ImageNet": lambda root, _: write(root, flat("ILSVRC/Data/CLS-LOC/") | {"LOC_val_solution.csv": KAGGLE.encode()}),
    "flat val with Kaggle's classes": lambda root, _: write(root, flat() | {"LOC_val_solution.csv": KAGGLE.encode()}),
    "flat val/images with a list": lambda root, patch: write(
        listed(root, "".join(f"{file} {cls}\n" for file, cls in FLAT.items()), patch), flat()
    ),
    "flat val with classes by number": lambda root, patch: listed(
        root, "".join(f"{file} {int(cls == 'n02')}\n" for file, cls in FLAT.items()), patch
    ),
    "flat val with a class for each image in order": lambda root, patch: listed(
        root, "".join(f"{FLAT[file]}\n" for file in sorted(FLAT)), patch
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lists_the_same_images(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_images(LAYOUTS[layout](tmp_path / "images", monkeypatch)) as listing:
        assert trees.content(listing) == FILES
        assert [image.key for image in listing.images] == sorted(FILES)
        assert listing.decode(listing.fetch(listing.images[0])).size == (9, 7)


def test_the_development_kit_names_the_classes(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    with open_images(devkit(tmp_path)) as listing:
        found = {(image.split, image.cls): listing.fetch(image) for image in listing.images}
    for split, cls in found:
        assert found[split, cls] in [one for key, one in FILES.items() if key[:2] == (split, cls)]


WRONG: dict[str, tuple[Make, str, str]] = {
    "flat val without classes": (
        lambda root, _: write(root, flat()),
        "val holds 4 images in one folder, and no file gives their classes",
        "LOC_val_solution.csv (Kaggle) or ILSVRC2012_devkit_t12",
    ),
    "a list of other images": (
        lambda root, patch: listed(root, "".join(f"x{file} n01\n" for file in FLAT), patch),
        "has no class in .*labels.txt",
        "unpack",
    ),
    "a list of too many": (
        lambda root, patch: listed(root, "gone.JPEG n01\n" + "".join(f"{file} {cls}\n" for file, cls in FLAT.items()), patch),
        "names 1 images that do not exist; the first is gone.JPEG",
        "unpack",
    ),
    "a list of too few classes": (
        lambda root, patch: listed(root, "n01\nn02\n", patch),
        "labels.txt:1: expected file and class, or one class for each of 4 images",
        "ILSVRC2012_val_00000001.JPEG n01751748",
    ),
    "no val": (lambda root, _: write(root, plain(val="train")), "has a folder 'train' and none of val, valid", "val/<class>/"),
    "the tar files": (lambda root, _: write(root, {"ILSVRC2012_img_train.tar": ""}), "tar files of image-net.org", "tar -xf"),
    "parquet": (lambda root, _: write(root, {"data/train-00000-of-00001.parquet": ""}), "parquet files", "train/<class>/"),
    "shards": (lambda root, _: write(root, {"shard-000000.tar": ""}), "WebDataset shards", "unpack"),
    "CIFAR-10": (
        lambda root, _: write(root, {"cifar-10-batches-py/test_batch": ""}),
        "CIFAR-10 in its published format",
        "cifar10",
    ),
    "STL-10": (lambda root, _: write(root, {"stl10_binary/train_X.bin": ""}), "STL-10 in its published format", "stl10"),
    "CIFAR-100": (lambda root, _: write(root, {"cifar-100-python/test": ""}), "CIFAR-100 in its published format", "cifar100"),
    "Arrow": (lambda root, _: write(root, {"train.arrow": ""}), "Arrow files", "train/<class>/"),
    "TFRecord": (
        lambda root, _: write(root, {"data/imagenet-train.tfrecord-00000-of-00001": ""}),
        "TFRecord files",
        "train/<class>/",
    ),
    "an archive beside nothing": (lambda root, _: write(root, {"imagenette2.tgz": ""}), "a packed archive", "tar -xf"),
    "an archive itself": (
        lambda root, _: tarred(root.with_suffix(".tgz")),
        "a tar file, which is not read in place",
        "tar -xf images.tgz",
    ),
    "tar files of classes": (
        lambda root, _: write(root, {"train/n01.tar": "", "train/n02.tar": "", "val/n01/a.JPEG": ""}),
        "no images under train, whose content was ignored: .tar 2",
        "cd train && for t in",
    ),
    "parquet in train": (
        lambda root, _: write(root, {"train/0.parquet": "", "val/0.parquet": ""}),
        "no images under train, whose content was ignored: .parquet 1",
        "train/<class>/ with files .bmp, .jpeg",
    ),
    "no images in val": (
        lambda root, _: write(root, {"train/n01/a.JPEG": "", "val/n01.tar": ""}),
        "no images under val, whose content was ignored: .tar 1",
        "cd val && for t in",
    ),
    "two data sets": (
        lambda root, _: write(root, plain("imagenette2/train", "imagenette2/val") | plain("imagewoof2/train", "imagewoof2/val")),
        "2 folders in it have a folder 'train': .*imagenette2 and .*imagewoof2",
        "the one that is meant",
    ),
    "two readings of val": (
        lambda root, _: write(root, plain() | plain("train", "validation")),
        "has the folders val and validation, and only one of them can be meant",
        "rename or move",
    ),
    "two cases of train": (
        lambda root, _: write(root, plain() | plain("Train", "val")),
        "has the folders Train and train, and only one",
        "rename or move",
    ),
    "classes without images": (
        lambda root, _: folders(root, "train/n00", "val/n00"),
        "2 classes without images, first train/n00",
        "remove the empty folders",
    ),
    "a class of train alone": (
        lambda root, _: write(root, plain() | {"train/n07/a.JPEG": ""}),
        "1 classes are in train but not in val, first n07",
        "both splits",
    ),
    "a class of val alone": (
        lambda root, _: write(root, plain() | {"val/n07/a.JPEG": ""}),
        "1 classes are in val but not in train, first n07",
        "both splits",
    ),
    "a name twice": (
        lambda root, _: write(root, plain() | {"train/n01/images/n01_0.JPEG": ""}),
        "n01_0.JPEG and .*n01_0.JPEG are both train/n01/n01_0.JPEG",
        "keep one",
    ),
    "an image without annotation": (lambda root, _: tiny(root, val_9=b""), "val_9.JPEG has no class", "unpack"),
    "an annotation without image": (
        lambda root, _: tiny(root, val_0=None),
        "names 1 images that do not exist; the first is val_0.JPEG",
        "unpack",
    ),
    "damaged annotations": (
        lambda root, _: tiny(root, annotations="val_0.JPEG n01\n"),
        "val_annotations.txt:1: expected file and class",
        "unpack",
    ),
    "something else": (
        lambda root, _: write(root, {"cats/1.JPEG": ""}),
        "no folder 'train'; its folders are cats",
        "give the folder",
    ),
}


@pytest.mark.parametrize("layout", WRONG)
def test_what_cannot_be_read_is_answered_with_what_to_do(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message, hint = WRONG[layout]
    with pytest.raises(DataError, match=message) as caught, open_images(make(tmp_path / "images", monkeypatch)):
        pass
    assert hint in caught.value.hint


# --- the page of layouts ------------------------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
ROWS = {  # how a row of its table begins: the layouts above or the tests below that show it
    "`train/<class>/*`, `val": ["train/<class>, val/<class>"],
    "`test`, `valid` or": ["test in place of val", "capitalised", "val beside a test without labels"],
    "`Train` and `Val`": ["capitalised"],
    "the same one folder deeper": ["one folder deeper", "Imagenette"],
    "CIFAR as image folders": ["test in place of val"],
    "a zip of any": ["a zip with a top folder", "a zip without a top folder"],
    "Tiny-ImageNet,": ["Tiny-ImageNet", "Tiny-ImageNet's zip"],
    "Kaggle's ImageNet": ["Kaggle's ImageNet"],
    "flat `val/*.JPEG` and `LOC": ["flat val with Kaggle's classes"],
    "flat `val/*.JPEG` and `ILSVRC": ["test_the_development_kit_names_the_classes"],
    "flat `val/*.JPEG` or `val/images": [
        "flat val/images with a list",
        "flat val with classes by number",
        "flat val with a class for each image in order",
    ],
    "`cifar-10-batches-py`": ["test_the_forms_of_cifar_hold_the_same_images"],
    "`cifar-100-python`": ["test_the_forms_of_cifar_hold_the_same_images"],
    "`stl10_binary`": [
        "test_stl_10_has_its_labelled_images_and_those_without_labels",
        "test_stl_10_that_is_absent_or_packed_is_answered_with_what_to_do",
    ],
    "flat `val/*.JPEG` alone": ["flat val without classes"],
    "`ILSVRC2012_img_train.tar`": ["the tar files", "tar files of classes"],
    "parquet, Arrow": ["parquet", "Arrow", "TFRecord", "shards", "an archive beside nothing", "an archive itself"],
    "`cifar-10-*`": ["CIFAR-10", "CIFAR-100", "STL-10"],
    "ambiguous folders": ["two data sets", "two readings of val", "two cases of train"],
}
PRINTED = {  # layouts whose messages the page shows, and how its data set differs from the one here
    "flat val without classes": ("/data/imagenet", "4 images", "50000 images"),
    "tar files of classes": ("/data/imagenet", ".tar 2", ".tar 1000"),
    "two data sets": ("/data", "", ""),
}


def test_every_row_of_the_page_has_a_test() -> None:
    table = DOCUMENT.partition("| What you have |")[2].partition("\n\n")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(found) == len(ROWS) >= 12
    for (row, _, answer), (begins, shown) in zip(found, ROWS.items(), strict=True):
        assert row.startswith(begins)
        tested = LAYOUTS if answer.startswith("read") else WRONG
        assert [name for name in shown if name not in tested and name not in globals()] == [], row


@pytest.mark.parametrize("layout", PRINTED)
def test_the_page_shows_messages_as_they_are_printed(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, here, there = PRINTED[layout]
    path = WRONG[layout][0](tmp_path / "images", monkeypatch)
    with pytest.raises(DataError) as caught, open_images(path):
        pass
    printed = f"error: {caught.value}\nhint: {caught.value.hint}\n".replace(str(path), root)
    assert (printed.replace(here, there) if here else printed) in DOCUMENT


# --- CIFAR --------------------------------------------------------------------------------------------------------------

CLASSES = ["cat", "ant"]
ARCHIVES = {
    "cifar-10-batches-py": "cifar-10-python.tar.gz",
    "cifar-10-batches-bin": "cifar-10-binary.tar.gz",
    "cifar-100-python": "cifar-100-python.tar.gz",
    "cifar-100-binary": "cifar-100-binary.tar.gz",
}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 2, 3072), dtype=np.uint8)  # by file: five of train and test


def cifar10(root: Path, *, binary: bool) -> Path:
    files = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    if binary:
        rows = [b"".join(bytes([label]) + row.tobytes() for label, row in enumerate(part)) for part in PIXELS]
        content = {f"{file}.bin": part for file, part in zip(files, rows, strict=True)}
        return write(root / "cifar-10-batches-bin", {**content, "batches.meta.txt": "cat\nant\n\n"})
    pickles = [pickle.dumps({"data": part, "labels": [0, 1]}) for part in PIXELS]
    meta = pickle.dumps({"label_names": CLASSES})
    return write(root / "cifar-10-batches-py", {**dict(zip(files, pickles, strict=True)), "batches.meta": meta})


def cifar100(root: Path, *, binary: bool) -> Path:
    parts = {"train": PIXELS[:5].reshape(10, 3072), "test": PIXELS[5]}
    if binary:
        rows = {name: b"".join(bytes([9, at % 2]) + row.tobytes() for at, row in enumerate(part)) for name, part in parts.items()}
        files: dict[str, bytes | str] = {f"{name}.bin": content for name, content in rows.items()}
        return write(root / "cifar-100-binary", {**files, "fine_label_names.txt": "cat\nant\n"})
    found: dict[str, Any] = {
        name: pickle.dumps({"data": part, "fine_labels": [at % 2 for at in range(len(part))]}) for name, part in parts.items()
    }
    return write(root / "cifar-100-python", {**found, "meta": pickle.dumps({"fine_label_names": CLASSES})})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_forms_of_cifar_hold_the_same_images(name: str, binary: bool, packed: bool, tmp_path: Path) -> None:
    folder = (cifar10 if name == "cifar10" else cifar100)(tmp_path / "made", binary=binary)
    if packed:
        with tarfile.open(tmp_path / ARCHIVES[folder.name], "w:gz") as made:
            made.add(folder, folder.name)
    listing = cifar(tmp_path if packed else tmp_path / "made", name)
    wanted = {("train", CLASSES[at % 2], f"train_{at:05d}.png"): PIXELS[at // 2, at % 2] for at in range(10)}
    wanted |= {("val", CLASSES[at], f"val_{at:05d}.png"): PIXELS[5, at] for at in range(2)}
    rows = {key: row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for key, row in wanted.items()}
    assert trees.content(listing) == rows
    payload = listing.fetch(listing.images[0])
    assert np.array_equal(np.asarray(listing.decode(payload)).tobytes(), payload)


def test_cifar_that_is_absent_damaged_or_no_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has none of cifar-10-batches-py and cifar-10-python\.tar\.gz") as caught:
        cifar(tmp_path, "cifar10")
    assert "isd-repro downloads no images" in caught.value.hint
    folder = cifar10(tmp_path, binary=False)
    whole = (folder / "test_batch").read_bytes()
    for content in (whole[:100], b"", pickle.dumps(print), pickle.dumps({"labels": [0, 1]})):
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match=r"cifar-10-batches-py or cifar-10-python\.tar\.gz is damaged"):
            cifar(tmp_path, "cifar10")


# --- STL-10 -------------------------------------------------------------------------------------------------------------

SMALL = np.random.default_rng(1).integers(
    0, 256, (9, 96, 96, 3), dtype=np.uint8
)  # four of train, two of test, three without labels


def write_stl10(root: Path) -> Path:
    """Its binary form: planes of red, green and blue, each column by column; labels counted from 1."""
    parts = {"train": (SMALL[:4], [2, 1, 2, 1]), "test": (SMALL[4:6], [1, 2]), "unlabeled": (SMALL[6:], None)}
    files: dict[str, bytes | str] = {"class_names.txt": "airplane\nbird\n", "fold_indices.txt": "0 1\n"}
    for name, (images, labels) in parts.items():
        files[f"{name}_X.bin"] = images.transpose(0, 3, 2, 1).tobytes()
        if labels:
            files[f"{name}_y.bin"] = bytes(labels)
    return write(root / "stl10_binary", files)


@pytest.mark.parametrize("inside", [False, True])
def test_stl_10_has_its_labelled_images_and_those_without_labels(inside: bool, tmp_path: Path) -> None:
    folder = write_stl10(tmp_path)
    listing = stl10(folder if inside else tmp_path)
    assert [image.key for image in listing.images] == [
        ("train", "airplane", "train_00001.png"),
        ("train", "airplane", "train_00003.png"),
        ("train", "bird", "train_00000.png"),
        ("train", "bird", "train_00002.png"),
        *(("unlabelled", "", f"unlabelled_0000{row}.png") for row in range(3)),
        ("val", "airplane", "val_00000.png"),
        ("val", "bird", "val_00001.png"),
    ]
    for image, at in zip(listing.images, (1, 3, 0, 2, 6, 7, 8, 4, 5), strict=True):
        assert np.array_equal(np.asarray(listing.decode(listing.fetch(image))), SMALL[at])


@pytest.mark.parametrize(
    ("damage", "message"), [("cut", "damaged .ValueError"), ("label", "damaged .IndexError"), ("gone", "damaged")]
)
def test_stl_10_that_is_damaged_is_named(damage: str, message: str, tmp_path: Path) -> None:
    folder = write_stl10(tmp_path)
    path = folder / ("test_y.bin" if damage == "label" else "test_X.bin")
    path.unlink() if damage == "gone" else path.write_bytes(bytes([1, 9]) if damage == "label" else path.read_bytes()[:-1])
    with pytest.raises(DataError, match=message):
        stl10(tmp_path)


def test_stl_10_that_is_absent_or_packed_is_answered_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder stl10_binary") as caught:
        stl10(tmp_path)
    assert "download" in caught.value.hint
    write(tmp_path, {"stl10_binary.tar.gz": ""})
    with pytest.raises(DataError, match="has no folder stl10_binary") as caught:
        stl10(tmp_path)
    assert caught.value.hint == "unpack it: tar -xf stl10_binary.tar.gz"


def test_images_without_labels_are_trained_on_and_nothing_else(tmp_path: Path) -> None:
    """Classes, search set, queries and groups are those of the labelled images; the manifest is read as it was written."""
    listing = stl10(write_stl10(tmp_path).parent)
    subset = trees.subset(params.AllClasses(name="all"), source="stl10", shots=params.Shots(many_above=2, few_below=2))
    labelled, both = (select(listing.images, subset.model_copy(update={"unlabelled": given}), "x") for given in (False, True))
    assert labelled.classes == both.classes == ("airplane", "bird")
    assert (len(labelled.train), len(both.train)) == (4, 7)
    assert (both.search.tolist(), both.query.tolist(), both.shots) == (
        labelled.search.tolist(),
        labelled.query.tolist(),
        labelled.shots,
    )
    rows = tuple(Image(*image.key, f"{at:064x}") for at, image in enumerate(listing.images))
    made = Manifest("STL-10", "x", {}, both.classes, (), rows, both.train, both.search, both.query)
    manifests.write(tmp_path / "made", made)
    found = manifests.read(tmp_path / "made")
    assert found.sha256 == made.sha256
    assert found.labels[found.train].tolist() == [0, 0, 1, 1, -1, -1, -1]
    assert found.labels[found.search].tolist() == [0, 0, 1, 1]


def test_a_source_without_such_images_is_named() -> None:
    subset = trees.subset().model_copy(update={"unlabelled": True})
    with pytest.raises(DataError, match="subset 'x': the source has no images without labels") as caught:
        select(trees.located({"a": 3}), subset, "x")
    assert "STL-10" in caught.value.hint
    assert "unlabelled" not in trees.subset().model_dump(mode="json")
