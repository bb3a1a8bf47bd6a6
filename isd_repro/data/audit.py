"""Commands `data audit` and `data lists`: contents and confounds of lists of unbalanced subsets, and whether they are published.

Two confounds are looked for. The place of the large classes among the sorted class names: the chance that as many classes
drawn at random all lie among the first names. And, where names are WordNet ids, animals: WordNet 3.0 numbers its nouns by
topic, so that an id says whether it is one. The animal kingdom itself is n01313093; of ImageNet's 1,000 classes the 398 from
n01440764 to n02655020 are animals, and the next, n02666196, is the abacus.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from isd_repro.data.lists import LIST_SHA256, LISTS_ORIGIN, AuthorsList, parse_list
from isd_repro.runtime.errors import DataError

_WNID = re.compile(r"n\d{8}")
_ANIMALS = range(1_313_093, 2_666_196)


@dataclass(frozen=True)
class Animals:
    """Animals among the classes; `chance` is of so many or more among the large ones if these were drawn at random."""

    large: int
    rare: int
    chance: float


@dataclass(frozen=True)
class Audit:
    """The contents of one list.

    Attributes:
        name: of the file.
        sha256: of its bytes.
        published: the authors' name of these bytes, or None.
        classes, images: how many.
        large: images of each large class, by class in sorted order.
        rare: images of a rare class: fewest and most.
        rare_classes, rare_images: how many.
        last_large: place of the last large class among the sorted class names, counted from 1.
        chance: that as many classes drawn at random all lie among the first `last_large`.
        animals: None where a class is no WordNet id.
        names: of the large classes, where a file of words is given.
    """

    name: str
    sha256: str
    published: str | None
    classes: int
    images: int
    large: dict[str, int]
    rare: tuple[int, int]
    rare_classes: int
    rare_images: int
    last_large: int
    chance: float
    animals: Animals | None
    names: dict[str, str]


@dataclass(frozen=True)
class Overlap:
    """The overlap of two lists.

    Attributes:
        first, second: names of the files.
        classes: in both; large, rare: in that group in both.
        images: in both lists, of any class.
        rare_images: in both lists, of classes that are rare in both.
        expected: of such images, if each list had drawn its own: for each class n m / N, N being the largest class seen.
    """

    first: str
    second: str
    classes: int
    large: int
    rare: int
    images: int
    rare_images: int
    expected: float


@dataclass(frozen=True)
class Report:
    """All lists, every pair of them, and how many different classes they have together."""

    lists: tuple[Audit, ...]
    overlaps: tuple[Overlap, ...]
    distinct_classes: int
    distinct_large: int


def find_lists(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and of a folder those called *.txt, D2 before D10; `DataError` where there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.txt"), key=_natural)
            if not inside:
                raise DataError(f"{path}: contains no *.txt file", f"the published lists are in {LISTS_ORIGIN}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such list", f"the published lists are in {LISTS_ORIGIN}")
    return found


def inspect_lists(paths: Sequence[Path], words: Mapping[str, str] | None = None) -> Report:
    """What each list holds and what each two share.

    Args:
        paths: list files in the authors' format.
        words: names of classes.

    Raises:
        DataError: a file is no such list, or none of its classes is large.
    """
    read = {path: parse_list(path) for path in paths}
    lists = tuple(_audit(path, found, words or {}) for path, found in read.items())
    biggest = max(max(_sizes(found).values()) for found in read.values())
    pairs = itertools.combinations(read.items(), 2)
    return Report(
        lists=lists,
        overlaps=tuple(_overlap((one.name, a), (two.name, b), biggest) for (one, a), (two, b) in pairs),
        distinct_classes=len({cls for found in read.values() for cls in found.classes}),
        distinct_large=len({cls for found in read.values() for cls in found.large}),
    )


def read_words(path: Path) -> dict[str, str]:
    """Class -> name, from one `<class><tab><name>` a line as in Tiny-ImageNet's words.txt; `DataError` for another file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "Tiny-ImageNet ships a words.txt")
    found = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        cls, tab, name = line.partition("\t")
        if not tab:
            raise DataError(f"{path}:{number}: expected class, tab and name, found {line!r}", "Tiny-ImageNet ships a words.txt")
        found[cls] = name.strip()
    return found


def _natural(path: Path) -> tuple[str, int, str]:
    match = re.fullmatch(r"(\D*)(\d+)", path.stem)
    return (match[1], int(match[2]), "") if match else (path.stem, -1, "")


def _sizes(found: AuthorsList) -> Counter[str]:
    return Counter(cls for cls, _ in found.images)


