"""Target data sets of transfer: their torchvision readers, their splits, and their customary metrics.

The table `SETS` has one row per data set. The paper states neither splits nor metrics. The metrics, the sets that have their own
validation images and the share of a fifth for the others are those of Ericsson et al. (CVPR 2021; linusericsson/ssl-transfer at
4e9b9c2, linear.py), who follow SimCLR and BYOL, whose numbers the paper's Table 2 copies. Random splits are drawn by class and by
a seed.  # DEV-20

Nothing is downloaded. All data sets of torchvision are in one folder, each in the subfolder that its class expects.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isd_repro.config.params import StoreSettings
from isd_repro.records import ManifestIdentity
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from isd_repro.data.eval_loader import Frame

TransferName = Literal[
    "food101", "cifar10", "cifar100", "sun397", "cars", "dtd", "pets", "caltech101", "flowers102", "aircraft", "cifar10-folder"
]
Part = Literal["train", "val", "test", "pool"]  # "pool": neither train nor test until it is divided
Metric = Literal["top1", "mean-per-class"]
ROOT = "ISD_TRANSFER_ROOT"


@dataclass(frozen=True)
class TransferSet:
    """One row of the table.

    Attributes:
        title: the data set's public name.
        reader: a class of torchvision.datasets.
        parts: arguments of the class for each part that has its own list.
        needs: files and folders that must exist below the root.
        metric: the customary metric.
        note: deviations, with their ids.
        train_per_class: number of images of each class that are drawn for training; the others are the test images.
        val_share: share of each class's train images that is drawn for validation if the set has no validation images.
        root_env: environment variable that names the folder.
    """

    title: str
    reader: str
    parts: dict[Part, dict[str, Any]]
    needs: tuple[str, ...]
    metric: Metric = "top1"
    note: str = "DEV-20"
    train_per_class: int | None = None
    val_share: float = 0.2  # `valid_size` of linear.py
    root_env: str = ROOT


def _in(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


_TWO: dict[Part, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[Part, dict[str, Any]] = {part: {"split": part} for part in ("train", "val", "test")}
_CIFAR: dict[Part, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_PETS: dict[Part, dict[str, Any]] = {"train": {"split": "trainval"}, "test": {"split": "test"}}
_PET_FILES = _in("oxford-iiit-pet", "images", "annotations/trainval.txt", "annotations/test.txt")
_CIFAR_FILES = _in("cifar-10-batches-py", "data_batch_1", "test_batch", "batches.meta")
_LATER = "not in the paper, but in later tables of the same group"
_FLOWERS = _in("flowers-102", "jpg", "imagelabels.mat", "setid.mat")
_CALTECH = _in("caltech101", "101_ObjectCategories/BACKGROUND_Google")
_CARS = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_train", "cars_test")
_TEXTURES = ("images", *(f"labels/{part}1.txt" for part in ("train", "val", "test")))
_SUN = _in("SUN397", "ClassName.txt", "Partitions/Training_01.txt", "Partitions/Testing_01.txt")
_BACKGROUND = "DEV-20: torchvision omits the background class"
_PLANES = _in("fgvc-aircraft-2013b/data", "images", "variants.txt", "images_variant_train.txt")
_BY_CLASS: Metric = "mean-per-class"

SETS: dict[TransferName, TransferSet] = {
    "food101": TransferSet("Food-101", "Food101", _TWO, _in("food-101", "images", "meta/train.json", "meta/test.json")),
    "cifar10": TransferSet("CIFAR-10", "CIFAR10", _CIFAR, _CIFAR_FILES),
    "cifar100": TransferSet("CIFAR-100", "CIFAR100", _CIFAR, _in("cifar-100-python", "train", "test", "meta")),
    "sun397": TransferSet("SUN397, partition 1", "SUN397", {"pool": {}}, _SUN),
    "cars": TransferSet("Stanford Cars", "StanfordCars", _TWO, _in("stanford_cars", *_CARS)),
    "dtd": TransferSet("DTD, partition 1", "DTD", _THREE, _in("dtd/dtd", *_TEXTURES), note=""),
    "pets": TransferSet("Oxford-IIIT Pets", "OxfordIIITPet", _PETS, _PET_FILES, _BY_CLASS),
    "caltech101": TransferSet("Caltech-101", "Caltech101", {"pool": {}}, _CALTECH, _BY_CLASS, _BACKGROUND, train_per_class=30),
    "flowers102": TransferSet("Oxford Flowers-102", "Flowers102", _THREE, _FLOWERS, _BY_CLASS, ""),
    "aircraft": TransferSet("FGVC Aircraft, variants", "FGVCAircraft", _THREE, _PLANES, _BY_CLASS, _LATER),
    "cifar10-folder": TransferSet(
        "CIFAR-10 in an image folder",
        "ImageFolder",
        {"train": {}, "val": {}, "test": {}},  # val may be absent; without test, val is the test
        ("train",),
        note="DEV-20: any part of CIFAR-10 as train/<class>/ and test/<class>/",
        root_env="ISD_CIFAR10_ROOT",
    ),
}


@dataclass(frozen=True, eq=False)
class Opened:
    """A set on disk."""

    spec: TransferSet  # its row
    classes: tuple[str, ...]  # names; a label is a position in it
    part: tuple[Part, ...]  # the part of each image, in the set's own order, which no file system changes
    get: Callable[[int], tuple[Image.Image, int]]  # image and label at a position


def root_of(name: TransferName) -> Path:
    """The folder of a data set, which contains everything that its class needs.

    Raises:
        DataError: the environment variable is not set, or something is missing below the folder it names.
    """
    spec = SETS[name]
    expected = f"torchvision.datasets.{spec.reader} reads {', '.join(spec.needs)} inside it; isd-repro downloads nothing"
    root = files.named_path(spec.root_env, f"set it to the folder that holds {spec.title}: {expected}")
    missing = [need for need in spec.needs if not (root / need).exists()]
    if missing:
        raise DataError(f"{spec.root_env}={root}: {spec.title} lacks {', '.join(missing)}", expected)
    return root


def open_set(name: TransferName) -> Opened:
    """Read a set's lists; images are decoded when they are requested.

    Raises:
        DataError: as for `root_of`, or a list is damaged.
    """
    spec, root = SETS[name], root_of(name)
    try:
        sets = _datasets(spec, root)
        first = next(iter(sets.values()))
        classes = tuple(map(str, getattr(first, "classes", None) or first.categories))
        if any(tuple(map(str, getattr(part, "classes", classes))) != classes for part in sets.values()):
            raise ValueError("its parts have different classes")
        order = _sun397(first, root) if name == "sun397" else [(part, at) for part in sets for at in range(len(sets[part]))]
    except (RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        expected = f"torchvision.datasets.{spec.reader} reads {', '.join(spec.needs)}; isd-repro downloads nothing"
        raise DataError(f"{spec.root_env}={root}: {spec.title} cannot be read: {error}", expected) from error

    def get(at: int) -> tuple[Image.Image, int]:
        part, place = order[at]
        image, label = sets["pool" if name == "sun397" else part][place]
        return image, int(label)

    return Opened(spec, classes, tuple(part for part, _ in order), get)


def _datasets(spec: TransferSet, root: Path) -> dict[Part, Any]:
    """The set's class for each of its parts. A folder has train/ and test/, with val/ between, or in place of test/."""
    kind = getattr(importlib.import_module("torchvision.datasets"), spec.reader)
    if spec.reader != "ImageFolder":
        return {part: kind(str(root), **arguments) for part, arguments in spec.parts.items()}
    present = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    if len(present) < 2:
        raise ValueError("it contains neither test/<class>/ nor val/<class>/")
    names: list[Part] = ["train", "val", "test"] if len(present) == 3 else ["train", "test"]
    return {name: kind(str(root / folder)) for name, folder in zip(names, present, strict=True)}


