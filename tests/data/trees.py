"""Tiny image sets in every layout that the sources read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from isd_repro.config import params
from isd_repro.data.sources import Listing, Located
from isd_repro.data.store import Pixels, StoreInfo, StoreWriter, encode

Files = dict[tuple[str, str, str], bytes]  # (split, class, file) -> bytes


def jpeg(seed: int, width: int = 9, height: int = 7) -> bytes:
    """A noise image; equal seeds are equal bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def images(counts: Mapping[str, int], val: int = 2, *, ragged: bool = False) -> Files:
    """`counts` train images and `val` validation images of each class, with names as Tiny-ImageNet has them."""
    files: Files = {}
    for position, (cls, count) in enumerate(counts.items()):
        for number in range(count):
            width = 9 + (number % 3 if ragged else 0)
            files["train", cls, f"{cls}_{number}.JPEG"] = jpeg(1000 * position + number, width)
        for number in range(val):
            files["val", cls, f"val_{position * val + number}.JPEG"] = jpeg(1_000_000 + 1000 * position + number)
    return files


def write(root: Path, content: Mapping[str, bytes | str]) -> Path:
    """Files by their paths below the root."""
    for name, value in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value.encode() if isinstance(value, str) else value)
    return root


def write_plain(root: Path, files: Files) -> Path:
    """split/<class>/<file>."""
    return write(root, {"/".join(key): content for key, content in files.items()})


def official(files: Files) -> dict[str, bytes]:
    """Tiny-ImageNet's own layout as relative paths, with its box files and annotations."""
    paths = {}
    annotations = ""
    for (split, cls, file), content in files.items():
        if split == "train":
            paths[f"train/{cls}/images/{file}"] = content
            paths[f"train/{cls}/{cls}_boxes.txt"] = b"a box\n"
        else:
            paths[f"val/images/{file}"] = content
            annotations += f"{file}\t{cls}\t0\t0\t9\t9\n"
    paths["val/val_annotations.txt"] = annotations.encode()
    paths["words.txt"] = b"n0\tnothing\n"
    paths["test/images/test_0.JPEG"] = jpeg(7)
    return paths


def write_official(root: Path, files: Files) -> Path:
    """Tiny-ImageNet's own layout, unpacked."""
    return write(root, official(files))


def write_zip(path: Path, entries: Mapping[str, bytes], prefix: str = "tiny-imagenet-200/") -> Path:
    """A zip with its content in a folder, as the official one."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(prefix + name, content)
        archive.writestr("__MACOSX/train/n9/._x.JPEG", b"junk")
    return path


def located(counts: Mapping[str, int], val: int = 10) -> list[Located]:
    """An image list without images."""
    rows = [Located("train", cls, f"{cls}_{number}.JPEG", "") for cls, count in counts.items() for number in range(count)]
    return rows + [Located("val", cls, f"val_{cls}_{number}.JPEG", "") for cls in counts for number in range(val)]


def content(listing: Listing) -> Files:
    """What a source gives."""
    return {image.key: listing.fetch(image) for image in listing.images}


def packed(folder: Path, images: Iterable[Pixels], settings: params.StoreSettings) -> StoreInfo:
    """A store of images, uint8 channels x height x width."""
    with StoreWriter(folder, settings) as writer:
        for image in images:
            writer.add(*encode(image, settings))
        return writer.finish()


def subset(
    rule: params.Rule | None = None,
    *,
    search: int | None = None,
    query: int | None = None,
    source: str = "image-folder",
    corrupt_share: float = 0.0,
    store: params.StoreSettings | None = None,
    shots: params.Shots | None = None,
) -> params.Subset:
    """A subset's parameters; its images are where ISD_TEST_ROOT says."""
    return params.Subset(
        source=params.Source.model_validate({"name": source, "root_env": "ISD_TEST_ROOT", "dataset": "Tiny images"}),
        rule=rule or params.AllClasses(name="all"),
        search_per_class=search,
        query_per_class=query,
        corrupt_share=corrupt_share,
        store=store or params.StoreSettings(),
        shots=shots,
    )
