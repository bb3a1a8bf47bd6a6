"""The target data sets of transfer in tiny, each in the layout that its torchvision class reads.

Every image is one colour that says which image it is, so that a test can tell what was read from the pixels alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Expected = dict[int, tuple[str, int]]  # number of an image -> part and label
_STEP, _COLUMNS = 8, 30


def colour(number: int) -> tuple[int, int, int]:
    return _STEP * (number % _COLUMNS), _STEP * (number // _COLUMNS), 0


def number_of(image: Image.Image) -> int:
    """Which image this is; JPEG moves a plain colour by less than half a step."""
    red, green, _ = np.asarray(image.convert("RGB"), dtype=np.float64).reshape(-1, 3).mean(axis=0).tolist()
    found: int = round(red / _STEP) + _COLUMNS * round(green / _STEP)
    return found


class Tree:
    """Writes numbered images and remembers what they are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.expected: Expected = {}

    def add(self, part: str, label: int) -> int:
        number = len(self.expected)
        self.expected[number] = part, label
        return number

    def jpeg(self, path: str, part: str, label: int) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (9, 7), colour(self.add(part, label))).save(buffer, "JPEG", quality=95)
        self.write(path, buffer.getvalue())

    def write(self, path: str, content: bytes | str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def mat(self, path: str, content: dict[str, Any]) -> None:
        from scipy.io import savemat

        buffer = io.BytesIO()
        savemat(buffer, content)
        self.write(path, buffer.getvalue())

    def md5(self, path: str) -> str:
        return hashlib.md5((self.root / path).read_bytes()).hexdigest()


Patch = pytest.MonkeyPatch


def food101(tree: Tree, patch: Patch) -> None:
    for part in ("train", "test"):
        listed = {}
        for label, cls in enumerate(("apple_pie", "waffles")):
            names = [f"{cls}/{part}{number}" for number in range(6)]
            listed[cls] = names
            for name in names:
                tree.jpeg(f"food-101/images/{name}.jpg", part, label)
        tree.write(f"food-101/meta/{part}.json", json.dumps(listed))


def _cifar(tree: Tree, patch: Patch, kind: Any, files: tuple[str, str, str], key: str, names: str) -> None:
    folder = kind.base_folder
    for part, file in zip(("train", "test"), files[:2], strict=True):
        labels = [number % 2 for number in range(10)]
        pixels = [np.full((32, 32, 3), colour(tree.add(part, label)), dtype=np.uint8).transpose(2, 0, 1) for label in labels]
        tree.write(f"{folder}/{file}", pickle.dumps({"data": np.stack(pixels).reshape(10, -1), key: labels}))
    tree.write(f"{folder}/{files[2]}", pickle.dumps({names: ["cat", "ant"]}))
    patch.setattr(kind, "train_list", [[files[0], tree.md5(f"{folder}/{files[0]}")]])
    patch.setattr(kind, "test_list", [[files[1], tree.md5(f"{folder}/{files[1]}")]])
    patch.setattr(kind, "meta", {"filename": files[2], "key": names, "md5": tree.md5(f"{folder}/{files[2]}")})


def cifar10(tree: Tree, patch: Patch) -> None:
    from torchvision.datasets import CIFAR10

    _cifar(tree, patch, CIFAR10, ("data_batch_1", "test_batch", "batches.meta"), "labels", "label_names")


def cifar100(tree: Tree, patch: Patch) -> None:
    from torchvision.datasets import CIFAR100

    _cifar(tree, patch, CIFAR100, ("train", "test", "meta"), "fine_labels", "fine_label_names")


def sun397(tree: Tree, patch: Patch) -> None:
    classes = ("a/abbey", "b/bar", "c/church/outdoor")
    tree.write("SUN397/ClassName.txt", "".join(f"/{cls}\n" for cls in classes))
    for part, file in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        lines = []
        for label, cls in enumerate(classes):
            for number in range(5):
                name = f"/{cls}/sun_{part[::-1]}{4 - number}.jpg"
                tree.jpeg(f"SUN397{name}", part, label)
                lines.append(name)
        tree.write(f"SUN397/Partitions/{file}", "\n".join(lines) + "\n")
    kept = dict(tree.expected)
    tree.jpeg("SUN397/a/abbey/sun_other.jpg", "none", 0)  # of no partition
    tree.expected = kept


def cars(tree: Tree, patch: Patch) -> None:
    annotations = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for part, file in annotations.items():
        rows = np.zeros(10, dtype=[("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
        for number in range(10):
            tree.jpeg(f"stanford_cars/cars_{part}/{number:05d}.jpg", part, number % 2)
            rows[number] = (1, number % 2 + 1, f"{number:05d}.jpg")
        tree.mat(f"stanford_cars/{file}", {"annotations": rows})
    tree.mat("stanford_cars/devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], dtype=object)})


def dtd(tree: Tree, patch: Patch) -> None:
    for part in ("train", "val", "test"):
        lines = []
        for label, cls in enumerate(("banded", "dotted")):
            for number in range(3):
                lines.append(f"{cls}/{cls}_{part}{number}.jpg")
                tree.jpeg(f"dtd/dtd/images/{lines[-1]}", part, label)
        tree.write(f"dtd/dtd/labels/{part}1.txt", "\n".join(lines) + "\n")


def pets(tree: Tree, patch: Patch) -> None:
    for part, file in (("train", "trainval"), ("test", "test")):
        lines = []
        for label, cls in enumerate(("Abyssinian", "basset_hound")):
            for number in range(5):
                name = f"{cls}_{number + 10 * (part == 'test')}"
                lines.append(f"{name} {label + 1} 1 1")
                tree.jpeg(f"oxford-iiit-pet/images/{name}.jpg", part, label)
        tree.write(f"oxford-iiit-pet/annotations/{file}.txt", "\n".join(lines) + "\n")


def caltech101(tree: Tree, patch: Patch) -> None:
    tree.write("caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg", b"never read")
    for label, (cls, count) in enumerate((("Faces", 33), ("airplanes", 31))):
        for number in range(1, count + 1):
            tree.jpeg(f"caltech101/101_ObjectCategories/{cls}/image_{number:04d}.jpg", "pool", label)


def flowers102(tree: Tree, patch: Patch) -> None:
    from torchvision.datasets import Flowers102

    ids: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    labels = []
    for key, part in (("tstid", "test"), ("trnid", "train"), ("valid", "val")):
        for number in range(6):
            labels.append(number % 2 + 1)
            ids[key].append(len(labels))
            tree.jpeg(f"flowers-102/jpg/image_{len(labels):05d}.jpg", part, number % 2)
    tree.mat("flowers-102/setid.mat", {key: np.array(value) for key, value in ids.items()})
    tree.mat("flowers-102/imagelabels.mat", {"labels": np.array(labels)})
    files = {key: (name, tree.md5(f"flowers-102/{name}")) for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    patch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **files})


def aircraft(tree: Tree, patch: Patch) -> None:
    tree.write("fgvc-aircraft-2013b/data/variants.txt", "707-320\nA340 500\n")
    for at, part in enumerate(("train", "val", "test")):
        lines = []
        for number in range(6):
            lines.append(f"{at}{number:06d} {('707-320', 'A340 500')[number % 2]}")
            tree.jpeg(f"fgvc-aircraft-2013b/data/images/{at}{number:06d}.jpg", part, number % 2)
        tree.write(f"fgvc-aircraft-2013b/data/images_variant_{part}.txt", "\n".join(lines) + "\n")


def folder(tree: Tree, patch: Patch) -> None:
    for part in ("train", "test"):
        for label, cls in enumerate(("bird", "cat")):
            for number in range(6):
                tree.jpeg(f"{part}/{cls}/{number}.jpg", part, label)


MAKERS: dict[str, Callable[[Tree, Patch], None]] = {
    "food101": food101,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "sun397": sun397,
    "cars": cars,
    "dtd": dtd,
    "pets": pets,
    "caltech101": caltech101,
    "flowers102": flowers102,
    "aircraft": aircraft,
    "cifar10-folder": folder,
}
CLASSES = {
    "food101": ("apple_pie", "waffles"),
    "cifar10": ("cat", "ant"),
    "cifar100": ("cat", "ant"),
    "sun397": ("abbey", "bar", "church/outdoor"),
    "cars": ("Audi", "BMW"),
    "dtd": ("banded", "dotted"),
    "pets": ("Abyssinian", "Basset Hound"),
    "caltech101": ("Faces", "airplanes"),
    "aircraft": ("707-320", "A340 500"),
    "cifar10-folder": ("bird", "cat"),
}
