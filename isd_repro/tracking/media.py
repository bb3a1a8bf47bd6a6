"""Pictures on disk: one PNG per key, written atomically, with its caption inside."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isd_repro.runtime import files

if TYPE_CHECKING:
    from torch import Tensor

_CAPTION = "Description"  # PNG's own keyword


@dataclass(frozen=True)
class Picture:
    """A picture on the disk."""

    key: str
    path: Path
    caption: str


def save(folder: Path, key: str, pixels: Tensor, caption: str = "") -> Picture:
    """Write uint8 pixels, C x H x W with one or three channels, as `<folder>/<key>.png`; equal pixels give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    array = pixels.permute(1, 2, 0).contiguous().cpu().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    info = PngInfo()
    info.add_text(_CAPTION, caption)
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=info)
    path = folder / f"{key}.png"
    files.write_atomic(path, content.getvalue())
    return Picture(key, path, caption)


def kept(folder: Path) -> Iterator[Picture]:
    """All pictures in a folder, by key."""
    from PIL import Image

    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            yield Picture(path.stem, path, str(image.info.get(_CAPTION, "")))
