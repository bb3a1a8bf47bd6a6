"""Subset rules: pure functions from the image list, the rule and its seed to the images of a subset.

Every draw has its own generator, seeded by (seed, purpose, class), and works on the sorted list. The order in which a file system
lists images therefore does not matter, the images of a class in a smaller draw are a subset of those in a larger one, and the
search set and the queries do not depend on the training images.

The unbalanced rule, the search set of all train images of the chosen classes and the balanced queries are the paper's
(unbalanced section), and so are the ten lists D1 to D10. Each rule is one function below, registered in `_RULES`.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isd_repro.config import params
from isd_repro.data.lists import LIST_SHA256, LISTS_ORIGIN, parse_labelled, parse_list, read_classes
from isd_repro.data.manifests import UNLABELLED, Positions
from isd_repro.data.sources import Located
from isd_repro.records import Shot
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError

_Groups = dict[tuple[str, str], list[int]]


@dataclass(frozen=True, eq=False)
class Selection:
    """The images that a rule draws.

    Attributes:
        classes: sorted.
        large: sorted; empty if the rule has no large classes.
        train: sorted positions in the image list, int64; likewise `search` and `query`.
        shots: classes with `many`, `medium` and `few` training images, each sorted; empty if there are no thresholds.
        notes: warnings for the user.
    """

    classes: tuple[str, ...]
    large: tuple[str, ...]
    train: Positions
    search: Positions
    query: Positions
    shots: Mapping[Shot, tuple[str, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pool:
    """The images that a rule draws from."""

    images: Sequence[Located]
    groups: _Groups  # (split, class) -> positions, sorted by file name
    classes: tuple[str, ...]  # sorted
    where: str  # the subset, for messages


@dataclass(frozen=True)
class _Drawn:
    """The result of a rule: classes, positions of the training images, large classes, warnings."""

    classes: tuple[str, ...]
    train: list[int]
    large: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def select(images: Sequence[Located], subset: params.Subset, name: str) -> Selection:
    """Draw a subset.

    Args:
        images: all images of the source, in any order.
        subset: the rule, and the sizes of the search set and the queries.
        name: the subset's key, for messages.

    Raises:
        DataError: the images cannot satisfy the rule.
    """
    groups = _group(images)
    where = f"subset {name!r}"
    pool = _Pool(images, groups, tuple(sorted({cls for split, cls in groups if split != UNLABELLED})), where)
    drawn = _RULES[subset.rule.name](pool, subset.rule)
    unlabelled = groups.get((UNLABELLED, ""), [])
    if subset.unlabelled and not unlabelled:
        raise DataError(f"{where}: the source has no images without labels", "remove `unlabelled`; STL-10 has such images")
    seed = getattr(subset.rule, "seed", 0)  # rules without a draw of their own have none
    return Selection(
        classes=drawn.classes,
        large=drawn.large,
        train=_positions([*drawn.train, *(unlabelled if subset.unlabelled else ())]),
        search=_positions(_draw(pool, "train", drawn.classes, subset.search_per_class, seed, "search")),
        query=_positions(_draw(pool, "val", drawn.classes, subset.query_per_class, seed, "query")),
        shots=group_by_size(Counter(images[at].cls for at in drawn.train), subset.shots),
        notes=drawn.notes,
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


def group_by_size(sizes: Mapping[str, int], thresholds: params.Shots | None) -> dict[Shot, tuple[str, ...]]:
    """Group classes by their number of training images, as ImageNet-LT does."""
    if thresholds is None:
        return {}
    many = [cls for cls, size in sizes.items() if size > thresholds.many_above]
    few = [cls for cls, size in sizes.items() if size < thresholds.few_below]
    return {"many": tuple(sorted(many)), "medium": tuple(sorted(sizes.keys() - {*many, *few})), "few": tuple(sorted(few))}


# --- rules ------------------------------------------------------------------------------------------------------------


def _whole(pool: _Pool, rule: params.AllClasses | params.Balanced) -> _Drawn:
    """All images of the chosen classes, or the same number of each."""
    classes = _chosen(pool, rule.classes, rule.seed)
    per_class = rule.per_class if isinstance(rule, params.Balanced) else None
    return _Drawn(classes, _draw(pool, "train", classes, per_class, rule.seed, "train"))


def _large_and_rare(pool: _Pool, rule: params.Unbalanced | params.Halves) -> _Drawn:
    """All images of the large classes and a few of each other class; or, for the balanced control, equally many of each class."""
    classes, large = _part(pool, rule) if isinstance(rule, params.Halves) else _unbalanced_classes(pool, rule)
    rare = [cls for cls in classes if cls not in large]
    if not rare:
        part = f" in part {rule.part!r} of {len(pool.classes)}" if isinstance(rule, params.Halves) else ""
        found = f"{pool.where}: {rule.large} large classes of {len(classes)}{part} leave no rare one"
        raise DataError(found, "lower `large`, or take more classes")
    if rule.per_class is not None:
        return _Drawn(classes, _draw(pool, "train", classes, rule.per_class, rule.seed, "rare"), large)
    train = [position for cls in large for position in pool.groups["train", cls]]
    return _Drawn(classes, train + _draw(pool, "train", rare, rule.rare_images, rule.seed, "rare"), large)


def _list(pool: _Pool, rule: params.ListFile) -> _Drawn:
    """One of the authors' lists, with a warning if it is not the published one."""
    hint = f"set {rule.root_env} to a folder with {rule.listed}; the published lists are in {LISTS_ORIGIN}"
    path = _listed_file(rule.root_env, rule.listed, hint)
    authors = parse_list(path)
    notes: tuple[str, ...] = ()
    published = LIST_SHA256[rule.list]
    if authors.sha256 != published:
        notes = (f"{path}: not the published {rule.list} (sha256 {authors.sha256}, expected {published})",)
    return _Drawn(tuple(sorted(authors.classes)), _find_listed(pool, authors.images, f"list {rule.list}"), authors.large, notes)


