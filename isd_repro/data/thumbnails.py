"""Packed images as small pictures for a page. Pictures of a data set are for the reader's own machine and are never committed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from isd_repro.data.store import Store

SIDE = 64  # px of the longer side, at most


def picture(store: Store, position: int, side: int = SIDE) -> Image.Image:
    """One image of the store, made smaller where its longer side is above `side`, never larger."""
    pixels, _ = store.read(torch.tensor([position]))
    array = pixels[0].numpy()
    image = Image.fromarray(array[0]) if len(array) == 1 else Image.fromarray(array.transpose(1, 2, 0))
    image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return image


def data_uris(store: Store, positions: Iterable[int], side: int = SIDE) -> dict[int, str]:
    """Images as `data:` addresses of PNG files, by position."""
    found = {}
    for position in sorted(set(positions)):
        content = base64.b64encode(_png(picture(store, position, side))).decode()
        found[position] = f"data:image/png;base64,{content}"
    return found


def grid(store: Store, rows: Sequence[Sequence[int]], side: int = SIDE, gap: int = 2) -> Tensor:
    """Images on a grid, each in the middle of a square of `side` px, as uint8 RGB, 3 x H x W.

    Args:
        store: the packed images.
        rows: positions in it; rows may be uneven.
        side: px.
        gap: px between squares.
    """
    step = side + gap
    wide = max((len(row) for row in rows), default=0)
    sheet = Image.new("RGB", (max(wide * step - gap, 1), max(len(rows) * step - gap, 1)), (128, 128, 128))
    for y, row in enumerate(rows):
        for x, position in enumerate(row):
            image = picture(store, position, side)
            sheet.paste(image, (x * step + (side - image.width) // 2, y * step + (side - image.height) // 2))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
