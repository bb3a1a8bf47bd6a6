"""Stores: what is read is what PIL decodes, and damage is noticed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from isd_repro.config import params
from isd_repro.data import store as stores
from isd_repro.data.store import INDEX, JPEGS, PIXELS, Store, StoreInfo, convert, encode
from isd_repro.runtime.errors import DataError
from tests.data import trees


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pack(folder: Path, images: list[Image.Image], settings: params.StoreSettings) -> StoreInfo:
    return trees.packed(folder, [convert(image, settings) for image in images], settings)


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_sizes_read_back_pixel_by_pixel(channels: int, tmp_path: Path) -> None:
    images = [noise(5, 8, seed) for seed in range(4)]
    settings = params.StoreSettings.model_validate({"channels": channels})
    store = Store(tmp_path, pack(tmp_path, images, settings))
    pixels, sizes = store.read(torch.tensor([2, 0, 2]))
    assert pixels.dtype == torch.uint8
    for row, source in enumerate((2, 0, 2)):
        wanted = np.asarray(images[source].convert("RGB" if channels == 3 else "L")).reshape(5, 8, channels)
        assert np.array_equal(pixels[row].numpy().transpose(1, 2, 0), wanted)
    assert sizes.tolist() == [[5, 8]] * 3
    pixels.zero_()
    assert store.read(torch.tensor([0]))[0].any()
    assert len(store) == 4


def test_ragged_images_are_padded_at_the_bottom_and_right(tmp_path: Path) -> None:
    images = [noise(5, 8, 0), noise(7, 3, 1), noise(4, 4, 2)]
    store = Store(tmp_path, pack(tmp_path, images, params.StoreSettings()))
    pixels, sizes = store.read(torch.tensor([1, 0]))
    assert pixels.shape == (2, 3, 7, 8)
    assert sizes.tolist() == [[7, 3], [5, 8]]
    for row, source in enumerate((1, 0)):
        height, width = sizes[row].tolist()
        assert np.array_equal(pixels[row, :, :height, :width].numpy().transpose(1, 2, 0), np.asarray(images[source]))
        assert pixels[row].sum() == pixels[row, :, :height, :width].sum()
    assert store.read(torch.tensor([2]))[0].shape == (1, 3, 4, 4)
    assert store.sizes.tolist() == [[5, 8], [7, 3], [4, 4]]


@pytest.mark.parametrize("ragged", [False, True])
def test_positions_outside_are_refused_and_none_is_fine(ragged: bool, tmp_path: Path) -> None:
    store = Store(tmp_path, pack(tmp_path, [noise(4, 4), noise(4, 5 if ragged else 4)], params.StoreSettings()))
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            store.read(torch.tensor([0, wrong]))
    assert store.read(torch.empty(0, dtype=torch.int64))[0].shape[:2] == (0, 3)


def test_square_is_antialiased_bilinear() -> None:
    image = noise(40, 60)
    found = convert(image, params.StoreSettings(resize="square", side=10))
    wanted = F.resize(image, [10, 10], InterpolationMode.BILINEAR, antialias=True)
    assert found.shape == (3, 10, 10)
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(wanted))


@pytest.mark.parametrize(("height", "width"), [(41, 60), (60, 41), (30, 30), (5, 9), (16, 33)])
def test_short_side_is_torchvisions_resize(height: int, width: int) -> None:
    image = noise(height, width)
    found = convert(image, params.StoreSettings(resize="short-side", side=16))
    wanted = F.resize(image, [16], InterpolationMode.BILINEAR, antialias=True)
    assert min(found.shape[1:]) == 16
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(wanted))


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {  # the file, what becomes of it, what is said
    "shorter": (PIXELS, lambda content: content[:-1], "has 107 bytes, but the manifest says 108 bytes"),
    "longer": (PIXELS, lambda content: content + b"more", "has 112 bytes, but the manifest says 108 bytes"),
    "no pixels": (PIXELS, None, r"store\.u8: is missing"),
    "no index": (INDEX, None, r"store\.npy: no such file"),
    "another index": (INDEX, lambda content: content[:-1] + b"x", r"store\.npy: damaged: sha256 is"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused(kind: str, tmp_path: Path) -> None:
    info = pack(tmp_path, [noise(4, 4), noise(4, 5)], params.StoreSettings())
    file, change, message = DAMAGE[kind]
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink() if change is None else (tmp_path / file).write_bytes(change(content))
    with pytest.raises(DataError, match=message):
        Store(tmp_path, info)


def test_verify_hashes_every_byte(tmp_path: Path) -> None:
    store = Store(tmp_path, pack(tmp_path, [noise(4, 4)], params.StoreSettings()))
    store.verify()
    content = bytearray((tmp_path / PIXELS).read_bytes())
    content[5] ^= 1
    (tmp_path / PIXELS).write_bytes(bytes(content))
    with pytest.raises(DataError, match="sha256 is"):
        Store(tmp_path, store.info).verify()


# --- JPEGs ---

SHAPES = [(40, 61), (61, 40), (33, 33), (40, 50), (90, 33)]


def picture(height: int, width: int, seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pack_jpegs(folder: Path, settings: params.StoreSettings, count: int = len(SHAPES)) -> StoreInfo:
    return pack(folder, [picture(*shape, seed) for seed, shape in enumerate(SHAPES[:count])], settings)


def expected(seed: int, settings: params.StoreSettings) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """By Pillow alone: resized, written as JPEG, read again; channels x height x width."""
    image = picture(*SHAPES[seed], seed).convert("RGB" if settings.channels == 3 else "L")
    if settings.side is not None:
        scale = settings.side / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.jpeg_quality, subsampling=2)
    pixels = np.asarray(Image.open(buffer))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_number_of_workers_reads_what_pillow_reads(channels: int, workers: int, tmp_path: Path) -> None:
    settings = params.StoreSettings.model_validate({"resize": "short-side", "size": 32, "channels": channels, "jpeg_quality": 85})
    store = Store(tmp_path, pack_jpegs(tmp_path, settings), workers)
    order = torch.tensor([3, 0, 1, 4, 2, 0])
    pixels, sizes = store.read(order)
    wanted = [expected(seed, settings) for seed in order.tolist()]
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (6, channels, max(w.shape[1] for w in wanted), max(w.shape[2] for w in wanted))
    for row, want in enumerate(wanted):
        height, width = sizes[row].tolist()
        assert np.array_equal(pixels[row, :, :height, :width].numpy(), want)
        assert int(pixels[row].sum()) == int(want.astype(np.int64).sum()), "the padding is not zero"
    assert store.read(torch.empty(0, dtype=torch.int64))[0].shape[:2] == (0, channels)
    with pytest.raises(IndexError, match=r"0\.\.4"):
        store.read(torch.tensor([5]))


def test_a_flipped_byte_is_found_by_its_hash_and_a_broken_jpeg_is_named(tmp_path: Path) -> None:
    settings = params.StoreSettings(jpeg_quality=90)
    info = pack_jpegs(tmp_path, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JPEGS, INDEX]
    content = bytearray((tmp_path / JPEGS).read_bytes())
    start = sum(encode(convert(picture(*SHAPES[seed], seed), settings), settings)[1].length for seed in range(2))
    content[start] ^= 0xFF  # the third image's first byte
    (tmp_path / JPEGS).write_bytes(bytes(content))
    store = Store(tmp_path, info)
    with pytest.raises(DataError, match=r"store\.jpegs: sha256 is"):
        store.verify()
    store.read(torch.tensor([0, 1, 3]))
    with pytest.raises(DataError, match=r"store\.jpegs: image 2 \(counted from 0\) is damaged"):
        store.read(torch.tensor([0, 2]))
    (tmp_path / JPEGS).write_bytes(bytes(content[:-1]))
    with pytest.raises(DataError, match="the manifest says"):
        Store(tmp_path, info)


def test_a_jpeg_of_another_size_is_refused(tmp_path: Path) -> None:
    settings = params.StoreSettings(jpeg_quality=90)
    info = pack_jpegs(tmp_path, settings, 2)
    content = (tmp_path / JPEGS).read_bytes()
    first, _ = encode(convert(picture(*SHAPES[0], 0), settings), settings)
    flat = encode(convert(picture(8, 8, 0), settings), settings)[0].ljust(len(first), b"\0")
    (tmp_path / JPEGS).write_bytes(flat + content[len(first) :])
    with pytest.raises(DataError, match=r"image 0 .* shows \(8, 8, 3\), expected \(40, 61, 3\)"):
        Store(tmp_path, info).read(torch.tensor([0]))


def test_what_is_said_of_stores_of_pixels_is_as_before() -> None:
    """Manifests and fingerprints from before there were JPEGs must stay what they are."""
    plain = params.StoreSettings(resize="short-side", side=256, external=True)
    before = {"resize": "short-side", "size": 256, "channels": 3, "external": True}
    assert plain.model_dump(mode="json") == json.loads(plain.model_dump_json()) == before
    assert plain.model_dump(mode="json", exclude={"external"}) == {key: before[key] for key in ("resize", "size", "channels")}
    assert params.StoreSettings.model_validate(before) == plain, "the old name of side is still read"
    with pytest.raises(ValidationError, match="give only side"):
        params.StoreSettings.model_validate({**before, "side": 256})
    jpeg = plain.model_copy(update={"jpeg_quality": 90})
    assert jpeg.model_dump(mode="json") == {**before, "jpeg_quality": 90}
    info = StoreInfo(settings=plain, images=1, bytes=1, sha256="", index_sha256="")
    assert json.loads(info.model_dump_json())["settings"] == before
    assert StoreInfo.model_validate_json(info.model_dump_json()) == info
    keys = {info.model_copy(update={"settings": one}).key("abc") for one in (plain, jpeg, params.StoreSettings(jpeg_quality=80))}
    assert keys == {"abc-short-side-256-c3", "abc-short-side-256-c3-q90", "abc-none-c3-q80"}
    assert (stores.file_of(plain), stores.file_of(jpeg)) == (PIXELS, JPEGS)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    for ranks, want in (("1", 12), ("4", 3), ("5", 2), ("64", 1), ("many", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert stores.usable_cores() == want
