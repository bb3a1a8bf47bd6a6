"""How a prepared subset is made: every image it uses is read once, hashed, decoded and packed. `prepare` and `data pack` do this.

Everything is written under temporary names (`.partial*`) beside the final ones and renamed when complete; a killed or failed
`prepare` leaves nothing under a final name. Running it again removes what was left and starts from the beginning, but for an
external store, which may be hours of work: its journal says what it holds, and the work goes on from there. A finished one
is used again where every image of the source still has the bytes that were packed.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isd_repro.config import params
from isd_repro.data import crew, manifests, reuse
from isd_repro.data.journal import Entry, Journal, entry_of
from isd_repro.data.manifests import Image, Manifest, Positions
from isd_repro.data.prepared import pack_root
from isd_repro.data.sources import Listing, Located
from isd_repro.data.store import StoreInfo, StoreWriter, file_of
from isd_repro.data.subsets import Selection
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError

_SHOWN = 5  # names that a message lists


@dataclass(frozen=True)
class _Task:
    """What is packed, by how many, and who is told."""

    name: str
    subset: params.Subset
    listing: Listing
    selection: Selection
    used: list[int]  # positions in the listing, in manifest order
    processes: int
    say: Callable[[str], None]
    advance: Callable[[int], None]

    @property
    def images(self) -> list[Located]:
        """In manifest order."""
        return [self.listing.images[at] for at in self.used]


def build(
    folder: Path,
    name: str,
    subset: params.Subset,
    listing: Listing,
    selection: Selection,
    *,
    processes: int = 1,
    say: Callable[[str], None],
    advance: Callable[[int], None],
) -> Manifest:
    """Pack the images that a selection uses and write the subset's folder, replacing an older one.

    Args:
        folder: the prepared subset's final folder.
        name: the subset's key.
        subset: its parameters.
        listing: the source, still open.
        selection: what the rule drew of it.
        processes: how many decode and encode, where the source is a folder of files; it changes no byte.
        say: takes one plain line for the user.
        advance: called with a number of images that are done, or with a negative one: these have to be done again.

    Raises:
        DataError: too many images are unreadable, a class loses all of a role's images, or the disk is full.
        UserError: another process prepares this subset or packs these images.
    """
    task = _Task(name, subset, listing, selection, _used(listing.images, selection), processes, say, advance)
    external = pack_root() if subset.store.external else None
    try:
        with ExitStack() as stack:
            lock = folder.with_name(f".lock_{name}")
            stack.enter_context(files.exclusive(lock, f"subset {name!r}: {folder} is already being prepared"))
            made = stack.enter_context(_partial(folder.parent, f".partial_{name}_"))
            if external is None:
                place, (entries, info) = made, _pack(made, task, None)
            else:
                place, entries, info = _pack_outside(external, task, stack)
            manifest, dropped = _manifest(task, entries)
            _tell(folder, manifest, dropped, len(task.used), say)
            manifests.write(made, manifest, store=info, dropped=dropped)
            if external is not None:
                _install(place, external / info.key(manifest.sha256))
            _move(made, folder)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or folder}: {error.strerror}", "free space or permit writing, then run again"
        ) from error
    return manifest


def rule_of(subset: params.Subset) -> dict[str, object]:
    """Everything that decides which images a subset has and how they are packed, for provenance."""
    return {
        "source": subset.source.name,
        **subset.rule.model_dump(mode="json"),
        "search_per_class": subset.search_per_class,
        "query_per_class": subset.query_per_class,
        "store": subset.store.model_dump(mode="json", exclude={"external"}),
    }


def _used(images: Sequence[Located], selection: Selection) -> list[int]:
    """Positions that have any role, in manifest order."""
    every = np.unique(np.concatenate([selection.train, selection.search, selection.query]))
    return sorted(every.tolist(), key=lambda at: (images[at].split, images[at].cls, images[at].file))


def _pack_outside(root: Path, task: _Task, stack: ExitStack) -> tuple[Path, list[Entry | None], StoreInfo]:
    """A pack under the folder of packs, finished before or now, begun here or gone on with; and the folder it is in."""
    images = task.images
    key = _key(task)
    unfinished = stack.enter_context(_unfinished(root, key))
    found = reuse.find(root, key, task.subset.store, images, task.listing, say=task.say, advance=task.advance)
    if found is not None:
        return found
    book = Journal(unfinished, key)
    reader = crew.Reader(task.listing, task.subset.store)
    for at, entry in enumerate(book.entries):
        if entry is None and reader.one(images[at]) is not None:
            book.cut(at)
            task.say(f"{_name(images[at])} could not be read and now can: going back to it")
            break
    return unfinished, *_pack(unfinished, task, book)


def _pack(folder: Path, task: _Task, book: Journal | None) -> tuple[list[Entry | None], StoreInfo]:
    """Write the store into `folder`, going on from what its journal seals; what became of every image, in order."""
    images, store = task.images, task.subset.store
    done: list[Entry | None] = []
    digest = None
    if book is not None:
        digest, damage = book.check(folder / file_of(store))
        done += book.entries
        if damage:
            task.say(f"{damage}; doing it again from there")
        if done:
            task.say(f"going on after {len(done)} of {len(images)} images")
    rows = [(entry.height, entry.width, entry.channels, entry.length) for entry in done if entry is not None]
    with StoreWriter(folder, store, rows, digest) as writer:
        if book is not None:
            book.begin()
        task.advance(len(done))
        for image in crew.packed(images[len(done) :], task.listing, task.subset.source, store, task.processes):
            entry = None if image is None else entry_of(image)
            if image is not None:
                writer.add(image.content, image.height, image.width, image.channels)
            if book is not None:
                book.note(entry, writer)
            done.append(entry)
            task.advance(1)
        if book is not None:
            book.seal(writer)
        return done, writer.finish()


def _manifest(task: _Task, entries: Sequence[Entry | None]) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest of what a store holds, and the names of what could not be read."""
    images: list[Image] = []
    place: dict[int, int] = {}
    dropped: list[str] = []
    for at, located, entry in zip(task.used, task.images, entries, strict=True):
        if entry is None:
            dropped.append(_name(located))
        else:
            place[at] = len(images)
            images.append(Image(located.split, located.cls, located.file, entry.sha256))
    subset, selection = task.subset, task.selection
    _check_share(task.name, dropped, len(task.used), subset.corrupt_share)
    manifest = Manifest(
        dataset=subset.source.dataset,
        subset=task.name,
        rule=dict(rule_of(subset)),
        classes=selection.classes,
        large=selection.large,
        images=tuple(images),
        train=_placed(selection.train, place),
        search=_placed(selection.search, place),
        query=_placed(selection.query, place),
    )
    _check_classes(manifest)
    return manifest, tuple(dropped)


