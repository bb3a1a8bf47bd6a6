"""Thumbnails, and grids of training views, of queries with their nearest images, and of clusters.

Thumbnails of a data set are for the reader's own machine and are never committed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from isd_repro.data.store import Store

GAP = 3  # pixels around an image; the inner ones take the mark
RIGHT, WRONG, PLAIN = (0, 150, 60), (210, 40, 40), (255, 255, 255)
SIDE = 64  # pixels of a thumbnail's longer side, at most
_LEAST = 64  # pixels; a smaller image is enlarged by a whole factor


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert normalised float images, B x C x H x W, to uint8 RGB, B x 3 x H x W, on the CPU."""
    shape = (1, len(mean), 1, 1)
    restored = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return (restored * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def thumbnails(pixels: Tensor, sizes: Tensor) -> Tensor:
    """Central squares of stored images (uint8, B x C x H x W, padded; sizes B x 2) as uint8 RGB, B x 3 x S x S."""
    side = min(_LEAST, int(sizes.min()))
    found = []
    for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        square = image[None, :, top : top + short, left : left + short].float()
        small = F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)
        found.append(small.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(found).expand(-1, 3, -1, -1)


def sheet(rows: Sequence[Tensor], marks: Tensor | None = None) -> Tensor:
    """Put images into a grid.

    Args:
        rows: uint8 RGB images of each row of the grid, n x 3 x H x W, all of one shape.
        marks: int64, rows x n; 1 frames an image as right, 0 as wrong, -1 not at all. None frames nothing.

    Returns:
        uint8, 3 x height x width.
    """
    grid = torch.stack(list(rows))  # rows x n x 3 x H x W
    factor = max(1, _LEAST // min(grid.shape[-2:]))
    grid = grid.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    marks = torch.full(grid.shape[:2], -1) if marks is None else marks
    colours = torch.tensor([PLAIN, WRONG, RIGHT], dtype=torch.uint8)[marks + 1]  # rows x n x 3
    framed = colours[..., None, None].repeat(1, 1, 1, grid.shape[-2] + 2 * GAP, grid.shape[-1] + 2 * GAP)
    framed[..., GAP:-GAP, GAP:-GAP] = grid
    framed = F.pad(framed, (1, 1, 1, 1), value=255)
    height, width = grid.shape[0] * framed.shape[-2], grid.shape[1] * framed.shape[-1]
    return framed.permute(2, 0, 3, 1, 4).reshape(3, height, width)


def picture(store: Store, position: int, side: int = SIDE) -> Image.Image:
    """One image of the store, reduced so that its longer side is at most `side` pixels; it is never enlarged."""
    pixels, _ = store.read(torch.tensor([position]))
    array = pixels[0].numpy()
    image = Image.fromarray(array[0]) if len(array) == 1 else Image.fromarray(array.transpose(1, 2, 0))
    image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return image


def data_uris(store: Store, positions: Iterable[int], side: int = SIDE) -> dict[int, str]:
    """Images as `data:` URIs of PNG files, by position."""
    found = {}
    for position in sorted(set(positions)):
        buffer = io.BytesIO()
        picture(store, position, side).save(buffer, "PNG")
        found[position] = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return found


def grid(store: Store, rows: Sequence[Sequence[int]], side: int = SIDE, gap: int = 2) -> Tensor:
    """Images on a grid, each in the middle of a square of `side` px, as uint8 RGB, 3 x H x W.

    Args:
        store: the packed images.
        rows: positions in it; rows may be uneven.
        side: px.
        gap: px between squares.
    """
    step, wide = side + gap, max((len(row) for row in rows), default=0)
    sheet = Image.new("RGB", (max(wide * step - gap, 1), max(len(rows) * step - gap, 1)), (128, 128, 128))
    for y, row in enumerate(rows):
        for x, position in enumerate(row):
            image = picture(store, position, side)
            sheet.paste(image, (x * step + (side - image.width) // 2, y * step + (side - image.height) // 2))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
