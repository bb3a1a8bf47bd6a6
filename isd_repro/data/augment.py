"""Augmented views of a whole batch at once, on any device, with the distribution of torchvision's transforms for each image.

Crop, resize and flip are two batched matrix products with per-image antialiased triangle weights; the colour operations
act on floats in 0..1. All random numbers come from one explicit CPU generator, so that a view depends only on the seed and the
step. The released code works on 8-bit PIL images instead.  # DEV-01

Shapes: B batch, C channels, H W padded source size, S side of the view, T blur taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Generator, Tensor

from isd_repro.config.params import Blur, Jitter, View

ASPECT = (3 / 4, 4 / 3)  # torchvision's default ratio range
Change = Callable[[Tensor, Tensor], Tensor]  # images B x C x S x S in 0..1, factor or shift B x 1 x 1 x 1 -> images
_ATTEMPTS = 10
_LINE = 16  # floats in 64 bytes
_GRAY = (0.2989, 0.587, 0.114)


class _Rows:
    """Base of the random values of a batch: every field has one row per image, or is another such object, or is None."""

    def at(self, rows: Tensor) -> Self:
        """The random values of these images only."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self)(
            *(None if value is None else value.at(rows) if isinstance(value, _Rows) else value[rows] for value in values)
        )


@dataclass(frozen=True)
class Crop(_Rows):
    """Crop windows of a batch in source pixels; each field is a float tensor of B values."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool, B


@dataclass(frozen=True)
class Colours(_Rows):
    """Random values for `jitter`."""

    chosen: Tensor  # bool, B
    order: Tensor  # int64, B x 4: the operations, first to last
    factor: Tensor  # B x 4, by operation


@dataclass(frozen=True)
class Softness(_Rows):
    """Random values for `blur`."""

    chosen: Tensor  # bool, B
    sigma: Tensor  # pixels, B


@dataclass(frozen=True)
class Drawn(_Rows):
    """All random values of one view of a batch; None for operations that the settings do not have."""

    crop: Crop
    colours: Colours | None
    gray: Tensor | None  # bool, B
    softness: Softness | None
    solarised: Tensor | None  # bool, B


def view(pixels: Tensor, sizes: Tensor, settings: View, size: int, generator: Generator) -> Tensor:
    """One augmented view of each image.

    Args:
        pixels: uint8, B x C x H x W, padded at the bottom and right.
        sizes: int64, B x 2, true height and width of each image.
        settings: the augmentation.
        size: side of the view in pixels.
        generator: a CPU generator, advanced by the same amount whatever the images show.

    Returns:
        Float32 in 0..1, B x C x size x size, on the device of `pixels`.
    """
    return apply(pixels, draw(sizes, settings, generator), settings, size)


def draw(sizes: Tensor, settings: View, generator: Generator) -> Drawn:
    """Draw the random values of a view of a batch; those of one image depend only on its position and its size.

    Args:
        sizes: int64, B x 2, height and width of each image in pixels.
        settings: the augmentation.
        generator: a CPU generator.
    """
    count = len(sizes)
    crop = draw_crop(sizes.cpu(), settings, generator)
    colours = None if settings.jitter is None else _draw_colours(count, settings.jitter, generator)
    gray = torch.rand(count, generator=generator) < settings.grayscale if settings.grayscale > 0 else None
    softness = None if settings.blur is None else _draw_softness(count, settings.blur, generator)
    solarised = torch.rand(count, generator=generator) < settings.solarise if settings.solarise > 0 else None
    return Drawn(crop, colours, gray, softness, solarised)


def apply(pixels: Tensor, drawn: Drawn, settings: View, size: int, changes: tuple[Change, ...] | None = None) -> Tensor:
    """Compute the view that was drawn for these images; types and shapes as for `view`, `changes` as `CHANGES`, the default."""
    images = resample(pixels, drawn.crop, size)
    if drawn.colours is not None:
        images = _recolour(images, drawn.colours, changes or CHANGES)
    if drawn.gray is not None:
        images = torch.where(to_device(drawn.gray, images.device)[:, None, None, None], _luma(images).expand_as(images), images)
    if drawn.softness is not None and settings.blur is not None:
        images = _soften(images, drawn.softness, settings.blur)
    if drawn.solarised is not None:  # as torchvision's RandomSolarize with BYOL's threshold, a half
        chosen = to_device(drawn.solarised, images.device)[:, None, None, None]
        images = torch.where(chosen & (images >= 0.5), 1 - images, images)
    return images


def draw_crop(sizes: Tensor, settings: View, generator: Generator) -> Crop:
    """Draw crops like torchvision's RandomResizedCrop (ten tries of area and aspect, else the largest central one), and flips."""
    count = len(sizes)
    height, width = sizes[:, :1].double(), sizes[:, 1:].double()
    share = settings.crop_min + (settings.crop_max - settings.crop_min) * torch.rand(
        count, _ATTEMPTS, generator=generator, dtype=torch.float64
    )
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = torch.exp(low + (high - low) * torch.rand(count, _ATTEMPTS, generator=generator, dtype=torch.float64))
    area = height * width * share
    wide, tall = torch.sqrt(area * aspect).round(), torch.sqrt(area / aspect).round()
    fits = (wide > 0) & (wide <= width) & (tall > 0) & (tall <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    at = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    flip = torch.rand(count, generator=generator) < settings.flip

    height, width = height[:, 0], width[:, 0]
    narrow, broad = width / height < ASPECT[0], width / height > ASPECT[1]
    window_h = torch.where(found, tall.gather(1, first)[:, 0], torch.where(narrow, (width / ASPECT[0]).round(), height))
    window_w = torch.where(found, wide.gather(1, first)[:, 0], torch.where(broad, (height * ASPECT[1]).round(), width))
    top = torch.where(found, (at[:, 0] * (height - window_h + 1)).floor(), ((height - window_h) / 2).floor())
    left = torch.where(found, (at[:, 1] * (width - window_w + 1)).floor(), ((width - window_w) / 2).floor())
    return Crop(top.float(), left.float(), window_h.float(), window_w.float(), flip)


def resample(pixels: Tensor, crop: Crop, size: int) -> Tensor:
    """Cut out the windows and resize them, bilinear with antialiasing; returns float32 in 0..1, B x C x size x size."""
    count, channels, height, width = pixels.shape
    top, left, tall, wide, flip = (
        to_device(each, pixels.device) for each in (crop.top, crop.left, crop.height, crop.width, crop.flip)
    )
    rows_BSH = _triangle(top, tall, size, height, None)
    cols_BSW = _triangle(left, wide, size, width, flip)
    images = _aligned(pixels.float().div_(255).reshape(count, channels * height, width))
    images = torch.bmm(images, _aligned(cols_BSW).transpose(1, 2)).view(count * channels, height, size)
    rows = rows_BSH.repeat_interleave(channels, 0) if channels > 1 else rows_BSH
    return torch.bmm(_aligned(rows), _aligned(images)).view(count, channels, size, size)


def _aligned(matrices: Tensor) -> Tensor:
    """The same float matrices, each starting at a multiple of 64 bytes, because BLAS may round differently for other addresses.

    With this alignment an image's view does not depend on its position in the batch. If sides are multiples of 16, nothing is
    copied.
    """
    size = matrices[0].numel()
    if size % _LINE == 0:
        return matrices
    room = matrices.new_empty(len(matrices), size + -size % _LINE)[:, :size].view(matrices.shape)
    return room.copy_(matrices)


def centre(pixels: Tensor, sizes: Tensor, size: int, crop_ratio: float) -> Tensor:
    """The evaluation view: the central size x size window after an antialiased resize of the short side to size / crop_ratio.

    The paper's Resize 256 and CenterCrop 224 are size 224 and crop_ratio 0.875. Shapes are those of `view`.
    """
    sizes = sizes.cpu()
    short = sizes.amin(dim=1, keepdim=True).double()
    target = max(size, round(size / crop_ratio))
    resized = torch.where(sizes == short, target, (target * sizes.double() / short).floor())
    start = ((resized - size) / 2).round()
    scale = sizes.double() / resized
    offset, extent = start * scale, size * scale
    height, width = pixels.shape[2:]
    offset, extent, sizes = (to_device(each, pixels.device) for each in (offset.float(), extent.float(), sizes))
    rows = _triangle(offset[:, 0], extent[:, 0], size, height, None, bounds=sizes[:, 0])
    cols = _triangle(offset[:, 1], extent[:, 1], size, width, None, bounds=sizes[:, 1])
    count, channels = pixels.shape[:2]
    images = pixels.float().div_(255).reshape(count, channels * height, width)
    images = torch.bmm(images, cols.transpose(1, 2)).view(count, channels, height, size)
    return torch.matmul(rows[:, None], images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise images, B x C x H x W: (images - mean) / std per channel."""
    return (images - _by_channel(images, mean)) / _by_channel(images, std)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; for a CUDA device through page-locked memory, so that the host does not wait for the copy."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _by_channel(images: Tensor, values: tuple[float, ...]) -> Tensor:
    """A 1 x C x 1 x 1 tensor filled on the device; a tensor made from a list would be copied there, and the host would wait."""
    return torch.cat([images.new_full((1, 1, 1, 1), value) for value in values], dim=1)


def jitter(images: Tensor, settings: Jitter, generator: Generator) -> Tensor:
    """Apply torchvision's ColorJitter, its four operations in random order, to each image with probability `settings.p`."""
    return _recolour(images, _draw_colours(len(images), settings, generator), CHANGES)


def _draw_colours(count: int, settings: Jitter, generator: Generator) -> Colours:
    chosen = torch.rand(count, generator=generator) < settings.p
    order = torch.rand(count, 4, generator=generator).argsort(dim=1)
    reach = torch.tensor([settings.brightness, settings.contrast, settings.saturation, settings.hue])
    centre_of = torch.tensor([1.0, 1.0, 1.0, 0.0])
    return Colours(chosen, order, centre_of + reach * (2 * torch.rand(count, 4, generator=generator) - 1))


def _recolour(images: Tensor, drawn: Colours, changes: tuple[Change, ...]) -> Tensor:
    images = images.clone()
    turns = [(position, operation) for position in range(4) for operation in range(len(changes))]
    chosen = [torch.nonzero(drawn.chosen & (drawn.order[:, position] == operation)).flatten() for position, operation in turns]
    factor = to_device(drawn.factor, images.device)
    parts = to_device(torch.cat(chosen), images.device).split([len(at) for at in chosen])
    for (_, operation), rows in zip(turns, parts, strict=True):
        if len(rows):
            images[rows] = changes[operation](images[rows], factor[rows, operation][:, None, None, None])
    return images


def blur(images: Tensor, settings: Blur, generator: Generator) -> Tensor:
    """Blur each image with probability `settings.p`: a Gaussian, truncated at three sigma_max, with reflection at the border."""
    return _soften(images, _draw_softness(len(images), settings, generator), settings)


def _draw_softness(count: int, settings: Blur, generator: Generator) -> Softness:
    chosen = torch.rand(count, generator=generator) < settings.p
    return Softness(
        chosen, settings.sigma_min + (settings.sigma_max - settings.sigma_min) * torch.rand(count, generator=generator)
    )


def _soften(images: Tensor, drawn: Softness, settings: Blur) -> Tensor:
    chosen, size = torch.nonzero(drawn.chosen).flatten(), images.shape[3]
    if not len(chosen):
        return images
    sigma, rows = (to_device(each, images.device) for each in (drawn.sigma[chosen], chosen))
    kernel_BSS = blur_matrix(sigma, size, radius_of(settings.sigma_max, size))
    images = images.clone()
    channels, right = images.shape[1], kernel_BSS.transpose(1, 2)
    if channels > 1:
        kernel_BSS, right = kernel_BSS.repeat_interleave(channels, 0), right.repeat_interleave(channels, 0)
    blurred = torch.bmm(_aligned(kernel_BSS), _aligned(images[rows].flatten(0, 1)))
    images[rows] = torch.bmm(_aligned(blurred), _aligned(right)).unflatten(0, (-1, channels))
    return images


def radius_of(sigma_max: float, size: int) -> int:
    """Number of taps on each side of the blur: three sigma, but no more than reflection allows."""
    return min(math.ceil(3 * sigma_max), size - 1)


def blur_matrix(sigma: Tensor, size: int, radius: int) -> Tensor:
    """Blur along one axis as B matrices of size x size, each row a normalised Gaussian folded back at the borders."""
    taps_T = torch.arange(-radius, radius + 1, device=sigma.device)
    weight_BT = torch.exp(-0.5 * (taps_T / sigma[:, None]).square())
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True)
    at_ST = (torch.arange(size, device=sigma.device)[:, None] + taps_T).abs()
    at_ST = torch.where(at_ST >= size, 2 * (size - 1) - at_ST, at_ST)
    matrix_BSS = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix_BSS.scatter_add_(2, at_ST.expand(len(sigma), -1, -1), weight_BT[:, None].expand(-1, size, -1))


def _triangle(
    offset: Tensor, extent: Tensor, size: int, length: int, flip: Tensor | None, bounds: Tensor | None = None
) -> Tensor:
    """Antialiased linear interpolation weights, B x size x length, from windows [offset, offset + extent).

    Weights fall outside neither the window nor, where `bounds` is given, the image: there the window itself is no border.
    """
    position = torch.arange(size, dtype=torch.float32, device=offset.device).expand(len(offset), size)
    if flip is not None:
        position = torch.where(flip[:, None], size - 1 - position, position)
    scale = (extent / size)[:, None]
    middle = (offset[:, None] + (position + 0.5) * scale)[:, :, None]
    source = torch.arange(length, dtype=torch.float32, device=offset.device)[None, None]
    weight = (1 - (source + 0.5 - middle).abs() / scale.clamp_min(1)[:, :, None]).clamp_min(0)
    low, high = (offset, offset + extent) if bounds is None else (torch.zeros_like(offset), bounds.float())
    weight = weight * ((source >= low[:, None, None]) & (source < high[:, None, None]))
    return weight / weight.sum(dim=2, keepdim=True)


def _luma(images: Tensor) -> Tensor:
    """Gray level, B x 1 x S x S."""
    if images.shape[1] == 1:
        return images
    return (images * _by_channel(images, _GRAY)).sum(dim=1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images), factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle, through HSV."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    flat = chroma == 0
    safe = torch.where(flat, torch.ones_like(chroma), chroma)
    sector = torch.where(
        value == red, (green - blue) / safe, torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    hue = torch.where(flat, torch.zeros_like(sector), sector) + 6 * shift[:, 0]
    channels = []
    for corner in (5.0, 3.0, 1.0):
        k = torch.remainder(corner + hue, 6)
        channels.append(value - chroma * torch.minimum(torch.minimum(k, 4 - k), torch.ones_like(k)).clamp_min(0))
    return torch.stack(channels, dim=1).clamp(0, 1)


CHANGES: tuple[Change, ...] = (_brightness, _contrast, _saturation, _hue)  # the columns of `Colours.factor`
