"""Contact sheets for a person's eye: views of training images, queries beside their nearest images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 3  # pixels around an image; the inner ones take the mark
RIGHT, WRONG, PLAIN = (0, 150, 60), (210, 40, 40), (255, 255, 255)
_LEAST = 64  # pixels; a smaller image is enlarged by a whole factor


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised float images, B x C x H x W, as uint8 RGB, B x 3 x H x W, on the CPU."""
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
