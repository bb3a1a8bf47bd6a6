"""How a prepared subset is made: every image it uses is read once, hashed, decoded and packed.

Everything is written under temporary names (`.partial_*`) beside the final ones and renamed when complete. A killed or failed
`prepare` leaves nothing under a final name; running it again removes what was left and starts from the beginning.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from isd_repro import files, params
from isd_repro.data import manifests
from isd_repro.data.manifests import Image, Manifest, Positions
from isd_repro.data.opening import UnreadableError
from isd_repro.data.prepared import pack_root
from isd_repro.data.sources import Listing, Located
from isd_repro.data.store import StoreInfo, StoreWriter, convert
from isd_repro.data.subsets import Selection
from isd_repro.errors import DataError

_SHOWN = 5  # names that a message lists
_Packed = tuple[str, npt.NDArray[np.uint8]]  # sha256 and pixels


def build(
    folder: Path,
    name: str,
    subset: params.Subset,
    listing: Listing,
    selection: Selection,
    *,
    say: Callable[[str], None],
    advance: Callable[[], None],
) -> Manifest:
    """Pack the images that a selection uses and write the subset's folder, replacing an older one.

    Args:
        folder: the prepared subset's final folder.
        name: the subset's key.
        subset: its parameters.
        listing: the source, still open.
        selection: what the rule drew of it.
        say: takes one plain line for the user.
        advance: called after each image.

    Raises:
        DataError: too many images are unreadable, a class loses all of a role's images, or the disk is full.
        UserError: another process prepares this subset.
    """
    used = _used(listing.images, selection)
    external = pack_root() if subset.store.external else None
    try:
        with ExitStack() as stack:
            lock = folder.with_name(f".lock_{name}")
            stack.enter_context(files.exclusive(lock, f"subset {name!r}: {folder} is already being prepared"))
            made = stack.enter_context(_partial(folder.parent, f".partial_{name}_"))
            packed = made if external is None else stack.enter_context(_partial(external, ".partial_"))
            manifest, info, dropped = _pack(packed, name, subset, listing, selection, used, advance)
            _tell(folder, manifest, dropped, len(used), say)
            manifests.write(made, manifest, store=info, dropped=dropped)
            if external is not None:
                _install(packed, external / info.key(manifest.sha256))
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


def _pack(
    folder: Path,
    name: str,
    subset: params.Subset,
    listing: Listing,
    selection: Selection,
    used: Sequence[int],
    advance: Callable[[], None],
) -> tuple[Manifest, StoreInfo, tuple[str, ...]]:
    """Write the store into `folder`; also the manifest of what it holds and the names of what could not be read."""

    def work(at: int) -> _Packed | None:
        try:
            payload = listing.fetch(listing.images[at])
            return hashlib.sha256(payload).hexdigest(), convert(listing.decode(payload), subset.store)
        except UnreadableError:
            return None

    images: list[Image] = []
    place: dict[int, int] = {}
    dropped: list[str] = []
    with StoreWriter(folder, subset.store) as writer:
        for at, result in _in_order(work, used):
            located = listing.images[at]
            if result is None:
                dropped.append(f"{located.split}/{located.cls}/{located.file}")
            else:
                place[at] = len(images)
                images.append(Image(located.split, located.cls, located.file, result[0]))
                writer.append(result[1])
            advance()
        _check_share(name, dropped, len(used), subset.corrupt_share)
        info = writer.finish()
    manifest = Manifest(
        dataset=subset.source.dataset,
        subset=name,
        rule=dict(rule_of(subset)),
        classes=selection.classes,
        large=selection.large,
        images=tuple(images),
        train=_placed(selection.train, place),
        search=_placed(selection.search, place),
        query=_placed(selection.query, place),
    )
    _check_classes(manifest)
    return manifest, info, tuple(dropped)


def _placed(positions: Positions, place: dict[int, int]) -> Positions:
    return np.array(sorted(place[at] for at in positions.tolist() if at in place), dtype=np.int64)


def _in_order(work: Callable[[int], _Packed | None], items: Iterable[int]) -> Iterator[tuple[int, _Packed | None]]:
    """Results in the order of the items, worked on by threads that run a bounded way ahead."""
    threads = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[int, Future[_Packed | None]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= 4 * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


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


def _install(made: Path, final: Path) -> None:
    """Put an external store in its place. One that is there may be in use: its files are replaced, and none is ever missing."""
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
