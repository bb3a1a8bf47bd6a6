"""Images of a folder or zip that was not packed by `prepare`: hashed once, and decoded whenever they are needed.

The manifest and its hash are those that `prepare` would make from all these images; the pixels are those of a store that is
packed with resize `none`. Any image that PIL decodes is converted as for the store: to RGB for an encoder with three channels
(grey is repeated, CMYK and palettes are converted, transparency is dropped), or to grey for an encoder with one channel.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from isd_repro.config import params
from isd_repro.data import sources
from isd_repro.data.eval_loader import PADDED, Ahead, Reader, StoreReader
from isd_repro.data.lists import Listed, is_authors, parse_labelled, parse_list
from isd_repro.data.manifests import Image, Manifest, Prepared, open_prepared
from isd_repro.data.packing import in_order, name_of
from isd_repro.data.sources import Listing, Located, UnreadableError, open_image
from isd_repro.data.store import Pixels, Store, convert, usable_cores
from isd_repro.data.subsets import group_by_size
from isd_repro.records import Shot
from isd_repro.runtime.errors import DataError, printable

_REPAIR = "repair these files or remove them from the folder"
_WHERE = "give a folder or a zip with train/<class>/ and val/<class>/ of image files; docs/data.md lists other layouts"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images for an evaluation outside the pipeline."""

    prepared: Prepared  # manifest, roles and groups
    reader: Reader  # pixels, by position in the manifest
    pixels: dict[str, Any]  # what the pixels were made with; part of a feature's identity
    notes: tuple[str, ...] = ()  # what a reader of the results should know


class FileReader:
    """Decodes files by position, several at a time and up to one batch ahead; used like a store with unchanged image sizes."""

    def __init__(
        self, listing: Listing, images: Sequence[tuple[Located, str]], sizes: Tensor, channels: int, pool: ThreadPoolExecutor
    ) -> None:
        """Take the images, each with the sha256 of its bytes."""
        self.sizes, self.channels = sizes, channels
        self._listing, self._images = listing, images
        self._settings = params.StoreSettings.model_validate({"channels": channels})
        self._decoded = Ahead(self._decode, pool)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """As `Store.read`; `DataError` if an image cannot be decoded or its bytes have changed since it was hashed."""
        found = self._decoded.take(index.tolist())
        sizes = self.sizes[index]
        height, width = (0, 0) if not len(index) else (int(side) for side in sizes.amax(dim=0))
        batch = np.zeros((len(index), self.channels, height, width), dtype=np.uint8)
        for row, at in enumerate(index.tolist()):
            _, tall, wide = found[at].shape
            batch[row, :, :tall, :wide] = found[at]
        return torch.from_numpy(batch), sizes

    def ahead(self, index: Tensor) -> None:
        """Start decoding the first of these positions, at most `PADDED` bytes; other waiting positions are dropped."""
        room = (self.channels * self.sizes[index].prod(dim=1)).cumsum(0) <= PADDED
        self._decoded.keep(index.tolist())
        self._decoded.begin(index[room].tolist())

    def _decode(self, at: int) -> Pixels:
        located, digest = self._images[at]
        try:
            payload = self._listing.fetch(located)
            if hashlib.sha256(payload).hexdigest() != digest:  # these very bytes are decoded
                found = f"{name_of(located)}: changed while it was being read"
                raise DataError(found, "do not change the images during an evaluation; run it again")
            return convert(self._listing.decode(payload), self._settings)
        except UnreadableError as error:
            raise DataError(f"{name_of(located)}: cannot be decoded ({error})", _REPAIR) from error


@contextmanager
def open_folder(
    root: Path,
    channels: int,
    *,
    workers: int | None = None,
    listed: Path | None = None,
    begin: Callable[[int], object] = lambda images: None,
    advance: Callable[[int], object] = lambda images: None,
) -> Iterator[ImageSet]:
    """List and hash all images under `root`; they stay readable inside the block.

    Args:
        root: a folder or zip in one of the layouts of `sources.open_images`.
        channels: 1 or 3, as the encoder expects.
        workers: threads that hash and decode; their number changes no result.
        listed: a list of training images, of which only the classes are used. One of the authors' lists (D1 to D10) gives the
            groups `rare` and `large`; any other list gives `many`, `medium` and `few`, by ImageNet-LT's thresholds.
        begin: called with the number of images before the first is read.
        advance: called with the number of images that were read.

    Raises:
        DataError: there is no such folder; its classes differ between train and val; a class is empty; or a file is not an image.
    """
    root = root.expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such folder or zip", _WHERE)
    with ExitStack() as stack:
        listing = stack.enter_context(sources.open_images(root))
        threads = workers or usable_cores()
        pool = ThreadPoolExecutor(threads)
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        located, chosen, train, notes = _chosen(listing, listed)
        begin(len(located))
        digests, sizes = _identify(listing, located, threads, advance)
        manifest = _manifest(root, located, digests, chosen, train, listed)
        reader = FileReader(listing, list(zip(located, digests, strict=True)), sizes, channels, pool)
        prepared = Prepared(manifest=manifest, store=cast("Store", reader))  # nothing but pixels is read of it
        pixels = params.StoreSettings.model_validate({"channels": channels}).model_dump(mode="json", exclude={"external"})
        yield ImageSet(prepared, reader, pixels, (*listing.notes, *notes))


