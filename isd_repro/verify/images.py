"""Whether the images of each subset are those that its rule draws: drawn and hashed again, and compared with the store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
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
from isd_repro.runtime.errors import ConfigError, DataError, UserError
from isd_repro.verify.findings import Answer, State, Unproved, Verification, Wrong

SAMPLE = 100_000  # images of a subset that are read again; of larger subsets so many are drawn at random
PACKED = 500  # of these, decoded and compared with the store
NEAR = 8  # levels of 255, on average, that JPEG and other versions of its decoder may be off; another image is further
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
        folder = state.layout.prepared(name)
        if isinstance(subset.rule, ListFile | ImageList | NamedClasses) and subset.rule.listed:
            state.note("list of the images", name, _list(subset.rule, identity, record), *runs)
        seen: list[Manifest] = []
        if state.options.quick:
            state.note("draw of the images", name, [Unproved("--quick reads no images")])
        else:
            state.note("draw of the images", name, _drawn(name, subset, identity, record, folder, seen), *runs)
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


def _drawn(
    name: str, subset: Subset, identity: ManifestIdentity, record: Path, folder: Path, seen: list[Manifest]
) -> Iterator[Answer]:
    """Rule, seed and source give these classes and images, and the store holds their pixels."""
    try:
        with sources.open_source(subset.source) as listing:
            selection = subsets.select(listing.images, subset, name)
            groups = {f"shots.{one}": (identity.shots.get(one, ()), selection.shots.get(one, ())) for one in SHOTS}
            lists = {"classes": (identity.classes, selection.classes), "large": (identity.large, selection.large), **groups}
            for key, (ours, theirs) in lists.items():
                if ours != theirs:
                    truth = f"those of the draw, which differ in {', '.join(sorted(set(ours) ^ set(theirs))[:5])}"
                    yield Wrong(record, f"manifest.{key}", f"{len(ours)} classes", truth, _HINT)
            if (folder / HEADER).is_file() and (here := manifests.read(folder)).sha256 == identity.sha256:
                seen.append(here)
                yield from _same_roles(here, listing, selection, set(manifests.read_header(folder).dropped), folder / IMAGES)
                yield from _same_bytes(here, listing, folder)
                return
            used = {*selection.train.tolist(), *selection.search.tolist(), *selection.query.tolist()}
            if len(used) > SAMPLE or subset.corrupt_share:
                yield Unproved("the prepared images are not here: classes were drawn again, images were not compared")
                return
            drawn = _manifest_of(name, subset, listing, selection, used)
            if drawn.sha256 == identity.sha256:
                seen.append(drawn)
            else:
                yield Wrong(
                    record, "manifest.sha256", identity.sha256, f"{drawn.sha256}, of the images that the rule draws", _HINT
                )
    except UnreadableError as error:
        yield Unproved(f"an image of the source cannot be read: {error}")
    except (DataError, ConfigError) as error:
        yield Unproved(f"the subset cannot be drawn again: {error.message}")
    except UserError as error:
        yield Unproved(f"the source cannot be read: {error.message}")


def _same_roles(here: Manifest, listing: Listing, selection: Selection, dropped: set[str], path: Path) -> Iterator[Answer]:
    """Each role has the images that the rule draws, those that could not be read excepted."""
    for role in ("train", "search", "query"):
        drawn = {name_of(listing.images[at]) for at in getattr(selection, role).tolist()} - dropped
        stated = {f"{one.split}/{one.cls}/{one.file}" for one in (here.images[at] for at in getattr(here, role).tolist())}
        if drawn != stated:
            other = sorted(stated - drawn) or sorted(drawn - stated)
            words = f"the {len(drawn)} images that the rule draws; the first of {len(other)} others is {other[0]}"
            yield Wrong(path, f"{role} images", f"{len(stated)} images", words, _HINT)


def _same_bytes(here: Manifest, listing: Listing, folder: Path) -> Iterator[Answer]:
    """The images of the source have the stated hashes, and the store their pixels."""
    source = {name_of(image): image for image in listing.images}
    chosen = sorted(random.sample(range(len(here.images)), min(SAMPLE, len(here.images))))
    packed = set(random.sample(chosen, min(PACKED, len(chosen))))
    info = manifests.read_header(folder).store
    store = Store(manifests.store_folder(folder, here, info), info) if info else None
    for at in chosen:
        image = here.images[at]
        name = f"{image.split}/{image.cls}/{image.file}"
        if name not in source:
            continue  # its role has been found wrong
        try:
            content = listing.fetch(source[name])
            if (digest := hashlib.sha256(content).hexdigest()) != image.sha256:
                yield Wrong(folder / IMAGES, name, image.sha256, f"{digest}, the sha256 of the source's image", _HINT)
                return
            if at in packed and store is not None and (off := _distance(store, at, listing.decode(content))) > NEAR:
                found = f"{off:.0f} of 255 levels from it on average"
                yield Wrong(folder, f"pixels of {name}", found, f"the source's image, within {NEAR}", _HINT)
                return
        except UnreadableError as error:
            yield Wrong(folder / IMAGES, name, "an image", f"none: the source's cannot be read ({error})", _HINT)
            return
    if len(chosen) < len(here.images):
        why = f"{len(chosen)} of {len(here.images)} images, drawn at random, have the stated bytes; the others were not read"
        yield Unproved(why, State.RECORDED)


def _distance(store: Store, at: int, image: Picture) -> float:
    """Mean difference of a stored image and the source's, in levels of 255; another shape is as far as can be."""
    pixels = torch.from_numpy(np.array(convert(image, store.info.settings)))
    stored, sizes = store.read(torch.tensor([at]))
    tall, wide = sizes[0].tolist()
    stored = stored[0, :, :tall, :wide]
    return float((stored.float() - pixels.float()).abs().mean()) if stored.shape == pixels.shape else 255.0


def _manifest_of(name: str, subset: Subset, listing: Listing, selection: Selection, used: Iterable[int]) -> Manifest:
    """The manifest that the rule gives, with the hashes of the source's bytes."""
    order = sorted(used, key=lambda at: _place(listing.images[at]))
    place = {at: position for position, at in enumerate(order)}
    images = []
    for at in order:
        one = listing.images[at]
        images.append(manifests.Image(one.split, one.cls, one.file, hashlib.sha256(listing.fetch(one)).hexdigest()))
    roles = {
        role: np.array(sorted(place[at] for at in getattr(selection, role).tolist()), dtype=np.int64)
        for role in ("train", "search", "query")
    }
    return Manifest(
        subset.source.dataset, name, {}, selection.classes, selection.large, tuple(images), **roles, shots=selection.shots
    )


def _place(image: Located) -> tuple[str, str, str]:
    return image.split, image.cls, image.file
