"""Command `data audit`: class sizes of any set, confounders in the authors' lists, and whether the lists are the published ones.

Two confounders are examined. The first is the position of the large classes among the sorted class names: it gives the
probability that as many classes drawn at random would all be among the first names. The second, if names are WordNet ids, is
whether a class is an animal: WordNet 3.0 numbers its nouns by topic, so the id tells. The animal kingdom itself is n01313093; of
ImageNet's 1,000 classes the 398 from n01440764 to n02655020 are animals, and the next, n02666196, is the abacus.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path

from rich.console import Console
from scipy.stats import hypergeom

from isd_repro.config.params import Shots
from isd_repro.data import manifests
from isd_repro.data.lists import LIST_SHA256, Listed, is_authors, parse_labelled, parse_list
from isd_repro.data.manifests import HEADER
from isd_repro.data.sources import open_images
from isd_repro.data.subsets import group_by_size
from isd_repro.records import SHOTS, Shot
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.terminal import show_table

_WNID = re.compile(r"n\d{8}")
_ANIMALS = range(1_313_093, 2_666_196)
_WHAT = "give a list of images, a prepared subset, or a folder or zip of images"


@dataclass(frozen=True)
class Sizes:
    """The number of training images of each class of a set."""

    name: str  # of the file or folder
    images: int
    classes: int
    largest: int  # images of a class
    smallest: int
    median: float
    imbalance: float  # the largest over the smallest
    gini: float  # Gini coefficient of the class sizes: 0 if all are equal, near 1 if one class has nearly all images
    shots: dict[Shot, int]  # classes with `many`, `medium` and `few` images, by ImageNet-LT's thresholds
    counts: dict[str, int]  # images by class


@dataclass(frozen=True)
class Animals:
    """Animals among the classes; `chance` is the probability of at least as many large ones if these were drawn at random."""

    large: int
    rare: int
    chance: float


@dataclass(frozen=True)
class Audit:
    """The contents of one of the authors' lists."""

    name: str  # of the file
    sha256: str
    published: str | None  # the authors' name of these bytes
    classes: int
    images: int
    large: dict[str, int]  # images of each large class, by class in sorted order
    rare: tuple[int, int]  # images of a rare class: fewest and most
    rare_classes: int
    rare_images: int
    last_large: int  # place of the last large class among the sorted class names, counted from 1
    chance: float  # probability that as many classes drawn at random are all among the first `last_large`
    animals: Animals | None  # None where a class is no WordNet id
    names: dict[str, str]  # of the large classes, where a file of words is given


@dataclass(frozen=True)
class Overlap:
    """The classes and images that two lists share."""

    first: str
    second: str
    classes: int
    large: int  # classes that are large in both
    rare: int
    images: int  # of any class
    rare_images: int  # of classes that are rare in both
    expected: float  # of such images, if each list had drawn its own: for each class n m / N, N being the largest class seen


@dataclass(frozen=True)
class AuditReport:
    """All sets; for the authors' lists also their contents, the overlap of every pair, and the number of distinct classes."""

    sets: tuple[Sizes, ...]
    lists: tuple[Audit, ...]
    overlaps: tuple[Overlap, ...]
    distinct_classes: int
    distinct_large: int


