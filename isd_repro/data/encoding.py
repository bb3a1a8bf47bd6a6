"""One image as a store keeps it: converted, encoded, and decoded again. Imports no torch: packing processes start at once.

A store keeps pixels or JPEGs. JPEGs are written and read by Pillow's libjpeg-turbo, 4:2:0, at the quality that the settings
name, so equal pixels are equal bytes wherever Pillow has the same version of it. The decoder is a rule, chosen by no timing.
"""

from __future__ import annotations

import hashlib
import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from isd_repro.config import params

Pixels = npt.NDArray[np.uint8]


class Encoded(NamedTuple):
    """One image on its way into a store."""

    sha256: str  # of the source's bytes
    content: bytes  # what the store keeps
    height: int
    width: int
    channels: int


def convert(image: Image.Image, settings: params.Store) -> Pixels:
    """One decoded image as the store keeps it.

    Args:
        image: any PIL image.
        settings: `square` gives size x size; `short-side` gives the short side `size` pixels and the long side
            int(size * long / short), as torchvision's Resize does, up or down; `none` keeps the size.

    Returns:
        uint8, channels x height x width.
    """
    image = image.convert("RGB" if settings.channels == 3 else "L")
    if settings.size is not None:
        width, height = image.size
        target = (settings.size, settings.size)
        if settings.resize == "short-side":
            short = min(width, height)
            target = (int(settings.size * width / short), int(settings.size * height / short))
        if target != image.size:
            image = image.resize(target, Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def encode(pixels: Pixels, settings: params.Store) -> bytes:
    """The bytes that a store keeps of one image, uint8 channels x height x width."""
    if settings.jpeg_quality is None:
        return pixels.tobytes()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.jpeg_quality, subsampling="4:2:0")
    return buffer.getvalue()


def encoded(payload: bytes, image: Image.Image, settings: params.Store) -> Encoded:
    """What a store keeps of a source's bytes, given those bytes and the image that they decode to."""
    pixels = convert(image, settings)
    channels, height, width = pixels.shape
    return Encoded(hashlib.sha256(payload).hexdigest(), encode(pixels, settings), height, width, channels)


def decode_into(content: bytes, out: Pixels) -> None:
    """Decode a JPEG of a store.

    Args:
        content: the file.
        out: takes the pixels, uint8, height x width x channels of 1 or 3; any strides.

    Raises:
        ValueError: the file cannot be decoded or shows an image of another size or colour.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
        found = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(str(error)) from error
    found = found[:, :, None] if found.ndim == 2 else found
    if found.shape != out.shape:
        raise ValueError(f"shows {found.shape}, expected {out.shape} (height, width, channels)")
    out[:] = found
