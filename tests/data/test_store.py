"""Stores: what is read is what PIL decodes, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from isd_repro.config import params
from isd_repro.data.store import INDEX, PIXELS, Store, StoreInfo, StoreWriter, convert
from isd_repro.runtime.errors import DataError


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pack(folder: Path, images: list[Image.Image], settings: params.Store) -> StoreInfo:
    with StoreWriter(folder, settings) as writer:
        for image in images:
            writer.append(convert(image, settings))
        return writer.finish()


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_sizes_read_back_pixel_by_pixel(channels: int, tmp_path: Path) -> None:
    images = [noise(5, 8, seed) for seed in range(4)]
    settings = params.Store.model_validate({"channels": channels})
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
    store = Store(tmp_path, pack(tmp_path, images, params.Store()))
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
    store = Store(tmp_path, pack(tmp_path, [noise(4, 4), noise(4, 5 if ragged else 4)], params.Store()))
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            store.read(torch.tensor([0, wrong]))
    assert store.read(torch.empty(0, dtype=torch.int64))[0].shape[:2] == (0, 3)


def test_square_is_antialiased_bilinear() -> None:
    image = noise(40, 60)
    found = convert(image, params.Store(resize="square", size=10))
    wanted = F.resize(image, [10, 10], InterpolationMode.BILINEAR, antialias=True)
    assert found.shape == (3, 10, 10)
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(wanted))


@pytest.mark.parametrize(("height", "width"), [(41, 60), (60, 41), (30, 30), (5, 9), (16, 33)])
def test_short_side_is_torchvisions_resize(height: int, width: int) -> None:
    image = noise(height, width)
    found = convert(image, params.Store(resize="short-side", size=16))
    wanted = F.resize(image, [16], InterpolationMode.BILINEAR, antialias=True)
    assert min(found.shape[1:]) == 16
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(wanted))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = noise(6, 6).convert(mode)
    assert np.array_equal(convert(image, params.Store()).transpose(1, 2, 0), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("change", [b"", b"more"])
def test_a_store_of_another_length_is_refused(change: bytes, tmp_path: Path) -> None:
    info = pack(tmp_path, [noise(4, 4), noise(4, 5)], params.Store())
    path = tmp_path / PIXELS
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"has {108 + 4 if change else 107} bytes, the manifest says 108 bytes"):
        Store(tmp_path, info)


@pytest.mark.parametrize("file", [PIXELS, INDEX])
def test_a_missing_file_is_named(file: str, tmp_path: Path) -> None:
    info = pack(tmp_path, [noise(4, 4)], params.Store())
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=file):
        Store(tmp_path, info)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    info = pack(tmp_path, [noise(4, 4), noise(4, 5)], params.Store())
    content = bytearray((tmp_path / INDEX).read_bytes())
    content[-1] ^= 1
    (tmp_path / INDEX).write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        Store(tmp_path, info)


@pytest.mark.parametrize("update", [{"images": 3}, {"bytes": 96}])
def test_an_index_of_another_store_is_refused(update: dict[str, int], tmp_path: Path) -> None:
    info = pack(tmp_path, [noise(4, 4), noise(4, 5)], params.Store()).model_copy(update=update)
    with pytest.raises(DataError, match="does not describe"):
        Store(tmp_path, info)


def test_verify_hashes_every_byte(tmp_path: Path) -> None:
    store = Store(tmp_path, pack(tmp_path, [noise(4, 4)], params.Store()))
    store.verify()
    content = bytearray((tmp_path / PIXELS).read_bytes())
    content[5] ^= 1
    (tmp_path / PIXELS).write_bytes(bytes(content))
    with pytest.raises(DataError, match="sha256 is"):
        Store(tmp_path, store.info).verify()


def test_an_external_key_tells_settings_apart(tmp_path: Path) -> None:
    info = pack(tmp_path, [noise(4, 4)], params.Store())
    settings = [
        params.Store(),
        params.Store(channels=1),
        params.Store(resize="square", size=8),
        params.Store(resize="short-side", size=8),
        params.Store(resize="square", size=9),
    ]
    keys = {info.model_copy(update={"settings": one}).key("abc") for one in settings}
    assert len(keys) == len(settings)
    assert all(key.startswith("abc-") for key in keys)
