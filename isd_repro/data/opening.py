"""Files from strangers: read whole and within limits, or refused by name. Nothing is unpacked onto the disk and nothing is run.

A pipe or a device is no image, a zip's entry is read into memory alone, and an image is decoded by five of PIL's readers.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from isd_repro.runtime.errors import DataError

MAX_PIXELS = 89_478_485  # of an image; PIL's own limit, 268 MB as RGB; ImageNet's largest has 61 million
MAX_BYTES = 2**28  # of an image's file and of the annotations, and what an entry of a zip may unpack to
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")  # by content; others of PIL's start programs or have a long record of holes
_DEEP = ("I;16", "I;16L", "I;16B", "I")  # PIL's modes of a grey PNG of 16 bits, by its version
_WHITE, _STEP = 65535, 257
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AssertionError,
    NotImplementedError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, RuntimeError, struct.error)


class UnreadableError(Exception):
    """An image's bytes cannot be read or decoded; the caller counts it."""


def decode_file(payload: bytes) -> Image.Image:
    """Decode a whole file; `UnreadableError` where it is damaged, cut short or larger than `MAX_PIXELS`."""
    image = open_image(payload)
    try:
        image.load()
    except _DAMAGE as error:
        raise UnreadableError(str(error)) from error
    return _eight_bits(image) if image.mode in _DEEP else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits at 8: 65535 becomes 255, in between to the nearest. PIL's own conversion would cut all above 255 off."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _WHITE:
        raise UnreadableError(f"grey values {values.min()} to {values.max()}, expected 0 to {_WHITE}")
    return Image.fromarray(((values + _STEP // 2) // _STEP).astype(np.uint8))


def open_image(payload: bytes) -> Image.Image:
    """An image of which nothing but the header is decoded; `UnreadableError` as `decode_file`."""
    try:
        image = Image.open(io.BytesIO(payload), formats=_FORMATS)
    except _DAMAGE as error:
        raise UnreadableError(str(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are decoded")
    return image


def read_file(path: Path) -> bytes:
    """A file's bytes; what is no regular file (a pipe would wait for ever) or too large is an error."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 - a pipe must not block the opening
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: no regular file", "remove it from the image folder")
            if status.st_size > MAX_BYTES:
                raise DataError(f"{path}: {status.st_size:,} bytes, at most {MAX_BYTES:,} are read", "mend the image folder")
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "mend the image folder") from error


def unpack(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry's bytes; `UnreadableError` where it is damaged, encrypted or unpacks to too many. Nothing is written."""
    try:
        size = archive.getinfo(name).file_size
        if size > MAX_BYTES:
            raise UnreadableError(f"unpacks to {size:,} bytes, at most {MAX_BYTES:,} are read")
        return archive.read(name)  # which stops at the size that the archive states
    except _ZIP_DAMAGE as error:
        raise UnreadableError(str(error)) from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip for reading; `DataError` where it is none."""
    try:
        return zipfile.ZipFile(path)
    except _ZIP_DAMAGE as error:
        raise DataError(f"{path}: not a readable zip ({error})", "expected a zip of train and val folders") from error
