"""Subset rules: pure functions from the image list, the rule and its seed to the images of a subset.

Every draw has its own generator, seeded by (seed, purpose, class), and works on the sorted list. So the order in which a
file system lists images changes nothing, the rare images for a smaller n are a part of those for a larger n, and the search
set and the queries stay the same whatever `rare_images` is.

The unbalanced rule, the search set of all train images of the chosen classes and the balanced queries are the paper's
(unbalanced section); so are the ten lists D1 to D10.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from isd_repro.config import params
from isd_repro.data.manifests import Positions
from isd_repro.data.sources import Located
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, DataError

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
_Groups = dict[tuple[str, str], list[int]]


@dataclass(frozen=True, eq=False)
class Selection:
    """The images that a rule draws.

    Attributes:
        classes: sorted.
        large: sorted; empty where the rule makes no large classes.
        train: sorted positions in the image list, int64; likewise search and query.
        notes: warnings for the user.
    """

    classes: tuple[str, ...]
    large: tuple[str, ...]
    train: Positions
    search: Positions
    query: Positions
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuthorsList:
    """One of the authors' files.

    Attributes:
        classes: in the file's order.
        images: (class, file) in the file's order.
        large: the classes with more images than most classes have, sorted.
        sha256: of the file's bytes.
    """

    classes: tuple[str, ...]
    images: tuple[tuple[str, str], ...]
    large: tuple[str, ...]
    sha256: str


def select(images: Sequence[Located], subset: params.Subset, name: str) -> Selection:
    """Draw a subset.

    Args:
        images: all images of the source, in any order.
        subset: the rule, and the sizes of the search set and the queries.
        name: the subset's key, for messages.

    Raises:
        DataError: the images cannot satisfy the rule.
        ConfigError: the rule contradicts itself.
    """
    groups = _group(images)
    available = sorted({cls for _, cls in groups})
    rule, where = subset.rule, f"subset {name!r}"
    large: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if rule.name == "list":
        authors, notes = _open_list(rule)
        classes, large = tuple(sorted(authors.classes)), authors.large
        train = _find_listed(images, groups, authors, rule.list)
    elif isinstance(rule, params.Unbalanced | params.Halves):
        classes, large = (
            _unbalanced_classes(available, rule, where) if rule.name == "unbalanced" else _part(available, rule, where)
        )
        rare = [cls for cls in classes if cls not in large]
        if rule.per_class is None:
            train = [position for cls in large for position in groups["train", cls]]
            train += _draw(groups, "train", rare, rule.rare_images, rule.seed, "rare", where)
        else:
            train = _draw(groups, "train", classes, rule.per_class, rule.seed, "rare", where)
    else:
        classes = _classes(available, rule.classes, rule.seed, where)
        per_class = rule.per_class if rule.name == "balanced" else None
        train = _draw(groups, "train", classes, per_class, rule.seed, "train", where)
    seed = 0 if rule.name == "list" else rule.seed
    return Selection(
        classes=classes,
        large=large,
        train=_positions(train),
        search=_positions(_draw(groups, "train", classes, subset.search_per_class, seed, "search", where)),
        query=_positions(_draw(groups, "val", classes, subset.query_per_class, seed, "query", where)),
        notes=notes,
    )


def _group(images: Sequence[Located]) -> _Groups:
    """(split, class) -> positions, sorted by file name."""
    groups: _Groups = {}
    for position, image in enumerate(images):
        groups.setdefault((image.split, image.cls), []).append(position)
    for positions in groups.values():
        positions.sort(key=lambda position: images[position].file)
    return groups


def _positions(values: Sequence[int]) -> Positions:
    return np.array(sorted(values), dtype=np.int64)


# --- draws ------------------------------------------------------------------------------------------------------------


def _permutation(n: int, seed: int, *purpose: str) -> list[int]:
    """A permutation of range(n) that depends on nothing but its arguments."""
    digest = hashlib.sha256("/".join((str(seed), *purpose)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return [int(value) for value in torch.randperm(n, generator=generator)]


def rare_order(images: int, seed: int, cls: str) -> list[int]:
    """The order in which a rare class's images, sorted by file name, are drawn: the first n are trained on."""
    return _permutation(images, seed, "rare", cls)


def _draw(
    groups: _Groups, split: str, classes: Sequence[str], per_class: int | None, seed: int, purpose: str, where: str
) -> list[int]:
    """`per_class` images of each class, or all of them; a smaller draw is a part of a larger one."""
    drawn: list[int] = []
    for cls in classes:
        members = groups.get((split, cls), [])
        if per_class is None:
            drawn += members
            continue
        if len(members) < per_class:
            found = f"class {cls} has {len(members)} {split} images, but {per_class} {purpose} images are needed"
            raise DataError(f"{where}: {found}", "ask for fewer images per class, or choose other classes")
        drawn += [members[at] for at in _permutation(len(members), seed, purpose, cls)[:per_class]]
    return drawn


def _classes(available: Sequence[str], wanted: int | None, seed: int, where: str) -> tuple[str, ...]:
    """`wanted` classes, sorted; all of them where none is named."""
    if wanted is None:
        return tuple(available)
    if wanted > len(available):
        raise DataError(f"{where}: the rule needs {wanted} classes, but the source has {len(available)}", "lower `classes`")
    return tuple(sorted(available[at] for at in _permutation(len(available), seed, "classes")[:wanted]))


