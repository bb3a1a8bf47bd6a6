"""Checks whether the images that a source's variable names are still those from which a subset was prepared.

DVC does not track a folder that an environment variable names, and after `prepare` no stage reads it, so a variable that names
other images would go unnoticed. The check is cheap enough for the start of every stage: it compares the names of all images, and
the bytes of a sample, with the manifest. As long as sizes and modification times of folders and sample do not change, only these
are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from isd_repro.config.params import Subset
from isd_repro.data import manifests, sources
from isd_repro.data.packing import name_of
from isd_repro.data.sources import UnreadableError
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.runtime.files import write_atomic

SAMPLE = 500  # images of which the bytes are compared, spread over the manifest


def check_source(name: str, subset: Subset, prepared: Path, memory: Path) -> None:
    """Compare a subset's source with its manifest; if either is absent, nothing is checked.

    Args:
        name: the subset's key in params.yaml.
        subset: its parameters.
        prepared: its prepared folder.
        memory: a folder that keeps sizes and times for the next stage.

    Raises:
        DataError: the source holds other images.
    """
    root = Path(os.environ.get(subset.source.root_env) or "") if subset.source.root_env else None
    if root is None or not root.is_absolute() or not (prepared / manifests.HEADER).is_file():
        return
    if not (root.is_file() or (root.is_dir() and any(root.iterdir()))):  # such as a disk that is not mounted
        return
    identity = manifests.read_header(prepared).identity.sha256
    kept = memory / f"source-{hashlib.sha256(f'{identity} {root}'.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        seen = json.loads(kept.read_bytes())
        if seen == _times(root, seen):
            return
    try:
        files, problem = _compare(subset, prepared)
    except UserError as error:
        files, problem = [], error.message
    if problem:
        raise DataError(
            f"{subset.source.root_env}={root}: does not hold the images that subset {name!r} was prepared from: {problem}",
            f"set it to the folder with the images of {subset.source.dataset}; or unset it to continue with the prepared images;"
            f" or prepare the images that it names now: dvc repro --force --single-item prepare@{name}",
        )
    with suppress(OSError):
        seen = _times(root, [*_entries(root), *(file for file in files if (root / file).is_file())])
        write_atomic(kept, json.dumps(seen).encode())


def _compare(subset: Subset, prepared: Path) -> tuple[list[str], str]:
    """The references of the sample's images in the source (paths if they are files), and a message if something is wrong."""
    manifest = manifests.read(prepared)
    with sources.open_source(subset.source) as listing:
        there = {image.key: image for image in listing.images}
        absent = [image for image in manifest.images if image.key not in there]
        if absent:
            return [], f"{len(absent)} of its {len(manifest.images)} images are absent, first {name_of(absent[0])}"
        found = []
        for at in np.linspace(0, len(manifest.images) - 1, min(SAMPLE, len(manifest.images))).astype(int).tolist():
            image = manifest.images[at]
            located = there[image.key]
            with suppress(UnreadableError):
                if hashlib.sha256(listing.fetch(located)).hexdigest() != image.sha256:
                    return [], f"{name_of(image)} has other bytes"
            found += [located.ref] if isinstance(located.ref, str) else []
    return found, ""


def _entries(root: Path) -> list[str]:
    """Relative paths of the source and of its first two levels: splits and classes, or archives and their parts."""
    found = [root, *root.glob("*"), *root.glob("*/*")] if root.is_dir() else [root]
    return [str(path.relative_to(root)) for path in sorted(found)]


def _times(root: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of last change of each of these files and folders."""
    return {file: [(stat := (root / file).stat()).st_size, stat.st_mtime_ns] for file in files}
