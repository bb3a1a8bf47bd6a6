"""Whether the images of each subset are those that its rule draws: drawn and hashed again, and compared with the store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image as Picture

from isd_repro.config.params import ImageList, ListFile, NamedClasses, Subset
from isd_repro.data import manifests, sources, subsets
from isd_repro.data.lists import LIST_SHA256
from isd_repro.data.manifests import HEADER, IMAGES, MAX_SHARED, Manifest
from isd_repro.data.packing import name_of
from isd_repro.data.sources import Listing, Located, UnreadableError
from isd_repro.data.store import Store, convert
from isd_repro.data.subsets import Selection
from isd_repro.records import SHOTS, ManifestIdentity
from isd_repro.report.run_records import Records
from isd_repro.runtime.errors import UserError
from isd_repro.verify.findings import Answer, State, Unproved, Verification, Wrong

SAMPLE = 100_000  # images of a subset that are read again; of larger subsets so many are drawn at random
PACKED = 500  # images that are decoded and compared with the store
NEAR = 8  # levels of 255, on average, that JPEG and other versions of its decoder may be off; another image is further
_ROLES = ("train", "search", "query")
_HINT = "these are not the images of the rule: run `prepare` and all later stages again"


def check_images(state: Verification, records: Records) -> None:
    """The checks of every subset that has a record."""
    for name, subset in state.params.subsets.items():
        runs = [run for run, one in state.params.runs.items() if one.data.subset == name and records.runs[run].manifest]
        stated = {run: records.runs[run] for run in runs}
        if not runs:
            continue
        first = stated[runs[0]]
        identity, record = first.manifest, state.layout.record(runs[0], next(iter(first.of_one_encoder)))
        assert identity
        if isinstance(subset.rule, ListFile | ImageList | NamedClasses) and subset.rule.listed:
            state.note("list of the images", name, _list(subset.rule, identity, record), *runs)
        seen: list[Manifest] = []
        quick = [Unproved("--quick reads no images")]
        drawn = quick if state.options.quick else _drawn(subset, identity, record, state.layout.prepared(name), seen)
        state.note("draw of the images", name, drawn, *runs)
        state.note("copies among the queries", name, _copies(subset, identity, record, seen), *runs)


def _list(rule: ListFile | ImageList | NamedClasses, identity: ManifestIdentity, record: Path) -> Iterator[Answer]:
    """The list that was read is the published one of its name, or the one whose sha256 the rule states."""
    digest = identity.rule.get("sha256")
    wanted = LIST_SHA256[rule.list] if isinstance(rule, ListFile) else rule.sha256
    if digest is None:
        yield Unproved(f"the record does not state the sha256 of its list {rule.listed}")
    elif wanted is None:
        yield Unproved(f"the rule states no sha256 of its list {rule.listed}: any list of this name passes", State.RECORDED)
    elif digest != wanted:
        yield Wrong(record, "manifest.rule.sha256", digest, f"{wanted}, of the list {rule.listed} that the rule names", _HINT)


def _copies(subset: Subset, identity: ManifestIdentity, record: Path, seen: Sequence[Manifest]) -> Iterator[Answer]:
    """Few queries are copies of training or search images; `seen` has the manifest if the images are available."""
    count = identity.shared
    for one in seen:
        if count not in (None, one.shared):
            yield Wrong(record, "manifest.shared", count, f"{one.shared}, counted by the hashes of the images")
        count = one.shared
    said = f"{count} of {identity.query} queries are copies of training or search images"
    if count is None:
        yield Unproved("they were not counted when the record was made")
    elif count > MAX_SHARED * identity.query and not subset.allow_shared_images:
        words = f"at most {MAX_SHARED:.0%} of the queries, unless allow_shared_images is set"
        yield Wrong(record, "manifest.shared", said, words)
    elif count:
        yield Unproved(said, State.RECORDED)


def _drawn(subset: Subset, identity: ManifestIdentity, record: Path, folder: Path, seen: list[Manifest]) -> Iterator[Answer]:
    """Rule, seed and source give these classes and images, and the store holds their pixels."""
    try:
        with sources.open_source(subset.source) as listing:
            selection = subsets.select(listing.images, subset, identity.subset)
            lists = {"classes": (identity.classes, selection.classes), "large": (identity.large, selection.large)}
            lists |= {f"shots.{one}": (identity.shots.get(one, ()), selection.shots.get(one, ())) for one in SHOTS}
            for key, (ours, theirs) in lists.items():
                if ours != theirs:
                    truth = f"those of the draw, which differ in {', '.join(sorted(set(ours) ^ set(theirs))[:5])}"
                    yield Wrong(record, f"manifest.{key}", f"{len(ours)} classes", truth, _HINT)
            yield from _same_images(subset, identity, record, folder, listing, selection, seen)
    except UnreadableError as error:
        yield Unproved(f"an image of the source cannot be read: {error}")
    except UserError as error:
        yield Unproved(f"the subset cannot be drawn again: {error.message}")


def _same_images(
    subset: Subset,
    identity: ManifestIdentity,
    record: Path,
    folder: Path,
    listing: Listing,
    selection: Selection,
    seen: list[Manifest],
) -> Iterator[Answer]:
    """The drawn images, with the hashes of the source's bytes, have the manifest's identity; the store has their pixels."""
    source = {name_of(image): image for image in listing.images}
    roles = {role: {name_of(listing.images[at]) for at in getattr(selection, role).tolist()} for role in _ROLES}
    used = sorted(set().union(*roles.values()))
    header = manifests.read_header(folder) if (folder / HEADER).is_file() else None
    if header and header.identity.sha256 != identity.sha256:
        header = None
    if header is None and (len(used) > SAMPLE or subset.corrupt_share):
        yield Unproved("the prepared images are not here: classes were drawn again, images were not compared")
        return
    here = manifests.read(folder) if header else None
    dropped = set(header.dropped) if header else set[str]()
    if readable := [name for name in sorted(dropped & source.keys()) if _is_readable(listing, source[name])]:
        yield Wrong(folder / HEADER, "dropped", readable[0], "images that cannot be read; the source's can", _HINT)
    known = {_name(one): one.sha256 for one in here.images} if here else {}
    read = set(random.sample(used, min(SAMPLE, len(used))))

    def digest(name: str) -> str:
        return hashlib.sha256(listing.fetch(source[name])).hexdigest() if name in read else known.get(name, "")

    drawn = _manifest(subset, identity, selection, {role: names - dropped for role, names in roles.items()}, digest)
    if drawn.sha256 == identity.sha256:
        seen.append(drawn)
    elif here is None:
        yield Wrong(record, "manifest.sha256", identity.sha256, f"{drawn.sha256}, of the images that the rule draws", _HINT)
    else:
        pairs = enumerate(zip_longest(manifests.rows(here), manifests.rows(drawn), fillvalue="none"), start=2)  # 1 is the head
        for line, (ours, theirs) in [(line, pair) for line, pair in pairs if pair[0] != pair[1]][:1]:
            truth = f"{theirs.strip()}, by the rule and the source's bytes"
            yield Wrong(folder / IMAGES, f"line {line}", ours.strip(), truth, _HINT)
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
    """A sample of the store has the pixels of the source's images."""
    for at in random.sample(range(len(here.images)), min(PACKED, len(here.images))):
        image = source.get(name := _name(here.images[at]))
        if image and (off := _distance(store, at, listing.decode(listing.fetch(image)))) > NEAR:
            found = f"{off:.0f} of 255 levels from it on average"
            yield Wrong(folder, f"pixels of {name}", found, f"the source's image, within {NEAR}", _HINT)
            return


def _name(image: manifests.Image) -> str:
    return f"{image.split}/{image.cls}/{image.file}"


def _distance(store: Store, at: int, image: Picture) -> float:
    """Mean difference of a stored image and the source's, in levels of 255; another shape is as far as can be."""
    pixels = torch.from_numpy(np.array(convert(image, store.info.settings)))
    stored, sizes = store.read(torch.tensor([at]))
    tall, wide = sizes[0].tolist()
    stored = stored[0, :, :tall, :wide]
    return float((stored.float() - pixels.float()).abs().mean()) if stored.shape == pixels.shape else 255.0