def open_packed(folder: Path, channels: int, memory: Path | None = None) -> ImageSet:
    """Open a prepared subset of the pipeline as an image set; `DataError` if it is missing or damaged."""
    prepared = open_prepared(folder, memory)
    settings = prepared.store.info.settings
    pixels = settings.model_dump(mode="json", exclude={"external"}) | {"channels": channels}
    if settings.channels != channels:
        pixels["packed_channels"] = settings.channels
    return ImageSet(prepared, StoreReader(prepared.store, channels), pixels)


def _chosen(listing: Listing, listed: Path | None) -> tuple[tuple[Located, ...], Listed | None, set[int], tuple[str, ...]]:
    """The images to use, what the list says, positions of the unlabelled training images, and notes."""
    images = listing.images
    if listed is None:
        return images, None, {at for at, image in enumerate(images) if image.split == "train"}, ()
    if not listed.is_file():
        hint = "give one of the authors' files, D1.txt to D10.txt, or a list such as ImageNet-LT's"
        raise DataError(f"{listed}: no such list", hint)
    authors = parse_list(listed) if is_authors(listed) else parse_labelled(listed)
    absent = sorted(set(authors.classes) - {image.cls for image in images})
    if absent:
        found = f"{listed}: {len(absent)} of its {len(authors.classes)} classes are not among the images, first {absent[0]}"
        raise DataError(found, "the lists name classes of ImageNet; point --data at its folder")
    kept = tuple(image for image in images if image.cls in set(authors.classes))
    wanted = set(authors.images)
    train = {at for at, image in enumerate(kept) if image.split == "train" and (image.cls, image.file) in wanted}
    lacking = len(wanted) - len(train)
    notes = (f"{lacking} of the {len(wanted)} images of {listed.name} are not among the images",) if lacking else ()
    return kept, authors, train, notes


def _identify(
    listing: Listing, located: Sequence[Located], threads: int, advance: Callable[[int], object]
) -> tuple[list[str], Tensor]:
    """Sha256 of each file's bytes, and its height and width from its header."""

    def look(image: Located) -> tuple[str, list[int]]:
        try:
            payload = listing.fetch(image)
            with open_image(payload) as opened:
                return hashlib.sha256(payload).hexdigest(), [opened.height, opened.width]
        except UnreadableError as error:
            return f"{name_of(image)} ({error})", []

    found = []
    for one in in_order(look, located, threads):
        found.append(one)
        advance(1)
    if broken := [name for name, size in found if not size]:
        shown = ", ".join(broken[:5])
        raise DataError(f"{len(broken)} of {len(located)} images cannot be read; first {shown}", _REPAIR)
    return [digest for digest, _ in found], torch.tensor([size for _, size in found], dtype=torch.int64)


def _manifest(
    root: Path, located: Sequence[Located], digests: Sequence[str], chosen: Listed | None, train: set[int], listed: Path | None
) -> Manifest:
    rule = {"source": "folder", "name": "all"}
    large: tuple[str, ...] = ()
    shots: dict[Shot, tuple[str, ...]] = {}
    if listed is not None and chosen is not None:
        large = chosen.large
        rule |= {"name": "list", "list": listed.stem} if large else {"name": "file", "path": listed.name, "sha256": chosen.sha256}
        shots = {} if large else group_by_size(Counter(cls for cls, _ in chosen.images), params.Shots())
    return Manifest(
        dataset=printable(root.resolve().name),
        subset="folder",
        rule=dict(rule),
        classes=tuple(sorted({image.cls for image in located})),
        large=large,
        images=tuple(Image(image.split, image.cls, image.file, digest) for image, digest in zip(located, digests, strict=True)),
        train=np.array(sorted(train), np.int64),
        search=np.flatnonzero([image.split == "train" for image in located]),
        query=np.flatnonzero([image.split == "val" for image in located]),
        shots=shots,
    )
