"""Manifests, which list a subset's images and their roles, and the prepared subset that later stages read.

A manifest consists of two files: `images.tsv` with one row per image (split, class, file, sha256 of its bytes, roles), and
`manifest.json`, a small header. Neither contains a path, a time or a machine, so equal images and roles give equal bytes,
whatever the folder layout from which they were read.

The folder of a prepared subset holds both files and the store. An external store is under the folder that the environment
variable ISD_PACK_ROOT names, in a subfolder named after the manifest's hash and the store's settings; it is found through the
variable whenever the subset is opened, so no file contains its path.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from isd_repro.config.fields import Frozen
from isd_repro.data.store import Store, StoreInfo
from isd_repro.records import MAX_SHARED, Labels, ManifestIdentity, Mask, Shot, query_groups
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import write_atomic

HEADER = "manifest.json"
IMAGES = "images.tsv"
COLUMNS = ("split", "class", "file", "sha256", "roles")
UNLABELLED = "unlabelled"  # split of images that have no class and can only be trained on
PACK_ROOT = "ISD_PACK_ROOT"
ROLES = {"t": "train", "s": "search", "q": "query"}
_OF_SPLIT = {"train": "ts", UNLABELLED: "t", "val": "q"}  # roles that an image of a split may have
_AGAIN = "run `prepare` for this subset again"
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Named:
    """The name of an image, which is the same in every layout."""

    split: str  # "train", "val" or "unlabelled"
    cls: str  # "" where the split is "unlabelled"
    file: str  # base name

    @property
    def key(self) -> tuple[str, str, str]:
        """The key by which images are sorted and found."""
        return self.split, self.cls, self.file


@dataclass(frozen=True, slots=True)
class Image(Named):
    """One image of a source."""

    sha256: str  # of the file's bytes, or of the raw pixels where the source has no files


@dataclass(frozen=True, eq=False)
class Manifest:
    """An ordered image list and its roles.

    Attributes:
        dataset: the data set's public name.
        subset: the subset's key in params.yaml.
        rule: how the subset was drawn.
        classes: sorted; a label is a position in it.
        large: the classes kept in full by an unbalanced rule; empty where the subset is balanced.
        images: sorted by (split, class, file), none twice.
        train: sorted positions in `images` of the images for pretraining, int64.
        search: sorted positions of the labelled train images in which evaluation searches, int64.
        query: sorted positions of the validation images that evaluation classifies, int64.
        shots: classes with `many`, `medium` and `few` training images; empty if the subset states no thresholds.
    """

    dataset: str
    subset: str
    rule: dict[str, Any]
    classes: tuple[str, ...]
    large: tuple[str, ...]
    images: tuple[Image, ...]
    train: Positions
    search: Positions
    query: Positions
    shots: Mapping[Shot, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def labels(self) -> Positions:
        """Class of every image, as a position in `classes`, and -1 of images without a label; int64, N."""
        position = {name: label for label, name in enumerate(self.classes)} | {"": -1}
        return np.fromiter((position[image.cls] for image in self.images), dtype=np.int64, count=len(self.images))

    @cached_property
    def sha256(self) -> str:
        """Sha256 over (split, class, file, sha256, roles) of every image in order, the large classes, and the groups `shots`."""
        digest = hashlib.sha256()
        for row in rows(self):
            digest.update(row.encode())
        for name in sorted(self.large):
            digest.update(f"large\t{name}\n".encode())
        for group in sorted(self.shots):
            for name in self.shots[group]:
                digest.update(f"{group}\t{name}\n".encode())
        return digest.hexdigest()

    @cached_property
    def shared(self) -> int:
        """How many queries have the bytes of a training or search image, whatever their names are."""
        learnt = {self.images[at].sha256 for at in (*self.train.tolist(), *self.search.tolist())}
        return sum(self.images[at].sha256 in learnt for at in self.query.tolist())

    def identity(self) -> ManifestIdentity:
        """The manifest as records state it."""
        return ManifestIdentity(
            sha256=self.sha256,
            dataset=self.dataset,
            subset=self.subset,
            rule=self.rule,
            classes=self.classes,
            large=self.large,
            shots=dict(self.shots),
            train=len(self.train),
            search=len(self.search),
            query=len(self.query),
            shared=self.shared,
        )


def check_shared(shared: int, queries: int, *, place: str, allow: str, allowed: bool) -> str:
    """A note on queries that are copies of training or search images; "" if there are none.

    Args:
        shared: number of queries that are copies.
        queries: number of all queries.
        place: the images, for the message.
        allow: what the user can do to allow the copies, for the message.
        allowed: whether the copies are allowed.

    Raises:
        DataError: the share of copies is above MAX_SHARED, and this is not allowed.
    """
    if not shared:
        return ""
    found = f"{shared} of {queries} queries ({shared / queries:.1%}) have the bytes of a training or search image"
    if shared > MAX_SHARED * queries and not allowed:
        raise DataError(f"{place}: {found}, more than {MAX_SHARED:.0%}", f"remove the copies, or allow them: {allow}")
    return found


class Header(Frozen):
    """The content of `manifest.json`."""

    format: Literal[1] = 1
    kind: Literal["manifest"] = "manifest"
    identity: ManifestIdentity
    images: int
    dropped: tuple[str, ...] = ()  # unreadable images that were left out, as split/class/file
    store: StoreInfo | None = None


def rows(manifest: Manifest) -> Iterator[str]:
    """The body of `images.tsv`, one line per image."""
    roles = [""] * len(manifest.images)
    for letter, name in ROLES.items():
        for at in getattr(manifest, name).tolist():
            roles[at] += letter
    for image, text in zip(manifest.images, roles, strict=True):
        yield f"{image.split}\t{image.cls}\t{image.file}\t{image.sha256}\t{text}\n"


def write(folder: Path, manifest: Manifest, *, store: StoreInfo | None = None, dropped: Iterable[str] = ()) -> None:
    """Write `images.tsv`, then `manifest.json`, each of them atomically."""
    # Shared images are counted whenever the rows are read, so that equal images stay equal bytes for every version.
    identity = manifest.identity().model_copy(update={"shared": None})
    header = Header(identity=identity, images=len(manifest.images), dropped=tuple(dropped), store=store)
    write_atomic(folder / IMAGES, ("\t".join(COLUMNS) + "\n" + "".join(rows(manifest))).encode())
    text = json.dumps(header.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(folder / HEADER, text.encode() + b"\n")


def read_header(folder: Path) -> Header:
    """Read only `manifest.json`; `DataError` if it is missing or not a manifest's header."""
    path = folder / HEADER
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run `prepare` for this subset; `dvc repro` runs every stage that is needed")
    try:
        return Header.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: not a manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}", _AGAIN) from error


