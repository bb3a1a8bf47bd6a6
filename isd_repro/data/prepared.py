"""A prepared subset: its manifest and its packed images, as the stages after `prepare` read them.

A folder holds `manifest.json`, `images.tsv` and the store. An external store lies under the folder that the environment
variable ISD_PACK_ROOT names, in a sub-folder named after the manifest's hash and the store's settings; it is located
through the variable whenever the subset is opened, so no file holds its path.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from isd_repro.data import manifests
from isd_repro.data.manifests import Manifest
from isd_repro.data.store import Store, StoreInfo
from isd_repro.records import ManifestIdentity
from isd_repro.runtime.errors import DataError

PACK_ROOT = "ISD_PACK_ROOT"


@dataclass(frozen=True)
class Split:
    """Images of one role.

    Attributes:
        index: positions in the store, int64, n, ascending.
        label: class of each, a position in the manifest's classes, int64, n.
    """

    index: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the stages after `prepare` read."""

    manifest: Manifest
    store: Store

    @cached_property
    def identity(self) -> ManifestIdentity:
        """What records say of the manifest."""
        return self.manifest.identity()

    def split(self, name: Literal["train", "search", "query"]) -> Split:
        """The images of one role, in manifest order."""
        positions = {"train": self.manifest.train, "search": self.manifest.search, "query": self.manifest.query}[name]
        return Split(index=torch.from_numpy(positions.copy()), label=torch.from_numpy(self.manifest.labels[positions]))

    def groups(self, label: Tensor) -> dict[str, Tensor]:
        """Masks over labelled images: `all`, and `rare` and `large` where the subset is unbalanced.

        Args:
            label: classes, int64, n.

        Returns:
            boolean masks, n each.
        """
        groups = {"all": torch.ones_like(label, dtype=torch.bool)}
        if self.manifest.large:
            large = torch.tensor([self.manifest.classes.index(name) for name in self.manifest.large])
            groups["large"] = torch.isin(label, large.to(label.device))
            groups["rare"] = ~groups["large"]
            return {name: groups[name] for name in ("all", "rare", "large")}
        return groups


def open_prepared(folder: Path, memory: Path | None = None, workers: int | None = None) -> Prepared:
    """Open a prepared subset, checking the hash of every file of it.

    Args:
        folder: what `prepare` wrote.
        memory: a folder that keeps the store's hash for the next process, see `remembered_sha256`.
        workers: threads that decode a store of JPEGs, see `Store`.

    Raises:
        DataError: something is missing or damaged, or ISD_PACK_ROOT is not set for an external store.
    """
    header = manifests.read_header(folder)
    if header.store is None:
        raise DataError(f"{folder / manifests.HEADER}: names no store", "run `prepare` for this subset again")
    manifest = manifests.read(folder)
    store = Store(store_folder(folder, manifest, header.store), header.store, workers)
    if len(store) != len(manifest.images):
        found = f"the store has {len(store)} images, the manifest {len(manifest.images)}"
        raise DataError(f"{folder}: {found}", "run `prepare` for this subset again")
    store.verify(memory)
    return Prepared(manifest=manifest, store=store)


def store_folder(folder: Path, manifest: Manifest, info: StoreInfo) -> Path:
    """Where the store of a prepared subset lies."""
    return pack_root() / info.key(manifest.sha256) if info.settings.external else folder


def pack_root() -> Path:
    """The folder of external stores; `DataError` where ISD_PACK_ROOT is not set."""
    root = os.environ.get(PACK_ROOT, "")
    if not root:
        hint = f"set {PACK_ROOT} to a folder with room for packed images"
        raise DataError(f"{PACK_ROOT} is not set and this subset's store is external", hint)
    return Path(root)
