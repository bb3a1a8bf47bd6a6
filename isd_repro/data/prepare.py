"""Stage `prepare`: draw a subset from its source, pack its images, and write its manifest.

Every image that a subset uses is read once, hashed, decoded and packed. All files are written under temporary names (`.partial*`)
next to the final ones and renamed when they are complete, so a killed or failed `prepare` leaves nothing under a final name.
Running it again starts from the beginning, except for an external pack, which is continued (`packing`).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.config.params import ImageList, ListFile, NamedClasses, Params, Subset
from isd_repro.data import manifests, sources, subsets
from isd_repro.data.manifests import Image, Manifest, check_shared, pack_root
from isd_repro.data.packing import Outcome, Packer, in_order, name_of
from isd_repro.data.sources import Located
from isd_repro.data.store import usable_cores
from isd_repro.data.subsets import Selection
from isd_repro.provenance import shown_provenance
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.progress import Progress
from isd_repro.tracking import open_stage

_SHOWN = 5  # names that a message lists
Say = Callable[[str], None]


def prepare(name: str, params: Params, layout: Layout, console: Console, threads: int | None = None) -> None:
    """Write the folder of one subset: manifest.json, images.tsv and, unless it is external, the store.

    Args:
        name: the subset's key in params.yaml.
        params: the whole profile.
        layout: where its files are.
        console: takes progress and warnings.
        threads: number of threads that read, decode and encode; by default one for each core of this process. It changes no byte.

    Raises:
        ConfigError: there is no such subset, or its rule contradicts itself.
        DataError: images are missing, unreadable or too few.
        UserError: the source needs a package that is not installed, or another process is preparing this subset.
    """
    began, subset, progress = time.monotonic(), config.find_subset(params, name), Progress(console)

    def say(line: str) -> None:
        progress.say(f"prepare {name}: {line}")

    with sources.open_source(subset.source) as listing:
        selection = subsets.select(listing.images, subset, name)
        for note in (*listing.notes, *selection.notes):
            say(note)
        drawn = _DrawnSubset.of(name, subset, selection, listing.images)
        with progress.task(f"prepare {name}") as task:
            task.begin(len(drawn.images))
            packer = Packer(listing, drawn.images, subset.store, threads or usable_cores(), say, task.advance)
            manifest = _write(layout.prepared(name), drawn, packer)
    seconds = round(time.monotonic() - began, 3)
    row = {"epoch": 0, "images": len(manifest.images), "train": len(manifest.train), "seconds": seconds}
    shown = {"subset": subset.model_dump(mode="json"), "manifest": manifest.sha256, **shown_provenance()}
    with open_stage("prepare", name, params, layout, identity=manifest.sha256, config=shown) as tracker:
        tracker.log(row)
    roles = f"train {len(manifest.train)}, search {len(manifest.search)}, query {len(manifest.query)}"
    say(f"{len(manifest.images)} images of {len(manifest.classes)} classes ({roles}), manifest {manifest.sha256[:16]}")


@dataclass(frozen=True)
class _DrawnSubset:
    """What a rule drew of a source: the images that have a role, in manifest order, and their positions by role, ascending."""

    name: str
    subset: Subset
    selection: Selection
    images: list[Located]
    roles: dict[str, list[int]]

    @classmethod
    def of(cls, name: str, subset: Subset, selection: Selection, listed: Sequence[Located]) -> _DrawnSubset:
        given = {role: getattr(selection, role).tolist() for role in manifests.ROLES.values()}
        used = sorted({*chain(*given.values())}, key=lambda at: listed[at].key)
        place = {at: position for position, at in enumerate(used)}
        roles = {role: sorted(place[at] for at in positions) for role, positions in given.items()}
        return cls(name, subset, selection, [listed[at] for at in used], roles)

    def check_shared(self, shared: int, queries: int) -> str:
        """As `manifests.check_shared`."""
        allow, allowed = f"set subsets.{self.name}.allow_shared_images: true", self.subset.allow_shared_images
        return check_shared(shared, queries, place=f"subset {self.name!r}", allow=allow, allowed=allowed)

    def guard(self, packer: Packer) -> Packer:
        """The packer, which ends at the image with which too many queries are copies; the few queries are hashed now."""
        learnt = {*self.roles["train"], *self.roles["search"]}
        asked = [self.images[at] for at in self.roles["query"]]
        waiting, shared = Counter(in_order(packer.sha256, asked, packer.threads)), 0

        def look(at: int, outcome: Outcome) -> None:
            nonlocal shared
            if at in learnt and not isinstance(outcome, str) and (copies := waiting.pop(outcome.sha256, 0)):
                shared += copies
                self.check_shared(shared, len(asked))

        return replace(packer, look=look)

    def key(self) -> str:
        """16 hex digits that name a pack before its images are read: of its settings, its images and their roles."""
        facts = [self.subset.stated()["store"], self.subset.source.dataset, sorted(self.selection.large)]
        facts += [self.selection.shots] if self.selection.shots else []
        digest = hashlib.sha256(json.dumps(facts).encode())
        for role in (range(len(self.images)), *self.roles.values()):
            digest.update("".join(f"{name_of(self.images[at])}\n" for at in role).encode() + b"\n")
        return digest.hexdigest()[:16]

    def manifest(self, outcomes: Sequence[Outcome]) -> tuple[Manifest, dict[str, str]]:
        """The manifest of what a store holds, and the images that could not be read with the reason of each."""
        kept = {at: one for at, one in enumerate(outcomes) if not isinstance(one, str)}
        dropped = {name_of(self.images[at]): one for at, one in enumerate(outcomes) if isinstance(one, str)}
        share, count = self.subset.corrupt_share, len(self.images)
        if len(dropped) > share * count:
            found = f"{len(dropped)} of {count} images are unreadable, more than corrupt_share {share:g} allows"
            hint = "repair these images, or raise corrupt_share to skip them"
            raise DataError(f"subset {self.name!r}: {found}; first {_reasons(dropped)}", hint)
        place = {at: position for position, at in enumerate(kept)}
        positions = {role: np.array([place[at] for at in of if at in place], np.int64) for role, of in self.roles.items()}
        rule, stated = self.subset.rule, self.subset.stated()
        if isinstance(rule, ListFile | ImageList | NamedClasses) and rule.listed:  # its name does not determine its content
            stated["sha256"] = files.sha256_file(files.named_path(rule.root_env, "") / rule.listed)
        manifest = Manifest(
            dataset=self.subset.source.dataset,
            subset=self.name,
            rule=stated,
            classes=self.selection.classes,
            large=self.selection.large,
            images=tuple(Image(*self.images[at].key, one.sha256) for at, one in kept.items()),
            **positions,
            shots=self.selection.shots,
        )
        for role in self.roles:
            counts = np.bincount(manifest.labels[getattr(manifest, role)] + 1, minlength=len(manifest.classes) + 1)[1:]
            for label in np.flatnonzero(counts == 0).tolist():
                found = f"class {manifest.classes[label]} has no readable {role} image"
                raise DataError(f"subset {self.name!r}: {found}", "repair the images of this class")
        return manifest, dropped


def _write(folder: Path, drawn: _DrawnSubset, packer: Packer) -> Manifest:
    """Pack the images and write the subset's folder, replacing an older one.

    Raises:
        DataError: too many images are unreadable or shared, a class loses all of a role's images, or the disk is full.
        UserError: another process prepares this subset or packs these images.
    """
    external = pack_root() if drawn.subset.store.external else None
    try:
        with ExitStack() as stack:
            lock = folder.with_name(f".lock_{drawn.name}")
            stack.enter_context(files.exclusive(lock, f"subset {drawn.name!r}: {folder} is already being prepared"))
            prefix = f".partial_{drawn.name}_"
            files.sweep(folder.parent, prefix)  # what killed processes left
            made = stack.enter_context(files.temporary(folder.parent / f"{prefix}{secrets.token_hex(4)}"))
            packer = drawn.guard(packer)
            if external is None:
                place, (outcomes, info) = made, packer.pack(made)
            else:
                unfinished = stack.enter_context(_unfinished(external, drawn.key()))
                found = packer.find_finished(external, drawn.key())
                place, outcomes, info = found or (unfinished, *packer.pack(unfinished, drawn.key()))
            manifest, dropped = drawn.manifest(outcomes)
            if said := drawn.check_shared(manifest.shared, len(manifest.query)):
                packer.say(said)
            _report_changes(folder, manifest, dropped, len(outcomes), packer.say)
            manifests.write(made, manifest, store=info, dropped=tuple(dropped))
            if external is not None:
                _install(place, external / info.key(manifest.sha256))
            _replace(made, folder)
    except OSError as error:
        raise DataError(f"cannot write {error.filename or folder}: {error.strerror}", files.advice(error)) from error
    return manifest


def _report_changes(folder: Path, manifest: Manifest, dropped: dict[str, str], used: int, say: Say) -> None:
    """Report what was left out, and which images have changed since an older manifest of the same data set in `folder`."""
    if dropped:
        say(f"skipped {len(dropped)} of {used} images that cannot be read: {_reasons(dropped)}")
    try:
        before = manifests.read(folder)
    except DataError:
        return
    known = {image.key: image.sha256 for image in before.images}
    changed = [name_of(image) for image in manifest.images if known.get(image.key, image.sha256) != image.sha256]
    if changed and before.dataset == manifest.dataset:
        say(f"{len(changed)} images have changed since this subset was last prepared: {_first(changed)}")


def _reasons(dropped: dict[str, str]) -> str:
    return _first([f"{name} ({reason})" for name, reason in dropped.items()])


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# --- folders ----------------------------------------------------------------------------------------------------------


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
    """Move an external store to its final place. An older one may be in use, so its files are replaced one by one."""
    if made == final:
        return
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        for path in sorted(made.iterdir()):
            path.replace(final / path.name)


def _replace(made: Path, final: Path) -> None:
    """Rename a complete folder to its final name; an older folder of that name is removed."""
    old = made.with_name(f"{made.name}.old")
    if final.exists():
        final.rename(old)
    made.rename(final)
    shutil.rmtree(old, ignore_errors=True)
