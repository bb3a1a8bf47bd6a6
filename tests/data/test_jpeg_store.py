"""Stores of JPEGs: what is read is what Pillow decodes, whoever decodes it; damage is named; other stores are as before."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isd_repro.config import params
from isd_repro.data import store as stores
from isd_repro.data.encoding import decode_into, encode
from isd_repro.data.store import INDEX, JPEGS, PIXELS, Store, StoreInfo, StoreWriter, convert
from isd_repro.runtime.errors import DataError

SHAPES = [(40, 61), (61, 40), (33, 33), (40, 50), (90, 33)]


def picture(height: int, width: int, seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pack(folder: Path, settings: params.Store, count: int = len(SHAPES)) -> StoreInfo:
    with StoreWriter(folder, settings) as writer:
        for seed, (height, width) in enumerate(SHAPES[:count]):
            writer.append(convert(picture(height, width, seed), settings))
        return writer.finish()


def expected(seed: int, settings: params.Store) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """By Pillow alone: resized, written as JPEG, read again; channels x height x width."""
    image = picture(*SHAPES[seed], seed).convert("RGB" if settings.channels == 3 else "L")
    if settings.size is not None:
        scale = settings.size / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.jpeg_quality, subsampling=2)
    pixels = np.asarray(Image.open(buffer))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_number_of_workers_reads_what_pillow_reads(channels: int, workers: int, tmp_path: Path) -> None:
    settings = params.Store.model_validate({"resize": "short-side", "size": 32, "channels": channels, "jpeg_quality": 85})
    store = Store(tmp_path, pack(tmp_path, settings), workers)
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


def test_quality_decides_size_and_nearness(tmp_path: Path) -> None:
    found = {}
    for quality in (30, 95):
        settings = params.Store(jpeg_quality=quality)
        (tmp_path / str(quality)).mkdir()
        store = Store(tmp_path / str(quality), pack(tmp_path / str(quality), settings, 1))
        want = np.asarray(picture(*SHAPES[0], 0)).transpose(2, 0, 1).astype(int)
        found[quality] = (store.info.bytes, float(np.abs(store.read(torch.tensor([0]))[0][0].numpy() - want).mean()))
    assert found[30][0] < found[95][0]
    assert found[30][1] > found[95][1]
    assert found[95][1] < 3


def test_a_flipped_byte_is_found_by_its_hash_and_a_broken_jpeg_is_named(tmp_path: Path) -> None:
    settings = params.Store(jpeg_quality=90)
    info = pack(tmp_path, settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JPEGS, INDEX]
    content = bytearray((tmp_path / JPEGS).read_bytes())
    start = sum(len(encode(convert(picture(*SHAPES[seed], seed), settings), settings)) for seed in range(2))
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


def test_an_image_of_another_size_is_refused() -> None:
    content = encode(convert(picture(20, 30, 0), params.Store()), params.Store(jpeg_quality=90))
    decode_into(content, np.empty((20, 30, 3), np.uint8))
    for shape in ((30, 20, 3), (20, 30, 1)):
        with pytest.raises(ValueError, match="expected"):
            decode_into(content, np.empty(shape, np.uint8))


def test_what_is_said_of_stores_of_pixels_is_as_before() -> None:
    """Manifests and fingerprints from before there were JPEGs must stay what they are."""
    plain = params.Store(resize="short-side", size=256, external=True)
    before = {"resize": "short-side", "size": 256, "channels": 3, "external": True}
    assert plain.model_dump(mode="json") == json.loads(plain.model_dump_json()) == before
    assert plain.model_dump(mode="json", exclude={"external"}) == {key: before[key] for key in ("resize", "size", "channels")}
    jpeg = plain.model_copy(update={"jpeg_quality": 90})
    assert jpeg.model_dump(mode="json") == {**before, "jpeg_quality": 90}
    info = StoreInfo(settings=plain, images=1, bytes=1, sha256="", index_sha256="")
    assert json.loads(info.model_dump_json())["settings"] == before
    assert StoreInfo.model_validate_json(info.model_dump_json()) == info
    keys = {info.model_copy(update={"settings": one}).key("abc") for one in (plain, jpeg, params.Store(jpeg_quality=80))}
    assert keys == {"abc-short-side-256-c3", "abc-short-side-256-c3-q90", "abc-none-c3-q80"}
    assert (stores.file_of(plain), stores.file_of(jpeg)) == (PIXELS, JPEGS)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    for ranks, want in (("1", 12), ("4", 3), ("5", 2), ("64", 1), ("many", 12)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert stores.usable_cores() == want