def _file(pool: _Pool, rule: params.ImageList) -> _Drawn:
    """A list of `class/file label` lines."""
    path = _listed_file(rule.root_env, rule.path)
    found = parse_labelled(path)
    notes = _same_file(path, found.sha256, rule.sha256)
    classes = tuple(sorted({cls for cls, _ in found.images}))
    return _Drawn(classes, _find_listed(pool, found.images, f"list {rule.path}"), notes=notes)


def _classes(pool: _Pool, rule: params.NamedClasses) -> _Drawn:
    """Classes named in the parameters or in a file."""
    named: tuple[str, ...] = rule.classes or ()
    notes: tuple[str, ...] = ()
    if rule.file is not None:
        path = _listed_file(rule.root_env, rule.file)
        named, sha256 = read_classes(path, pool.classes)
        notes = _same_file(path, sha256, rule.sha256)
    classes = _named(pool, named)
    return _Drawn(classes, _draw(pool, "train", classes, rule.per_class, rule.seed, "train"), notes=notes)


def _exponential(pool: _Pool, rule: params.Exponential) -> _Drawn:
    classes = _chosen(pool, rule.classes, rule.seed)
    most = rule.max_per_class or min(len(pool.groups.get(("train", cls), ())) for cls in classes)
    return _sized(pool, rule, classes, exponential_sizes(len(classes), most, rule.imbalance))


def _pareto(pool: _Pool, rule: params.Pareto) -> _Drawn:
    classes = _chosen(pool, rule.classes, rule.seed)
    return _sized(pool, rule, classes, pareto_sizes(len(classes), rule.max_per_class, rule.min_per_class, rule.alpha))


_RULES: dict[str, Callable[[_Pool, Any], _Drawn]] = {
    "all": _whole,
    "balanced": _whole,
    "unbalanced": _large_and_rare,
    "halves": _large_and_rare,
    "list": _list,
    "file": _file,
    "classes": _classes,
    "exponential": _exponential,
    "pareto": _pareto,
}


# --- class sizes of long-tailed sets ----------------------------------------------------------------------------------