def read(folder: Path) -> Manifest:
    """Read what `write` wrote.

    Raises:
        DataError: a file is missing or damaged, or the images are not those that the header's hash names.
    """
    header = read_header(folder)
    path = folder / IMAGES
    images, roles = _parse(path)
    positions = {name: np.flatnonzero([letter in text for text in roles]) for letter, name in ROLES.items()}
    claimed = header.identity
    classes = {image.cls for image in images if image.split != UNLABELLED}
    groups = {*claimed.large, *itertools.chain(*claimed.shots.values())}
    if tuple(sorted(classes)) != claimed.classes or not groups <= classes:
        raise DataError(f"{path}: its classes are not those of {HEADER}", _AGAIN)
    manifest = Manifest(
        dataset=claimed.dataset,
        subset=claimed.subset,
        rule=claimed.rule,
        classes=claimed.classes,
        large=claimed.large,
        images=tuple(images),
        **positions,
        shots=dict(claimed.shots),
    )
    packed = None if header.store is None else header.store.settings.model_dump(mode="json", exclude={"external"})
    if packed != claimed.rule.get("store", packed):
        raise DataError(f"{folder / HEADER}: the rule and the store have different settings", _AGAIN)
    if manifest.identity() != claimed or len(images) != header.images:
        raise DataError(f"{path}: sha256 of its rows is {manifest.sha256}, {HEADER} says {claimed.sha256}", _AGAIN)
    return manifest