def _unbalanced_classes(available: Sequence[str], rule: params.Unbalanced, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Chosen classes and the large ones among them, both sorted."""
    named = rule.large_classes
    if named is None:
        classes = _classes(available, rule.classes, rule.seed, where)
        if rule.large < len(classes):
            order = _permutation(len(classes), rule.seed, "large")
            return classes, tuple(sorted(classes[at] for at in order[: rule.large]))
        raise DataError(f"{where}: {rule.large} large classes of {len(classes)} leave no rare one", "lower `large`")
    if len(set(named)) != rule.large:
        found = f"large_classes names {len(set(named))} different classes, large is {rule.large}"
        raise ConfigError(f"{where}: {found}", "make the two numbers equal")
    for cls in named:
        if cls not in available:
            close = difflib.get_close_matches(cls, available, n=1)
            nearest = f"did you mean {close[0]!r}?" if close else f"the first are {', '.join(available[:5])}"
            raise DataError(f"{where}: large class {cls!r} is not among the source's {len(available)} classes", nearest)
    wanted = len(available) if rule.classes is None else rule.classes
    if wanted <= rule.large:
        raise DataError(f"{where}: {rule.large} large classes of {wanted} leave no rare one", "lower `large`")
    if wanted > len(available):
        raise DataError(f"{where}: the rule needs {wanted} classes, but the source has {len(available)}", "lower `classes`")
    others = [cls for cls in available if cls not in named]
    drawn = [others[at] for at in _permutation(len(others), rule.seed, "classes")[: wanted - rule.large]]
    return tuple(sorted((*named, *drawn))), tuple(sorted(named))


def _part(available: Sequence[str], rule: params.Halves, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes of one part and the large ones among them, both sorted."""
    order = [available[at] for at in _permutation(len(available), rule.seed, "tuning")]
    classes, rest = sorted(order[: rule.tuning]), sorted(order[rule.tuning :])
    if rule.part != "tuning":
        shuffled = [rest[at] for at in _permutation(len(rest), rule.seed, "halving", str(rule.halving))]
        half = len(rest) // 2  # an odd one out is in neither
        classes = sorted(shuffled[:half] if rule.part == "first" else shuffled[half : 2 * half])
    if rule.large >= len(classes):
        found = f"{rule.large} large classes of {len(classes)} in part {rule.part!r} of {len(available)} leave no rare one"
        raise DataError(f"{where}: {found}", "lower `large` or change `tuning`")
    if rule.large_by == "draw":
        drawn = _permutation(len(classes), rule.seed, "large", rule.part, str(rule.halving))
        return tuple(classes), tuple(sorted(classes[at] for at in drawn[: rule.large]))
    return tuple(classes), tuple(classes[: rule.large])


# --- the authors' lists -----------------------------------------------------------------------------------------------


def parse_list(path: Path) -> AuthorsList:
    """Read a list in the authors' format: `class names : `, one class a line, `Train Images: `, one /train/<class>/<file> a line.

    Raises:
        DataError: a line is not what the format has there.
    """
    content = path.read_bytes()
    lines = content.decode("utf-8", errors="replace").splitlines()
    hint = f"the published lists are in {LISTS_ORIGIN}"
    if not lines or lines[0].strip() != "class names :":
        raise DataError(f"{path}:1: expected 'class names : ', found {lines[0] if lines else 'an empty file'!r}", hint)
    heads = [number for number, line in enumerate(lines) if line.strip() == "Train Images:"]
    if not heads:
        raise DataError(f"{path}: contains no line 'Train Images: '", hint)
    classes = tuple(line.strip() for line in lines[1 : heads[0]])
    images: list[tuple[str, str]] = []
    known = set(classes)
    for number, line in enumerate(lines[heads[0] + 1 :], start=heads[0] + 2):
        parts = line.strip().split("/")
        if len(parts) != 4 or parts[:2] != ["", "train"] or parts[2] not in known or not parts[3]:
            raise DataError(f"{path}:{number}: expected /train/<one of its classes>/<file>, found {line!r}", hint)
        images.append((parts[2], parts[3]))
    counts = Counter(cls for cls, _ in images)
    if len(known) != len(classes) or len(set(images)) != len(images) or set(counts) != known:
        raise DataError(f"{path}: names a class or an image twice, or a class without images", hint)
    usual = min(Counter(counts.values()).items(), key=lambda item: (-item[1], item[0]))[0]
    large = tuple(sorted(cls for cls, count in counts.items() if count > usual))
    return AuthorsList(classes, tuple(images), large, hashlib.sha256(content).hexdigest())


def _open_list(rule: params.ListFile) -> tuple[AuthorsList, tuple[str, ...]]:
    """The list that a rule names, and a warning where it is not the published one."""
    hint = f"set {rule.root_env} to a folder with {rule.list}.txt; the published lists are in {LISTS_ORIGIN}"
    path = files.named_path(rule.root_env, hint) / f"{rule.list}.txt"
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint)
    authors = parse_list(path)
    if authors.sha256 == LIST_SHA256[rule.list]:
        return authors, ()
    return authors, (f"{path}: not the published {rule.list} (sha256 {authors.sha256}, published {LIST_SHA256[rule.list]})",)


def _find_listed(images: Sequence[Located], groups: _Groups, authors: AuthorsList, name: str) -> list[int]:
    """Positions of the listed images; `DataError` where the source lacks some."""
    hint = "the lists name images of ImageNet's train folder; point the source at that folder"
    absent = sorted(cls for cls in authors.classes if ("train", cls) not in groups)
    if absent:
        found = f"{len(absent)} of its {len(authors.classes)} classes are not in the source; the first is {absent[0]}"
        raise DataError(f"list {name}: {found}", hint)
    position = {(cls, images[at].file): at for cls in authors.classes for at in groups["train", cls]}
    missing = [image for image in authors.images if image not in position]
    if missing:
        first = ", ".join("/".join(image) for image in missing[:3])
        found = f"{len(missing)} of its {len(authors.images)} images are not in the source; the first is {first}"
        raise DataError(f"list {name}: {found}", hint)
    return [position[image] for image in authors.images]
