"""Whether the images of each subset are those that its rule draws: drawn and hashed again, and compared with the store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from isd_repro.config.params import Subset
from isd_repro.data import manifests, sources, subsets
from isd_repro.data.manifests import HEADER, IMAGES, Manifest
from isd_repro.data.packing import name_of
from isd_repro.data.sources import Listing, Located, UnreadableError
from isd_repro.data.store import Store, convert
from isd_repro.data.subsets import Selection
from isd_repro.records import SHOTS, ManifestIdentity
from isd_repro.runtime.errors import UserError
from isd_repro.verify.claims import DRAW_AGAIN
from isd_repro.verify.findings import Answer, State, Unproved, Wrong

SAMPLE = 100_000  # images of a subset that are read again; of larger subsets so many are drawn at random
PACKED = 500  # images that are decoded and compared with the store
NEAR = 8  # levels of 255, on average, that JPEG and other versions of its decoder may be off; another image is further
_ROLES = ("train", "search", "query")


def draw_again(subset: Subset, identity: ManifestIdentity, record: Path, folder: Path, seen: list[Manifest]) -> Iterator[Answer]:
    """Rule, seed and source give these classes and images, and the store holds their pixels; `seen` gets the manifest."""
    try:
        with sources.open_source(subset.source) as listing:
            selection = subsets.select(listing.images, subset, identity.subset)
            lists = {"classes": (identity.classes, selection.classes), "large": (identity.large, selection.large)}
            lists |= {f"shots.{one}": (identity.shots.get(one, ()), selection.shots.get(one, ())) for one in SHOTS}
            for key, (ours, theirs) in lists.items():
                if ours != theirs:
                    truth = f"those of the draw, which differ in {', '.join(sorted(set(ours) ^ set(theirs))[:5])}"
                    yield Wrong(record, f"manifest.{key}", f"{len(ours)} classes", truth, DRAW_AGAIN)
            yield from _same_images(subset, identity, record, folder, (listing, selection), seen)
    except UnreadableError as error:
        yield Unproved(f"an image of the source cannot be read: {error}")
    except UserError as error:
        yield Unproved(f"the subset cannot be drawn again: {error.message}")


def _same_images(
    subset: Subset, identity: ManifestIdentity, record: Path, folder: Path, drawn: tuple[Listing, Selection], seen: list[Manifest]
) -> Iterator[Answer]:
    """The drawn images, with the hashes of the source's bytes, have the manifest's identity; the store has their pixels."""
    listing, selection = drawn
    source = {name_of(image): image for image in listing.images}
    roles = {role: {name_of(listing.images[at]) for at in getattr(selection, role).tolist()} for role in _ROLES}
    used = sorted(set().union(*roles.values()))
    header = manifests.read_header(folder) if (folder / HEADER).is_file() else None
    header = header if header and header.identity.sha256 == identity.sha256 else None
    if header is None and (len(used) > SAMPLE or subset.corrupt_share):
        yield Unproved("the prepared images are not here: classes were drawn again, images were not compared")
        return
    here = manifests.read(folder) if header else None
    dropped = set(header.dropped) if header else set[str]()
    if readable := [name for name in sorted(dropped & source.keys()) if _is_readable(listing, source[name])]:
        yield Wrong(folder / HEADER, "dropped", readable[0], "images that cannot be read; the source's can", DRAW_AGAIN)
    known = {name_of(one): one.sha256 for one in here.images} if here else {}
    read = set(random.sample(used, min(SAMPLE, len(used))))

    def digest(name: str) -> str:
        return hashlib.sha256(listing.fetch(source[name])).hexdigest() if name in read else known.get(name, "")

    again = _manifest(subset, identity, selection, {role: names - dropped for role, names in roles.items()}, digest)
    if again.sha256 == identity.sha256:
        seen.append(again)
    elif here is None:
        yield Wrong(record, "manifest.sha256", identity.sha256, f"{again.sha256}, of the images that the rule draws", DRAW_AGAIN)
    else:
        pairs = enumerate(zip_longest(manifests.rows(here), manifests.rows(again), fillvalue="none"), start=2)  # 1 is the head
        for line, (ours, theirs) in [(line, pair) for line, pair in pairs if pair[0] != pair[1]][:1]:
            truth = f"{theirs.strip()}, by the rule and the source's bytes"
            yield Wrong(folder / IMAGES, f"line {line}", ours.strip(), truth, DRAW_AGAIN)
    if here and header and header.store:
        yield from _pixels(here, Store(manifests.store_folder(folder, here, header.store), header.store), folder, listing, source)
    if len(read) < len(used):
        why = f"{len(read)} of {len(used)} images, drawn at random, have the stated bytes; the others were not read"
        yield Unproved(why, State.RECORDED)


def _manifest(
    subset: Subset, identity: ManifestIdentity, selection: Selection, roles: dict[str, set[str]], digest: Callable[[str], str]
) -> Manifest:
    """The manifest that the rule gives: names of images by role, and the hash of each."""
    order = sorted(set().union(*roles.values()), key=lambda name: name.split("/", 2))
    parts = ((name, *name.split("/", 2)) for name in order)
    images = tuple(manifests.Image(split, cls, file, digest(name)) for name, split, cls, file in parts)
    placed = {role: np.flatnonzero([name in names for name in order]) for role, names in roles.items()}
    return Manifest(
        subset.source.dataset, identity.subset, {}, selection.classes, selection.large, images, **placed, shots=selection.shots
    )


def _is_readable(listing: Listing, image: Located) -> bool:
    try:
        listing.decode(listing.fetch(image))
    except UnreadableError:
        return False
    return True


def _pixels(here: Manifest, store: Store, folder: Path, listing: Listing, source: Mapping[str, Located]) -> Iterator[Answer]:
    """A sample of the store has the pixels of the source's images; another shape is as far from them as can be."""
    for at in random.sample(range(len(here.images)), min(PACKED, len(here.images))):
        if (image := source.get(name := name_of(here.images[at]))) is None:
            continue
        pixels = torch.from_numpy(np.array(convert(listing.decode(listing.fetch(image)), store.info.settings)))
        stored, sizes = store.read(torch.tensor([at]))
        stored = stored[0, :, : sizes[0, 0], : sizes[0, 1]]
        off = float((stored.float() - pixels.float()).abs().mean()) if stored.shape == pixels.shape else 255.0
        if off > NEAR:
            found = f"{off:.0f} of 255 levels from it on average"
            yield Wrong(folder, f"pixels of {name}", found, f"the source's image, within {NEAR}", DRAW_AGAIN)
            return
