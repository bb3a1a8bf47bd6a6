"""Lists of images and of classes: the ISD authors' ten files, lists of `path label` lines, and lists of classes.

Long-tailed benchmarks are published as lists of `path label` lines: ImageNet-LT (Liu et al., CVPR 2019), ImageNet-100-LT and
ImageNet-LT-exp (Jiang et al., ICML 2021). An image is identified by the last two parts of its path, the class's folder and the
file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isd_repro.runtime.errors import DataError

LISTS_ORIGIN = "repository UMBCvision/ISD, commit 4bdd603, folder unbalanced_dataset"
LIST_SHA256 = {
    "D1": "dc2790e24a34f5b3fdf59e1cb7b99ac9dce7feb560be0b378c1718c80a3f0874",
    "D2": "d14a9618f058e8b96512b89ad0d245b7b59a4aec10f9955ab06ae06fd7d73256",
    "D3": "e14f6654049fa6d6208bb8c018b9fdb0eda0d9f05ab306b9b1eae5aa08b95dbe",
    "D4": "10ceb1619077529546675010cd3c307d1737108c11e80c10c5bb2a70f152380a",
    "D5": "94dc1f52d686450367e42df68f33993128bf831e7aaac07d4e7d5eec02949464",
    "D6": "ea59308ddeb3de0933ca0562b7a41de998fed5b7876866abd14a4e9a04ef0972",
    "D7": "c52d59f573e0f7636d6590f8ce73820b2d502eaa8454a28389cdeb2605a0745f",
    "D8": "923b820259d165a296e05afa84dcac952e07e33b5acc5a0d374971b2cc114a4e",
    "D9": "f482e094b8d0c3d88ab7cbfbdaed11aa05626de3094268a429eee490e8bafc12",
    "D10": "5bbc8d625a2d0fcf1732ad3be7c48e4cb76cd4d268a274714577e163d5a74b01",
}
_LABELLED = "a line is `train/n01440764/n01440764_190.JPEG 0`: the image's path, a space and the number of its class"


@dataclass(frozen=True)
class Listed:
    """A list of images."""

    classes: tuple[str, ...]  # in the file's order
    images: tuple[tuple[str, str], ...]  # (class, file) in the file's order; the class is the folder that holds the file
    large: tuple[str, ...]  # of an authors' list the classes with more images than most classes have, sorted
    sha256: str  # of the file's bytes


def is_authors(path: Path) -> bool:
    """Whether a file begins like one of the authors' lists."""
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"class names")


def _lines(path: Path) -> tuple[list[str], str]:
    """A file's lines, stripped, and the sha256 of its bytes."""
    content = path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    return [line.strip() for line in text.splitlines()], hashlib.sha256(content).hexdigest()


def parse_list(path: Path) -> Listed:
    """Read a list in the authors' format.

    The format is a line `class names : `, then one class per line, a line `Train Images: `, then one /train/<class>/<file> per
    line.

    Raises:
        DataError: a line is not of this format.
    """
    lines, sha256 = _lines(path)
    hint = f"the published lists are in {LISTS_ORIGIN}"
    if not lines or lines[0] != "class names :":
        raise DataError(f"{path}:1: expected 'class names : ', found {lines[0] if lines else 'an empty file'!r}", hint)
    if "Train Images:" not in lines:
        raise DataError(f"{path}: contains no line 'Train Images: '", hint)
    head = lines.index("Train Images:")
    classes = tuple(lines[1:head])
    images: list[tuple[str, str]] = []
    known = set(classes)
    for number, line in enumerate(lines[head + 1 :], start=head + 2):
        parts = line.split("/")
        if len(parts) != 4 or parts[:2] != ["", "train"] or parts[2] not in known or not parts[3]:
            raise DataError(f"{path}:{number}: expected /train/<one of its classes>/<file>, found {line!r}", hint)
        images.append((parts[2], parts[3]))
    counts = Counter(cls for cls, _ in images)
    if not classes or len(known) != len(classes) or len(set(images)) != len(images) or set(counts) != known:
        raise DataError(f"{path}: has no class, a class or an image twice, or a class without images", hint)
    usual = min(Counter(counts.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    large = tuple(sorted(cls for cls, count in counts.items() if count > usual))
    return Listed(classes, tuple(images), large, sha256)


def parse_labelled(path: Path) -> Listed:
    """Read a list of `path label` lines, the format in which ImageNet-LT and similar benchmarks are published.

    Raises:
        DataError: a line is not of this format, an image is named twice, or folders and labels do not correspond one to one.
    """
    lines, sha256 = _lines(path)
    images: dict[tuple[str, str], int] = {}
    label_of: dict[str, str] = {}
    class_of: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        name, _, label = line.rpartition(" ")
        parts = PurePosixPath(name.strip()).parts
        if len(parts) < 2 or not label.isdecimal():
            raise DataError(f"{path}:{number}: expected a path with a folder and a label, found {line!r}", _LABELLED)
        cls, file = parts[-2:]
        if (cls, file) in images:
            found = f"{path}:{number}: {cls}/{file} is named a second time, first on line {images[cls, file]}"
            raise DataError(found, "remove one of the lines")
        images[cls, file] = number
        if label_of.setdefault(cls, label) != label or class_of.setdefault(label, cls) != cls:
            found = f"{path}:{number}: folder {cls} has label {label_of[cls]}, label {label} has {class_of.get(label)}"
            raise DataError(found, "expected one label for each folder and one folder for each label")
    if not images:
        raise DataError(f"{path}: contains no line", _LABELLED)
    return Listed(tuple(label_of), tuple(images), (), sha256)


def read_classes(path: Path, available: Collection[str]) -> tuple[tuple[str, ...], str]:
    """The classes that a file names, one per line, and the sha256 of its bytes.

    A class is the whole line, or its first word, because lists of ImageNet-100 often have the class's name after its WordNet id.
    Empty lines and lines that begin with `#` are skipped. It is not checked whether the source has the classes.

    Args:
        path: the file.
        available: classes of the source, whose names may contain spaces.

    Raises:
        DataError: the file names no class, or a class twice.
    """
    lines, sha256 = _lines(path)
    named = [line if line in available else line.split()[0] for line in lines if line and not line.startswith("#")]
    twice = [cls for cls, count in Counter(named).items() if count > 1]
    if not named or twice:
        found = f"class {twice[0]} is named twice" if twice else "names no class"
        raise DataError(f"{path}: {found}", "expected the name of one class on each line")
    return tuple(named), sha256