def find_sets(paths: Sequence[Path]) -> list[Path]:
    """The given paths, a folder of lists replaced by its *.txt files (D2 before D10); `DataError` if a path does not exist."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder", _WHAT)
        inside = {each.name.lower() for each in path.iterdir() if each.is_dir()} if path.is_dir() else set[str]()
        images = (path / HEADER).is_file() or inside & {"train", "ilsvrc"}  # Kaggle's ImageNet also has .txt files
        found += [path] if images else sorted(path.glob("*.txt"), key=_natural) or [path]
    return found


def inspect(paths: Sequence[Path], words: Mapping[str, str] | None = None) -> AuditReport:
    """The class sizes of each set; for the authors' lists also their contents and the overlap of each pair.

    Args:
        paths: lists in the authors' format or of `path label` lines, prepared subsets, folders or zips of images.
        words: names of classes by WordNet id.

    Raises:
        DataError: a file is none of these.
    """
    authors = {path: parse_list(path) for path in paths if path.is_file() and is_authors(path)}
    counted = {path: _sizes(authors[path]) if path in authors else _counts(path) for path in paths}
    read = {path: found for path, found in authors.items() if found.large}
    biggest = max((max(_sizes(found).values()) for found in read.values()), default=0)
    return AuditReport(
        sets=tuple(_describe(path.name or str(path), counts) for path, counts in counted.items()),
        lists=tuple(_audit(path, found, words or {}) for path, found in read.items()),
        overlaps=tuple(_overlap(one, two, biggest) for one, two in itertools.combinations(read.items(), 2)),
        distinct_classes=len({cls for found in read.values() for cls in found.classes}),
        distinct_large=len({cls for found in read.values() for cls in found.large}),
    )


def read_words(path: Path) -> dict[str, str]:
    """Read class names from lines `<class><tab><name>`, as in Tiny-ImageNet's words.txt; `DataError` for another format."""
    hint = "Tiny-ImageNet ships a words.txt"
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint)
    found = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        cls, tab, name = line.partition("\t")
        if not tab:
            raise DataError(f"{path}:{number}: expected class, tab and name, found {line!r}", hint)
        found[cls] = name.strip()
    return found


def _counts(path: Path) -> Counter[str]:
    """Training images by class of a prepared subset, of images in any layout, or of a list of `path label` lines."""
    if path.is_dir() and (path / HEADER).is_file():
        manifest = manifests.read(path)
        return Counter(manifest.images[at].cls for at in manifest.train.tolist())
    if path.is_dir() or zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
        with open_images(path) as listing:
            return Counter(image.cls for image in listing.images if image.split == "train")
    return Counter(cls for cls, _ in parse_labelled(path).images)


def _describe(name: str, counts: Mapping[str, int]) -> Sizes:
    rising, groups = sorted(counts.values()), group_by_size(counts, Shots())
    n, total = len(rising), sum(rising)
    return Sizes(
        name=name,
        images=total,
        classes=n,
        largest=rising[-1],
        smallest=rising[0],
        median=statistics.median(rising),
        imbalance=rising[-1] / rising[0],
        gini=sum((2 * rank - n - 1) * size for rank, size in enumerate(rising, start=1)) / (n * total),
        shots={group: len(groups[group]) for group in SHOTS},
        counts=dict(sorted(counts.items())),
    )


def _natural(path: Path) -> tuple[str, int, str]:
    match = re.fullmatch(r"(\D*)(\d+)", path.stem)
    return (match[1], int(match[2]), "") if match else (path.stem, -1, "")


def _sizes(found: Listed) -> Counter[str]:
    return Counter(cls for cls, _ in found.images)


def _audit(path: Path, found: Listed, words: Mapping[str, str]) -> Audit:
    sizes, classes, large = _sizes(found), sorted(found.classes), set(found.large)
    rare = [cls for cls in classes if cls not in large]
    last = max(place for place, cls in enumerate(classes, start=1) if cls in large)
    return Audit(
        name=path.name,
        sha256=found.sha256,
        published=next((name for name, digest in LIST_SHA256.items() if digest == found.sha256), None),
        classes=len(classes),
        images=len(found.images),
        large={cls: sizes[cls] for cls in found.large},
        rare=(min(sizes[cls] for cls in rare), max(sizes[cls] for cls in rare)),
        rare_classes=len(rare),
        rare_images=sum(sizes[cls] for cls in rare),
        last_large=last,
        chance=comb(last, len(large)) / comb(len(classes), len(large)),
        animals=_animals(classes, large),
        names={cls: words[cls] for cls in found.large if cls in words},
    )


