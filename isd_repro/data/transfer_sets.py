"""The target data sets of transfer: where torchvision reads each, how it is divided, and which number the field reports.

One row a set. The paper states neither division nor metric. Metrics, the sets with validation images of their own and the
share of a fifth elsewhere are those of Ericsson et al. (CVPR 2021; linusericsson/ssl-transfer at 4e9b9c2, linear.py), who
follow SimCLR and BYOL, whose numbers the paper's Table 2 copies. What is drawn, is drawn here by class and by a seed.  # DEV-20

Nothing is downloaded. All sets of torchvision lie below one folder, each in the sub-folder that its class expects.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from isd_repro.config.params import TransferName
from isd_repro.data.loader import generator_of
from isd_repro.runtime.errors import DataError, UserError

Part = Literal["train", "val", "test", "pool"]  # "pool": neither train nor test until it is divided
Metric = Literal["top1", "mean-per-class"]
ROOT = "ISD_TRANSFER_ROOT"
_MATLAB = ("Flowers102", "StanfordCars", "Caltech101")  # classes that read annotations or need scipy
_SHARE = 0.2  # of the train images, for validation: `valid_size` of linear.py
_CIFAR10 = tuple(f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "test_batch", "batches.meta"))


@dataclass(frozen=True)
class TransferSet:
    """One row of the table.

    Attributes:
        title: the data set's public name.
        reader: a class of torchvision.datasets.
        parts: arguments of the class for each part that has a list of its own.
        needs: what must lie below the root.
        metric: the number that the field reports.
        train_per_class: images of each class that are drawn from the pool to learn from; the others are the test.
        val_share: share of each class's train images that is drawn for validation, where the set has no validation images.
            root_env: environment variable that names the folder.
        note: what departs from the source, with its id.
    """

    title: str
    reader: str
    parts: dict[Part, dict[str, Any]]
    needs: tuple[str, ...]
    metric: Metric
    train_per_class: int | None = None
    val_share: float = _SHARE
    root_env: str = ROOT
    note: str = "DEV-20"


def _splits(*parts: Part) -> dict[Part, dict[str, Any]]:
    return {part: {"split": part} for part in parts}


_CIFAR: dict[Part, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_PETS: dict[Part, dict[str, Any]] = {"train": {"split": "trainval"}, "test": {"split": "test"}}
_SUN = ("SUN397/ClassName.txt", "SUN397/Partitions/Training_01.txt", "SUN397/Partitions/Testing_01.txt")
_CARS = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_train", "cars_test")
_AIRCRAFT = tuple(f"fgvc-aircraft-2013b/data/{name}" for name in ("images", "variants.txt", "images_variant_train.txt"))

SETS: dict[TransferName, TransferSet] = {
    "food101": TransferSet(
        title="Food-101",
        reader="Food101",
        parts=_splits("train", "test"),
        needs=("food-101/images", "food-101/meta/train.json", "food-101/meta/test.json"),
        metric="top1",
    ),
    "cifar10": TransferSet(
        title="CIFAR-10",
        reader="CIFAR10",
        parts=_CIFAR,
        needs=_CIFAR10,
        metric="top1",
    ),
    "cifar100": TransferSet(
        title="CIFAR-100",
        reader="CIFAR100",
        parts=_CIFAR,
        needs=("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
        metric="top1",
    ),
    "sun397": TransferSet(
        title="SUN397, partition 1",
        reader="SUN397",
        parts={"pool": {}},
        needs=_SUN,
        metric="top1",
    ),
    "cars": TransferSet(
        title="Stanford Cars",
        reader="StanfordCars",
        parts=_splits("train", "test"),
        needs=tuple(f"stanford_cars/{name}" for name in _CARS),
        metric="top1",
    ),
    "dtd": TransferSet(
        title="DTD, partition 1",
        reader="DTD",
        parts=_splits("train", "val", "test"),
        needs=("dtd/dtd/images", *(f"dtd/dtd/labels/{part}1.txt" for part in ("train", "val", "test"))),
        metric="top1",
        note="",
    ),
    "pets": TransferSet(
        title="Oxford-IIIT Pets",
        reader="OxfordIIITPet",
        parts=_PETS,
        needs=tuple(f"oxford-iiit-pet/{name}" for name in ("images", "annotations/trainval.txt", "annotations/test.txt")),
        metric="mean-per-class",
    ),
    "caltech101": TransferSet(
        title="Caltech-101",
        reader="Caltech101",
        parts={"pool": {}},
        needs=("caltech101/101_ObjectCategories/BACKGROUND_Google",),
        metric="mean-per-class",
        train_per_class=30,
        note="DEV-20: torchvision leaves the background class out",
    ),
    "flowers102": TransferSet(
        title="Oxford Flowers-102",
        reader="Flowers102",
        parts=_splits("train", "val", "test"),
        needs=("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        metric="mean-per-class",
        note="",
    ),
    "aircraft": TransferSet(
        title="FGVC Aircraft, variants",
        reader="FGVCAircraft",
        parts=_splits("train", "val", "test"),
        needs=_AIRCRAFT,
        metric="mean-per-class",
        note="not in the paper; its group's later tables have it",
    ),
    "cifar10-folder": TransferSet(
        title="CIFAR-10 in an image folder",
        reader="ImageFolder",
        parts={"train": {}, "val": {}, "test": {}},  # val may be absent; without test, val is the test
        needs=("train",),
        metric="top1",
        root_env="ISD_CIFAR10_ROOT",
        note="DEV-20: any part of CIFAR-10 as train/<class>/ and test/<class>/",
    ),
}


@dataclass(frozen=True, eq=False)
class Opened:
    """A set on disk.

    Attributes:
        spec: its row.
        classes: names; a label is a position in it.
        part: the part of each image, in the set's own order, which no file system changes.
        get: image and label at a position.
    """

    spec: TransferSet
    classes: tuple[str, ...]
    part: tuple[Part, ...]
    get: Callable[[int], tuple[Image.Image, int]]


def root_of(name: TransferName) -> Path:
    """The folder of a set, with all that its class needs in it.

    Raises:
        DataError: the environment variable is not set, or something is missing below the folder it names.
        UserError: the class needs scipy, which is not installed.
    """
    spec = SETS[name]
    expected = f"torchvision.datasets.{spec.reader} reads {', '.join(spec.needs)} below it; nothing is downloaded"
    value = os.environ.get(spec.root_env, "")
    if not value:
        raise DataError(f"{spec.root_env} is not set", f"set it to the folder that holds {spec.title}: {expected}")
    root = Path(value).expanduser()
    missing = [need for need in spec.needs if not (root / need).exists()]
    if missing:
        raise DataError(f"{spec.root_env}={value}: {spec.title} lacks {', '.join(missing)}", expected)
    if spec.reader in _MATLAB and importlib.util.find_spec("scipy") is None:
        raise UserError(f"{spec.title} needs the package scipy", 'install the extra "transfer" of isd-repro')
    return root


def open_set(name: TransferName) -> Opened:
    """Read a set's lists; images are decoded when they are asked for. Raises as `root_of`, and `DataError` for damaged lists."""
    spec, root = SETS[name], root_of(name)
    try:
        sets = _folders(root) if spec.reader == "ImageFolder" else _datasets(spec, root)
        first = next(iter(sets.values()))
        classes = tuple(map(str, getattr(first, "classes", None) or first.categories))
        if any(tuple(map(str, getattr(part, "classes", classes))) != classes for part in sets.values()):
            raise ValueError("its parts have different classes")
        order = _sun397(first, root) if name == "sun397" else [(part, at) for part in sets for at in range(len(sets[part]))]
    except (RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        expected = f"torchvision.datasets.{spec.reader} reads {', '.join(spec.needs)}; nothing is downloaded"
        raise DataError(f"{spec.root_env}={root}: {spec.title} cannot be read: {error}", expected) from error

    def get(at: int) -> tuple[Image.Image, int]:
        part, place = order[at]
        image, label = sets["pool" if name == "sun397" else part][place]
        return image, int(label)

    return Opened(spec, classes, tuple(part for part, _ in order), get)


def _datasets(spec: TransferSet, root: Path) -> dict[Part, Any]:
    """The set's class for each of its parts."""
    module: Any = importlib.import_module("torchvision.datasets")
    kind = getattr(module, spec.reader)
    return {part: kind(str(root), **arguments) for part, arguments in spec.parts.items()}


def _folders(root: Path) -> dict[Part, Any]:
    """train/<class>/ and test/<class>/; with val/<class>/ between, or in place of test."""
    module: Any = importlib.import_module("torchvision.datasets")
    present = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    if len(present) < 2:
        raise ValueError("it has neither test/<class>/ nor val/<class>/")
    names: list[Part] = ["train", "val", "test"] if len(present) == 3 else ["train", "test"]
    return {name: module.ImageFolder(str(root / folder)) for name, folder in zip(names, present, strict=True)}


def _sun397(dataset: Any, root: Path) -> list[tuple[Part, int]]:
    """Images of the first official partition in its own order; torchvision's class knows all images and no partition."""
    files = vars(dataset)["_image_files"]  # in the order of the file system
    place = {path.relative_to(root / "SUN397").as_posix(): at for at, path in enumerate(files)}
    order: list[tuple[Part, int]] = []
    parts: tuple[tuple[Part, str], ...] = (("train", "Training_01.txt"), ("test", "Testing_01.txt"))
    for part, file in parts:
        lines = (root / "SUN397" / "Partitions" / file).read_text("utf-8").split()
        order += [(part, place[line.removeprefix("/")]) for line in lines]
    return order


# --- division ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Division:
    """Positions in the set's own order, ascending, int64: what is learnt from, chosen on, and asked."""

    train: Tensor
    val: Tensor
    test: Tensor


def divide(name: TransferName, part: Sequence[Part], label: Tensor, seed: int) -> Division:
    """Divide a set; draws are by class, each with a generator of its own, and see no image and no test label.

    Args:
        name: the set.
        part: of each image.
        label: class of each image, int64, N.
        seed: of what is drawn.

    Raises:
        DataError: a class has too few images to draw from, or a part is empty.
    """
    spec = SETS[name]
    where = {key: torch.tensor([at for at, found in enumerate(part) if found == key], dtype=torch.int64) for key in set(part)}
    none = torch.empty(0, dtype=torch.int64)
    train, val, test = (where.get(key, none) for key in ("train", "val", "test"))
    if spec.train_per_class is not None:
        train, test = _drawn(name, where["pool"], label, lambda count: spec.train_per_class or 0, seed, "train")
    if not len(val):
        val, train = _drawn(name, train, label, lambda count: max(1, round(spec.val_share * count)), seed, "val")
    for key, found in (("train", train), ("val", val), ("test", test)):
        if not len(found):
            raise DataError(f"{spec.title}: its {key} part is empty", f"look at the folder that {spec.root_env} names")
    return Division(train, val, test)


def _drawn(
    name: TransferName, among: Tensor, label: Tensor, count: Callable[[int], int], seed: int, purpose: str
) -> tuple[Tensor, Tensor]:
    """Of each class `count(images)` positions, and the others; both ascending."""
    chosen = []
    for cls in label[among].unique().tolist():
        members = among[label[among] == cls]
        wanted = count(len(members))
        if wanted >= len(members):
            found = f"class number {cls} has {len(members)} images, {wanted} are to be drawn for {purpose} and one must be left"
            raise DataError(f"{SETS[name].title}: {found}", f"look at the folder that {SETS[name].root_env} names")
        order = torch.randperm(len(members), generator=generator_of(seed, "transfer", name, purpose, cls))
        chosen.append(members[order[:wanted]])
    taken = torch.cat(chosen).sort().values
    return taken, among[~torch.isin(among, taken)]