def _sun397(dataset: Any, root: Path) -> list[tuple[Part, int]]:
    """Images of the first official partition in its order; torchvision's class has all images but no partitions."""
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
    """Positions of train, validation and test images in the data set's own order, ascending, int64."""

    train: Tensor
    val: Tensor
    test: Tensor


def divide(name: TransferName, part: Sequence[Part], label: Tensor, seed: int) -> Division:
    """Divide a data set; every class is drawn with its own generator, without looking at images or test labels.

    Args:
        name: the set.
        part: of each image.
        label: class of each image, int64, N.
        seed: of what is drawn.

    Raises:
        DataError: a class has too few images to draw from, or a part is empty.
    """
    import torch

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
            raise DataError(f"{spec.title}: its {key} part is empty", f"check the folder that {spec.root_env} names")
    return Division(train, val, test)


def _drawn(
    name: TransferName, among: Tensor, label: Tensor, count: Callable[[int], int], seed: int, purpose: str
) -> tuple[Tensor, Tensor]:
    """Draw `count(images)` positions of each class; returns these and the others, both ascending."""
    import torch

    from isd_repro.data.loader import generator_of

    chosen = []
    for cls in label[among].unique().tolist():
        members = among[label[among] == cls]
        wanted = count(len(members))
        if wanted >= len(members):
            found = f"{len(members)} images, but {wanted} are drawn for {purpose} and at least one must remain"
            hint = f"check the folder that {SETS[name].root_env} names"
            raise DataError(f"{SETS[name].title}: class number {cls} has {found}", hint)
        order = torch.randperm(len(members), generator=generator_of(seed, "transfer", name, purpose, cls))
        chosen.append(members[order[:wanted]])
    taken = torch.cat(chosen).sort().values
    return taken, among[~torch.isin(among, taken)]