def _parse(path: Path) -> tuple[list[Image], list[str]]:
    """Rows of `images.tsv` and the roles of each; `DataError` names the first line that is wrong."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", _AGAIN)
    images: list[Image] = []
    roles: list[str] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                cells = line.removesuffix("\n").split("\t")
                if number == 1 and tuple(cells) == COLUMNS:
                    continue
                if number == 1 or len(cells) != len(COLUMNS) or cells[0] not in _OF_SPLIT or not cells[4]:
                    found = f"{path}:{number}: expected {', '.join(COLUMNS)}, found {line.rstrip()!r}"
                    raise DataError(found, _AGAIN)
                if not set(cells[4]) <= set(_OF_SPLIT[cells[0]]):
                    found = f"an image of {cells[0]} has the roles {cells[4]!r}, expected some of {_OF_SPLIT[cells[0]]!r}"
                    raise DataError(f"{path}:{number}: {found}", _AGAIN)
                images.append(Image(sys.intern(cells[0]), sys.intern(cells[1]), cells[2], cells[3]))
                roles.append(sys.intern(cells[4]))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})", _AGAIN) from error
    return images, roles


# --- prepared subsets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Images of one role."""

    index: Tensor  # positions in the store, int64, n, ascending
    label: Tensor  # class of each, a position in the manifest's classes, or -1 of an image without a label; int64, n

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared subset in the form in which later stages read it."""

    manifest: Manifest
    store: Store

    @cached_property
    def identity(self) -> ManifestIdentity:
        """The manifest as records state it."""
        return self.manifest.identity()

    def split(self, name: Literal["train", "search", "query"]) -> Split:
        """The images of one role, in manifest order."""
        positions: Positions = getattr(self.manifest, name)
        return Split(index=torch.from_numpy(positions.copy()), label=torch.from_numpy(self.manifest.labels[positions]))

    def groups(self, label: Labels) -> dict[str, Mask]:
        """Masks over labelled images by group, see `query_groups`."""
        return query_groups(label, self.identity)


def open_prepared(
    folder: Path, memory: Path | None = None, workers: int | None = None, manifest: Manifest | None = None
) -> Prepared:
    """Open a prepared subset and check the hash of each of its files.

    Args:
        folder: the folder that `prepare` wrote.
        memory: a folder that keeps the store's hash for the next process, see `remembered_sha256`.
        workers: threads that decode a store of JPEGs, see `Store`.
        manifest: the manifest, if it has been read already.

    Raises:
        DataError: a file is missing or damaged, or ISD_PACK_ROOT is not set for an external store.
    """
    header = read_header(folder)
    if header.store is None:
        raise DataError(f"{folder / HEADER}: does not name a store", _AGAIN)
    manifest = manifest or read(folder)
    store = Store(store_folder(folder, manifest, header.store), header.store, workers)
    if len(store) != len(manifest.images):
        found = f"the store has {len(store)} images, the manifest {len(manifest.images)}"
        raise DataError(f"{folder}: {found}", _AGAIN)
    store.verify(memory)
    return Prepared(manifest=manifest, store=store)


def store_folder(folder: Path, manifest: Manifest, info: StoreInfo) -> Path:
    """The folder of a prepared subset's store."""
    return pack_root() / info.key(manifest.sha256) if info.settings.external else folder


def pack_root() -> Path:
    """The folder of external stores; `DataError` if ISD_PACK_ROOT is not set."""
    return files.named_path(
        PACK_ROOT, "the store of this subset is external: set it to a folder with enough space for packed images"
    )
