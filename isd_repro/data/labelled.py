"""The labelled images of few-label evaluations: those of a published list, or a random draw per class.

The published lists are SimCLR's 1 % and 10 % of ImageNet with one file name per line (`n01440764_10026.JPEG`), in a folder that
an environment variable names. A draw takes the same share of every class, at least one image, by a permutation that depends only
on seed and class, so a smaller share is a subset of a larger one.  # DEV-18
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from isd_repro.data.manifests import Prepared, Split

ORIGIN = (
    "the published lists are semi_supervised/imagenet_subsets/ of repository UCDvision/CMSF (google-research/simclr made them)"
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """The labelled part of a search split."""

    at: Tensor  # positions in the split, int64, ascending
    split: Split  # the same images as a split
    source: str  # `drawn`, or the list's file name
    sha256: str  # over the class and file of every image, in manifest order
    list_sha256: str | None = None  # of the list's bytes; None where drawn

    def facts(self) -> dict[str, str | int | None]:
        """What the record states."""
        return {"images": len(self.at), "source": self.source, "sha256": self.sha256, "list_sha256": self.list_sha256}


def percent(fraction: float) -> str:
    """A fraction as text in percent: 0.01 gives `1`, 0.125 gives `12.5`."""
    return f"{round(100 * fraction, 10):g}"


def labelled(prepared: Prepared, fraction: float, lists_env: str, seed: int) -> Labelled:
    """The labelled images of a prepared subset's search set.

    Args:
        prepared: the subset.
        fraction: share of the images.
        lists_env: the environment variable that names a folder of lists; if it is empty or not set, the images are drawn.
        seed: of the draw.

    Raises:
        DataError: the folder or its list is missing, or the list names images that the search set lacks or omits a class.
    """
    import torch

    from isd_repro.data.manifests import Split

    search = prepared.split("search")
    images = [prepared.manifest.images[at] for at in search.index.tolist()]
    list_sha256 = None
    if lists_env and os.environ.get(lists_env):
        path = files.named_path(lists_env, ORIGIN) / f"{percent(fraction)}percent.txt"
        source, (at, list_sha256) = path.name, _listed(path, [image.file for image in images])
    else:
        source, at = "drawn", drawn(search.label, fraction, seed)
    chosen = torch.tensor(at, dtype=torch.int64)
    bare = sorted(set(search.label.tolist()) - set(search.label[chosen].tolist()))
    if bare:
        first = prepared.manifest.classes[bare[0]]
        raise DataError(f"{source}: {len(bare)} classes have no labelled image; the first is {first}", ORIGIN)
    digest = hashlib.sha256("".join(f"{images[place].cls}\t{images[place].file}\n" for place in at).encode())
    return Labelled(chosen, Split(search.index[chosen], search.label[chosen]), source, digest.hexdigest(), list_sha256)


def drawn(label: Tensor, fraction: float, seed: int) -> list[int]:
    """Positions of round(fraction x images) images of each class, at least one, ascending; `label` is int64, N."""
    import torch

    from isd_repro.data.loader import generator_of

    found: list[int] = []
    for cls in label.unique().tolist():
        members = (label == cls).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator_of(seed, "few labels", cls))
        found += members[order[: max(1, round(fraction * len(members)))]].tolist()
    return sorted(found)


def _listed(path: Path, files: Sequence[str]) -> tuple[list[int], str]:
    """Positions of the files that a list names, ascending, and the sha256 of the list's bytes."""
    if not path.is_file():
        raise DataError(f"{path}: no such list", f"{ORIGIN}; unset the environment variable to draw instead")
    content = path.read_bytes()
    names = [line.strip() for line in content.decode("utf-8", errors="replace").splitlines() if line.strip()]
    place = {file: at for at, file in enumerate(files)}
    if len(place) != len(files):
        raise DataError(f"{path}: two images have the same name, so that a list of names is ambiguous", "draw instead")
    if missing := [name for name in names if name not in place]:
        found = f"{len(missing)} of its {len(names)} images are not in the search set, first {', '.join(missing[:3])}"
        raise DataError(f"{path}: {found}", ORIGIN)
    if again := len(names) - len(set(names)):
        raise DataError(f"{path}: {again} of its {len(names)} lines name an image again", ORIGIN)
    return sorted(place[name] for name in names), hashlib.sha256(content).hexdigest()