def _animals(classes: Sequence[str], large: set[str]) -> Animals | None:
    if not all(_WNID.fullmatch(cls) for cls in classes):
        return None
    of = {cls for cls in classes if int(cls[1:]) in _ANIMALS}
    both = len(of & large)
    return Animals(both, len(of) - both, float(hypergeom.sf(both - 1, len(classes), len(of), len(large))))


def _overlap(one: tuple[Path, Listed], two: tuple[Path, Listed], biggest: int) -> Overlap:
    (first, a), (second, b) = one, two
    shared, images = set(a.classes) & set(b.classes), set(a.images) & set(b.images)
    rare = shared - set(a.large) - set(b.large)
    n, m = _sizes(a), _sizes(b)
    return Overlap(
        first=first.name,
        second=second.name,
        classes=len(shared),
        large=len(set(a.large) & set(b.large)),
        rare=len(rare),
        images=len(images),
        rare_images=sum(cls in rare for cls, _ in images),
        expected=sum(n[cls] * m[cls] for cls in rare) / biggest,
    )


# --- commands ---------------------------------------------------------------------------------------------------------

_SIZES = """\
largest, median, smallest: training images of a class; imbalance: largest over smallest; Gini: of the class sizes, 0 where all are
equal; many, medium, few: classes with more than 100, with 20 to 100 and with fewer than 20 images.
"""
_LEGEND = """\
last large: place of the last large class among the sorted class names; chance: probability that as many classes drawn at
random all lie among the names up to it. Where these are WordNet ids, animals among the large and the rare classes are counted;
the chance beside them is of so many large animals or more. A low chance means that rare classes differ from large ones in more
than size."""


def audit(paths: Sequence[Path], words: Path | None, *, as_json: bool) -> AuditReport:
    """Print the class sizes of each set; for the authors' lists also the overlap of each pair and the confounders of class size.

    Returns:
        the values that were printed.

    Raises:
        DataError: a file is missing or is not a set of images.
    """
    report = inspect(find_sets(paths), read_words(words) if words else None)
    if as_json:
        sys.stdout.write(json.dumps(asdict(report), indent=1, sort_keys=True, allow_nan=False) + "\n")
        return report
    out = Console(file=sys.stdout, highlight=False)
    rows = []
    for one in report.sets:
        counts = [one.images, one.classes, one.largest, f"{one.median:g}", one.smallest, f"{one.imbalance:.4g}"]
        rows.append([one.name, *counts, f"{one.gini:.3f}", *one.shots.values()])
    heads = ["set", "images", "classes", "largest", "median", "smallest", "imbalance", "Gini", *SHOTS]
    show_table(out, heads, rows)
    sys.stdout.write(_SIZES)
    if report.lists:
        _show_lists(out, report)
    return report


def _show_lists(out: Console, report: AuditReport) -> None:
    rows = []
    for one in report.lists:
        counts = [one.images, one.classes, len(one.large), _span(one.large.values()), one.rare_classes, _span(one.rare)]
        animals = [one.animals.large, one.animals.rare, f"{one.animals.chance:.2g}"] if one.animals else ["-"] * 3
        rows.append([one.name, one.published or "no", *counts, one.last_large, f"{one.chance:.2g}", *animals])
    heads = ["list", "published as", "images", "classes", "large", "images of each", "rare", "images of each", "last large"]
    heads += ["chance", "animals, large", "animals, rare", "chance"]
    together = ["together", "", "", report.distinct_classes, report.distinct_large]
    show_table(out, heads, [*rows, [*together, *[""] * (len(heads) - len(together))]])
    sys.stdout.write(_LEGEND + "\n")
    if report.overlaps:
        heads = ["lists", "classes in both", "large", "rare", "images in both", "of classes rare in both", "expected by chance"]
        pairs = [(f"{o.first} {o.second}", *list(asdict(o).values())[2:7], f"{o.expected:.1f}") for o in report.overlaps]
        show_table(out, heads, pairs)
    if names := [[one.name, cls, name] for one in report.lists for cls, name in one.names.items()]:
        show_table(out, ["list", "large class", "name"], names, left=3)


def _span(values: Collection[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