def exponential_sizes(classes: int, most: int, imbalance: float) -> list[int]:
    """Class sizes, largest first: most * imbalance ** -(i / (classes - 1)) for i = 0, 1, ..., rounded down, at least 1.

    Source: CIFAR-LT of Cao et al. (NeurIPS 2019), repository kaidic/LDAM-DRW.
    """
    last = max(classes - 1, 1)
    return [max(1, int(most * imbalance ** -(rank / last) + 1e-9)) for rank in range(classes)]  # 1e-9: 50 may be 49.999...


def pareto_sizes(classes: int, most: int, fewest: int, alpha: float) -> list[int]:
    """Class sizes, largest first: quantiles of a Pareto distribution, scaled to lie between `fewest` and `most`.

    The class of rank i of C, counted from 1, is at the quantile (C / i) ** (1 / alpha) - 1. ImageNet-LT (Liu et al., CVPR 2019)
    states alpha = 6 and sizes from 1,280 to 5, and is one random sample of such sizes. The quantiles are the same in every draw,
    and the seed determines which class has which size. For ImageNet-LT itself use its published list.
    """
    quantiles = [(classes / rank) ** (1 / alpha) for rank in range(1, classes + 1)]
    span = quantiles[0] - quantiles[-1] or 1.0
    return [int(fewest + (most - fewest) * (one - quantiles[-1]) / span + 1e-9) for one in quantiles]


def _sized(pool: _Pool, rule: params.Exponential | params.Pareto, classes: tuple[str, ...], sizes: Sequence[int]) -> _Drawn:
    """Assign sizes, largest first, to the classes in the order of their names or in a random order.

    If the next class has fewer images than a size, the size goes to the first class after it that has enough, so that ImageNet's
    classes of 732 to 1,300 images can be used.
    """
    waiting = list(classes)
    if rule.order == "draw":
        waiting = [classes[at] for at in _permutation(len(classes), rule.seed, "order")]
    train: list[int] = []
    for size in sizes:
        cls = next((cls for cls in waiting if len(pool.groups.get(("train", cls), ())) >= size), None)
        if cls is None:
            found = f"a class needs {size} training images, and the {len(waiting)} that are left have fewer"
            raise DataError(f"{pool.where}: {found}", "lower `max_per_class` or choose fewer classes")
        waiting.remove(cls)
        train += _draw(pool, "train", [cls], size, rule.seed, "train")
    return _Drawn(classes, train)


# --- draws ------------------------------------------------------------------------------------------------------------