def _audit(path: Path, found: AuthorsList, words: Mapping[str, str]) -> Audit:
    sizes = _sizes(found)
    classes, large = sorted(found.classes), set(found.large)
    rare = [cls for cls in classes if cls not in large]
    if not large:
        raise DataError(
            f"{path}: every class has {sizes[classes[0]]} images, so none is large",
            "expected a list of an unbalanced subset, with large and rare classes",
        )
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
    """Hypergeometric: of C classes with A animals, L are drawn."""
    if not all(_WNID.fullmatch(cls) for cls in classes):
        return None
    of = {cls for cls in classes if int(cls[1:]) in _ANIMALS}
    both = len(of & large)
    ways = sum(comb(len(of), k) * comb(len(classes) - len(of), len(large) - k) for k in range(both, len(large) + 1))
    return Animals(both, len(of) - both, ways / comb(len(classes), len(large)))


def _overlap(one: tuple[str, AuthorsList], two: tuple[str, AuthorsList], biggest: int) -> Overlap:
    (first, a), (second, b) = one, two
    shared = set(a.classes) & set(b.classes)
    rare = shared - set(a.large) - set(b.large)
    images = set(a.images) & set(b.images)
    n, m = _sizes(a), _sizes(b)
    return Overlap(
        first=first,
        second=second,
        classes=len(shared),
        large=len(set(a.large) & set(b.large)),
        rare=len(rare),
        images=len(images),
        rare_images=sum(cls in rare for cls, _ in images),
        expected=sum(n[cls] * m[cls] for cls in rare) / biggest,
    )


# --- commands ---------------------------------------------------------------------------------------------------------

_LEGEND = """\
last large: place of the last large class among the sorted class names; chance: probability that as many classes drawn at
random all lie among the names up to it. Where these are WordNet ids, animals among the large and the rare classes are counted;
the chance beside them is of so many large animals or more. A low chance means that rare classes differ from large ones in more
than size."""


def audit(paths: Sequence[Path], words: Path | None, *, as_json: bool) -> None:
    """Print the contents of the lists, the overlap of each pair, and what "large" and "rare" are confounded with.

    Raises:
        DataError: a file is missing or no list.
    """
    report = inspect_lists(find_lists(paths), read_words(words) if words else None)
    if as_json:
        sys.stdout.write(json.dumps(asdict(report), indent=1, sort_keys=True, allow_nan=False) + "\n")
        return
    heads = ["list", "published as", "images", "classes", "large", "images of each", "rare", "images of each", "last large"]
    heads += ["chance", "animals, large", "animals, rare", "chance"]
    rows = []
    for one in report.lists:
        counts = [one.images, one.classes, len(one.large), _span(one.large.values()), one.rare_classes, _span(one.rare)]
        animals = [one.animals.large, one.animals.rare, f"{one.animals.chance:.2g}"] if one.animals else ["-"] * 3
        rows.append([one.name, one.published or "no", *counts, one.last_large, f"{one.chance:.2g}", *animals])
    together = ["together", "", "", report.distinct_classes, report.distinct_large]
    _print_table(heads, [*rows, together + [""] * (len(heads) - len(together))])
    sys.stdout.write(_LEGEND + "\n")
    if report.overlaps:
        heads = ["lists", "classes in both", "large", "rare", "images in both", "of classes rare in both", "expected by chance"]
        pairs = [(f"{row.first} {row.second}", row) for row in report.overlaps]
        _print_table(
            heads,
            [[n, o.classes, o.large, o.rare, o.images, o.rare_images, f"{o.expected:.1f}"] for n, o in pairs],
        )
    names = [[one.name, cls, name] for one in report.lists for cls, name in one.names.items()]
    if names:
        _print_table(["list", "large class", "name"], names)


def lists(folder: Path) -> None:
    """Compare D1.txt to D10.txt of a folder with the published files and print the state of each.

    Raises:
        DataError: one is missing, or has other bytes than the published one.
    """
    out = Console(file=sys.stdout, highlight=False)
    wrong = []
    for name, expected in LIST_SHA256.items():
        path = folder / f"{name}.txt"
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        state = "published" if found == expected else "different" if found else "missing"
        wrong += [] if state == "published" else [f"{name}.txt {state}"]
        shown = f", sha256 {found}" if state == "different" else ""
        out.print(f"{name}.txt: {state}{shown}", markup=False, soft_wrap=True)
    if wrong:
        hint = f"the published lists are in {LISTS_ORIGIN} on GitHub; copy them unchanged"
        found = f"{len(wrong)} of {len(LIST_SHA256)} lists are not the published ones: {', '.join(wrong)}"
        raise DataError(f"{folder}: {found}", hint)


def _span(values: Collection[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """In a pipe nothing is cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, head in enumerate(heads):
        table.add_column(head, justify="left" if at == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    out = Console(file=sys.stdout, highlight=False)
    if not out.is_terminal:
        wide = out.options.update(width=10_000, max_width=10_000)
        out.width = max(out.width, Measurement.get(out, wide, table).maximum)
    out.print(table)
