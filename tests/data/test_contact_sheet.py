"""Thumbnails are the store's own pixels."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isd_repro.config.params import StoreSettings
from isd_repro.data import contact_sheet
from isd_repro.data.store import Store
from tests.data import trees

SIZES = [(6, 9), (6, 9), (40, 20), (4, 4)]  # height, width


@pytest.fixture(params=[1, 3])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, list[np.ndarray]]:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (request.param, *size), dtype=np.uint8) for size in SIZES]
    return Store(tmp_path, trees.packed(tmp_path, images, StoreSettings(channels=request.param))), images


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_small_image_is_shown_as_it_is(packed: tuple[Store, list[np.ndarray]]) -> None:
    store, images = packed
    uris = contact_sheet.data_uris(store, [3, 0, 3])
    assert list(uris) == [0, 3]
    for position, uri in uris.items():
        prefix = "data:image/png;base64,"
        assert uri.startswith(prefix)
        shown = decoded(base64.b64decode(uri.removeprefix(prefix)))
        expected = images[position].transpose(1, 2, 0).squeeze()
        assert np.array_equal(shown, expected)
    assert contact_sheet.data_uris(store, [0]) == {0: uris[0]}


def test_a_large_image_is_made_smaller_by_means(packed: tuple[Store, list[np.ndarray]]) -> None:
    store, images = packed
    shown = np.asarray(contact_sheet.picture(store, 2, side=20)).reshape(20, 10, -1)
    means = images[2].astype(float).reshape(-1, 20, 2, 10, 2).mean(axis=(2, 4)).transpose(1, 2, 0)
    assert np.abs(shown - means).max() <= 1.0  # PIL rounds after each axis


def test_a_grid_holds_each_image_in_its_place(packed: tuple[Store, list[np.ndarray]]) -> None:
    store, images = packed
    grid = contact_sheet.grid(store, [[3, 0], [1]], side=9, gap=1).permute(1, 2, 0).numpy()
    assert grid.shape == (19, 19, 3)

    def colour(position: int) -> np.ndarray:
        return np.broadcast_to(images[position].transpose(1, 2, 0), (*SIZES[position], 3))

    assert np.array_equal(grid[2:6, 2:6], colour(3))
    assert np.array_equal(grid[1:7, 10:19], colour(0))
    assert np.array_equal(grid[11:17, 0:9], colour(1))
    assert (grid[10:19, 9:19] == 128).all(), "a row that is shorter ends in the ground"