def _permutation(n: int, seed: int, *purpose: str) -> list[int]:
    """A permutation of range(n) that depends only on the arguments."""
    digest = hashlib.sha256("/".join((str(seed), *purpose)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return [int(value) for value in torch.randperm(n, generator=generator)]


def rare_order(images: int, seed: int, cls: str) -> list[int]:
    """The order in which the images of a rare class, sorted by file name, are drawn: the first n are the training images."""
    return _permutation(images, seed, "rare", cls)


def _draw(pool: _Pool, split: str, classes: Sequence[str], per_class: int | None, seed: int, purpose: str) -> list[int]:
    """`per_class` images of each class, or all of them; a smaller draw is a subset of a larger one."""
    drawn: list[int] = []
    for cls in classes:
        members = pool.groups.get((split, cls), [])
        if per_class is None:
            drawn += members
            continue
        if len(members) < per_class:
            found = f"class {cls} has {len(members)} {split} images, but {per_class} {purpose} images are needed"
            raise DataError(f"{pool.where}: {found}", "ask for fewer images per class, or choose other classes")
        drawn += [members[at] for at in _permutation(len(members), seed, purpose, cls)[:per_class]]
    return drawn


def _chosen(pool: _Pool, wanted: int | tuple[str, ...] | None, seed: int) -> tuple[str, ...]:
    """The named classes, or `wanted` classes drawn at random, or all classes if `wanted` is None; sorted."""
    if isinstance(wanted, tuple):
        return _named(pool, wanted)
    if wanted is None:
        return pool.classes
    _enough(pool, wanted)
    return tuple(sorted(pool.classes[at] for at in _permutation(len(pool.classes), seed, "classes")[:wanted]))


def _named(pool: _Pool, named: Sequence[str]) -> tuple[str, ...]:
    """These classes, sorted; `DataError` if the source lacks some of them."""
    if absent := sorted(set(named) - set(pool.classes)):
        found = f"{len(absent)} of the {len(named)} classes named are not in the source; the first is {absent[0]!r}"
        close = difflib.get_close_matches(absent[0], pool.classes, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the first of the source's classes are {', '.join(pool.classes[:5])}"
        raise DataError(f"{pool.where}: {found}", hint)
    return tuple(sorted(named))


def _enough(pool: _Pool, wanted: int) -> None:
    if wanted > len(pool.classes):
        found = f"{pool.where}: the rule needs {wanted} classes, but the source has {len(pool.classes)}"
        raise DataError(found, "lower `classes`")


def _unbalanced_classes(pool: _Pool, rule: params.Unbalanced) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The chosen classes and the large ones among them, both sorted."""
    if rule.large_classes is None:
        classes = _chosen(pool, rule.classes, rule.seed)
        order = _permutation(len(classes), rule.seed, "large")
        return classes, tuple(sorted(classes[at] for at in order[: rule.large]))
    large = _named(pool, rule.large_classes)
    wanted = len(pool.classes) if rule.classes is None else rule.classes
    _enough(pool, wanted)
    others = [cls for cls in pool.classes if cls not in large]
    drawn = [others[at] for at in _permutation(len(others), rule.seed, "classes")[: max(0, wanted - rule.large)]]
    return tuple(sorted((*large, *drawn))), large


def _part(pool: _Pool, rule: params.Halves) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of one part and the large ones among them, both sorted."""
    order = [pool.classes[at] for at in _permutation(len(pool.classes), rule.seed, "tuning")]
    classes, rest = sorted(order[: rule.tuning]), sorted(order[rule.tuning :])
    if rule.part != "tuning":
        shuffled = [rest[at] for at in _permutation(len(rest), rule.seed, "halving", str(rule.halving))]
        half = len(rest) // 2  # an odd one out is in neither
        classes = sorted(shuffled[:half] if rule.part == "first" else shuffled[half : 2 * half])
    if rule.large_by == "draw":
        drawn = _permutation(len(classes), rule.seed, "large", rule.part, str(rule.halving))
        return tuple(classes), tuple(sorted(classes[at] for at in drawn[: rule.large]))
    return tuple(classes), tuple(classes[: rule.large])


# --- lists ------------------------------------------------------------------------------------------------------------


def _listed_file(variable: str, name: str, hint: str = "") -> Path:
    """A file in the folder that an environment variable names; `DataError` if it does not exist."""
    hint = hint or f"set {variable} to the folder of the list {name}"
    path = files.named_path(variable, hint) / name
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint)
    return path


def _same_file(path: Path, sha256: str, expected: str | None) -> tuple[str, ...]:
    """A note with the hash of a file if none is expected; `DataError` if the file does not have the expected hash."""
    if expected is None:
        return (f"{path.name}: sha256 {sha256}; state it in the rule so that no other file is taken",)
    if sha256 != expected:
        found = f"{path}: not the file that the rule names (sha256 {sha256}, expected {expected})"
        raise DataError(found, "restore it or change `sha256`")
    return ()


def _find_listed(pool: _Pool, listed: Sequence[tuple[str, str]], name: str) -> list[int]:
    """Positions of the listed images, each (class, file); `DataError` if the source lacks some of them."""
    hint = "the lists name images of ImageNet's train folder; point the source at that folder"
    classes = {cls for cls, _ in listed}
    absent = sorted(cls for cls in classes if ("train", cls) not in pool.groups)
    if absent:
        found = f"{len(absent)} of its {len(classes)} classes are not in the source; the first is {absent[0]}"
        raise DataError(f"{name}: {found}", hint)
    position = {(cls, pool.images[at].file): at for cls in classes for at in pool.groups["train", cls]}
    missing = [image for image in listed if image not in position]
    if missing:
        first = ", ".join("/".join(image) for image in missing[:3])
        found = f"{len(missing)} of its {len(listed)} images are not in the source; the first is {first}"
        raise DataError(f"{name}: {found}", hint)
    return [position[image] for image in listed]