def _name(image: Located) -> str:
    return f"{image.split}/{image.cls}/{image.file}"


def _key(task: _Task) -> str:
    """16 hex digits that name a pack before its images are read: of its settings, its images and their roles."""
    store = task.subset.store.model_dump(mode="json", exclude={"external"})
    digest = hashlib.sha256(json.dumps([store, task.subset.source.dataset, sorted(task.selection.large)]).encode())
    for roles in (task.used, task.selection.train, task.selection.search, task.selection.query):
        names = (_name(task.listing.images[at]) for at in (roles if isinstance(roles, list) else roles.tolist()))
        for name in names:
            digest.update(f"{name}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _placed(positions: Positions, place: dict[int, int]) -> Positions:
    return np.array(sorted(place[at] for at in positions.tolist() if at in place), dtype=np.int64)


def _check_share(name: str, dropped: Sequence[str], used: int, share: float) -> None:
    if len(dropped) > share * used:
        shown = ", ".join(dropped[:_SHOWN])
        found = f"{len(dropped)} of {used} images are unreadable, more than corrupt_share {share:g} allows; first {shown}"
        raise DataError(f"subset {name!r}: {found}", "mend the images, or raise corrupt_share to leave them out")


def _check_classes(manifest: Manifest) -> None:
    """No class may lose all images of a role."""
    for role, positions in (("train", manifest.train), ("search", manifest.search), ("query", manifest.query)):
        counts = np.bincount(manifest.labels[positions], minlength=len(manifest.classes))
        for label in np.flatnonzero(counts == 0).tolist():
            found = f"class {manifest.classes[label]} has no readable {role} image"
            raise DataError(f"subset {manifest.subset!r}: {found}", "mend the images of this class")


def _tell(folder: Path, manifest: Manifest, dropped: Sequence[str], used: int, say: Callable[[str], None]) -> None:
    """Say what was left out and what changed since the folder was last prepared."""
    if dropped:
        say(f"left out {len(dropped)} of {used} images as unreadable: {_first(dropped)}")
    changed = changes(folder, manifest)
    if changed:
        say(f"{len(changed)} images have other bytes than when this subset was last prepared: {_first(changed)}")


def changes(folder: Path, manifest: Manifest) -> list[str]:
    """Images of the same data set whose bytes differ from those that an older manifest in `folder` has."""
    try:
        before = manifests.read(folder)
    except DataError:
        return []
    if before.dataset != manifest.dataset:
        return []
    known = {(image.split, image.cls, image.file): image.sha256 for image in before.images}
    keys = (((image.split, image.cls, image.file), image.sha256) for image in manifest.images)
    return ["/".join(key) for key, digest in keys if known.get(key, digest) != digest]


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _partial(parent: Path, prefix: str) -> AbstractContextManager[Path]:
    """A temporary folder with a name of its own; those that killed processes left under the prefix are removed."""
    files.sweep(parent, prefix)
    return files.temporary(parent / f"{prefix}{secrets.token_hex(4)}")


@contextmanager
def _unfinished(root: Path, key: str) -> Iterator[Path]:
    """The folder of an unfinished pack, which stays where the block fails."""
    folder = root / f".partial-{key}"
    with files.exclusive(root / f".partial-{key}.lock", f"{folder}: these images are already being packed"):
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except BaseException:
            with suppress(OSError):  # it holds something
                folder.rmdir()
            raise
        with suppress(OSError):  # it was renamed
            shutil.rmtree(folder)


def _install(made: Path, final: Path) -> None:
    """Put an external store in its place. One that is there may be in use: its files are replaced, and none is ever missing."""
    if made == final:
        return
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        for path in sorted(made.iterdir()):
            path.replace(final / path.name)


def _move(made: Path, final: Path) -> None:
    """Give a complete folder its final name; an older one of that name is removed."""
    old = made.with_name(f"{made.name}.old")
    if final.exists():
        final.rename(old)
    made.rename(final)
    shutil.rmtree(old, ignore_errors=True)