# --- reading ----------------------------------------------------------------------------------------------------------


class TransferImages:
    """A function from positions in the data set's order to normalised views, B x C x S x S; images are decoded one block ahead.

    The evaluation view is computed for one image at a time, because sizes differ too much to pad a block. Each image is decoded
    once; its `label` and its `digest`, the sha256 of the converted pixels, are kept, so that the pass that extracts features also
    gives the data set's identity.
    """

    def __init__(self, opened: Opened, frame: Frame, channels: int, pool: ThreadPoolExecutor) -> None:
        import torch

        from isd_repro.data.eval_loader import Ahead

        count = len(opened.part)
        self.label = torch.full((count,), -1, dtype=torch.int64)
        self.digest = [""] * count
        self._opened, self._frame = opened, frame
        self._store = StoreSettings.model_validate({"channels": channels})
        self._made = Ahead(self._read, pool)

    def __len__(self) -> int:
        return len(self.digest)

    def __call__(self, position: Tensor) -> Tensor:
        """Views of the images at these positions, on the CPU."""
        import torch

        from isd_repro.data import augment

        wanted = position.tolist()
        self._made.begin([*wanted, *range(wanted[-1] + 1, min(wanted[-1] + 1 + len(wanted), len(self)))])
        found = self._made.take(wanted)
        for at, (_, label, digest) in found.items():
            self.label[at], self.digest[at] = label, digest
        return augment.normalise(torch.stack([found[at][0] for at in wanted]), self._frame.mean, self._frame.std)

    def _read(self, at: int) -> tuple[Tensor, int, str]:
        """View, label and sha256 of one image."""
        import torch

        from isd_repro.data import augment
        from isd_repro.data.store import convert

        spec = self._opened.spec
        where = f"{spec.title}: image {at} (counted from 0, {self._opened.part[at]} part)"
        try:
            image, label = self._opened.get(at)
            pixels = torch.from_numpy(convert(image, self._store).copy())
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where} cannot be read: {error}", f"repair the folder that {spec.root_env} names") from error
        digest = hashlib.sha256(f"{tuple(pixels.shape)}\n".encode() + pixels.numpy().tobytes()).hexdigest()
        size = torch.tensor([pixels.shape[1:]])
        return augment.centre(pixels[None], size, self._frame.size, self._frame.crop_ratio)[0], label, digest


def identity(name: TransferName, images: TransferImages, opened: Opened, division: Division, seed: int) -> ManifestIdentity:
    """The identity of a divided data set, as a record states it.

    Its hash covers (role, class, sha256 of pixels) of each image in the data set's own order.

    Args:
        name: the set.
        images: after all of them have been read.
        opened: the same set.
        division: how it was divided.
        seed: of the division's draws.
    """
    roles = {at: role for role in ("train", "val", "test") for at in getattr(division, role).tolist()}
    hasher, spec = hashlib.sha256(), opened.spec
    for at in sorted(roles):
        hasher.update(f"{roles[at]}\t{opened.classes[int(images.label[at])]}\t{images.digest[at]}\n".encode())
    drawn = "nothing" if "val" in opened.part else f"{spec.val_share:g} of each class's train images for validation"
    rule = {"source": f"torchvision.datasets.{spec.reader}", "seed": seed, "validation": len(division.val), "drawn": drawn}
    rule |= {} if spec.train_per_class is None else {"train_per_class": spec.train_per_class}
    return ManifestIdentity(
        sha256=hasher.hexdigest(),
        dataset=spec.title,
        subset=name,
        rule=rule,
        classes=opened.classes,
        large=(),
        train=len(division.train),
        search=len(division.train) + len(division.val),
        query=len(division.test),
    )
