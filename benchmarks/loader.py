"""Images from the disk to a training step: this project's packed store against an ImageFolder of the original files.

- `pipeline`: what the published code does: decode, then two views of each image by torchvision's transforms on PIL images (one
  strong, one weak), to normalised float tensors.
- `crops`: the same files decoded, and two random crops with flips, to uint8 tensors: what remains of that pipeline if colours and
  blur are a device's work.
- `jpeg`, `raw`: this project's loader, from a store of JPEGs or of pixels with the short side at 256, to a batch of uint8 on the
  CPU. Views are made from it on the device, cropping included (the subject `views` measures that), so the loader has less to do
  than `pipeline`; `crops` is there for that reason. Packing is done once and is not timed.

Everything runs in one process on a CPU; on a machine with a GPU the baselines get a worker process for each core and ours as
many threads. The images are made here: each channel is a sum of smoothed noise of 3 to 192 cells a side with an amplitude that
falls with the fineness, three quarters of it common to the channels, grain of 8 levels on every pixel, and 20 filled ellipses and
rectangles for edges; 500 x 375, JPEG of quality 95. ImageNet's files have about 110 kB on average; larger files are slower to
decode.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, features
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.v2 import functional

from benchmarks import harness, plain_recipe
from benchmarks.views import MEAN, STD, STRONG, WEAK
from isd_repro.config import params
from isd_repro.data import augment
from isd_repro.data.loader import generator_of
from isd_repro.data.store import Store, StoreWriter, convert, encode
from isd_repro.runtime.errors import ConfigError

SHORT_SIDE, VIEW, PACKED, ORIGINAL = 256, 224, 90, 95  # sides in pixels, and qualities of JPEGs
DISTINCT = 64  # images that are made; more files than that repeat them
_CHECKED = 16  # images whose pixels are compared


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """Files, their size in pixels, images of a batch, and worker processes of the baselines."""

    images: int = 256
    batch: int = 64
    width: int = 500
    height: int = 375
    workers: bool = False  # one for each thread


CPU = {"loader": Sizes()}
CUDA = {"loader": Sizes(images=1024, batch=256, threads=os.cpu_count() or 1, workers=True, repetitions=3)}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, images=5, batch=3, width=330, height=300, threads=1, repetitions=2)


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare, in a temporary folder.

    Raises:
        ConfigError: a batch larger than all images, or images too small for edges.
    """
    if sizes.batch > sizes.images or min(sizes.width, sizes.height) < 32:
        raise ConfigError(f"cannot read {sizes}", "images must be 32 px or larger, and a batch no larger than all of them")
    with tempfile.TemporaryDirectory(prefix="isd-bench-") as name:
        folder = Path(name)
        files = _write_images(folder / "train", sizes)
        stores = {
            "jpeg": _pack(folder / "jpeg", files, PACKED, sizes.threads),
            "raw": _pack(folder / "raw", files, None, sizes.threads),
        }
        crop = transforms.RandomResizedCrop(VIEW, scale=(0.2, 1.0))
        view = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
        published = [plain_recipe.transform(each, VIEW, MEAN, STD) for each in (STRONG, WEAK)]
        works: dict[str, Callable[[], int]] = {
            "pipeline": _folder(folder / "train", sizes, *published),
            "crops": _folder(folder / "train", sizes, view, view),
            "jpeg": _packed(stores["jpeg"], sizes),
            "raw": _packed(stores["raw"], sizes),
        }

        def check(name: str) -> dict[str, tuple[float, float]]:
            if name not in stores:
                return {}
            found = {"pixels that are not Pillow's": (float(_wrong(stores[name], files)), 0.0)}
            return found | {"views from torchvision's, in 0..1": (_crop(stores[name]), 1e-4)}

        def floor() -> dict[str, float]:
            contents = [file.read_bytes() for file in files[:64]]
            seconds = harness.seconds_of(lambda: [Image.open(io.BytesIO(each)).load() for each in contents], torch.device("cpu"))
            return {
                "ms to decode an original": 1e3 * seconds / len(contents),
                "bytes of an original": statistics.mean(file.stat().st_size for file in files),
                "bytes packed as JPEG": stores["jpeg"].info.bytes / sizes.images,
            }

        versions = {"pillow": metadata.version("pillow"), "libjpeg-turbo": str(features.version("libjpeg_turbo"))}
        return harness.compare("loader", sizes, works, check=check, floor=floor, versions=versions, say=say)


# --- images and stores ----------------------------------------------------------------------------------------------------


def picture(draws: np.random.Generator, width: int, height: int) -> Image.Image:
    """One image as the module's docstring says."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 192):
        layers = []
        for _ in range(4):  # one that the channels share and one of each
            noise = Image.fromarray(draws.standard_normal((cells, cells), dtype=np.float32))
            layers.append(np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)))
        own = np.stack(layers[1:], axis=2)
        total += (0.75 * layers[0][:, :, None] + 0.25 * own) * 120 / cells**0.7
    total += draws.standard_normal((height, width, 1), dtype=np.float32) * 8
    image = Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for shape in range(20):
        left, top = int(draws.integers(width)), int(draws.integers(height))
        box = (left, top, left + int(draws.integers(5, 80)), top + int(draws.integers(5, 80)))
        colour = (int(draws.integers(256)), int(draws.integers(256)), int(draws.integers(256)))
        (canvas.ellipse if shape % 2 else canvas.rectangle)(box, fill=colour)
    return image


def _write_images(root: Path, sizes: Sizes) -> list[Path]:
    """An ImageFolder of two classes, in the order that ImageFolder itself gives it."""
    draws, contents = np.random.default_rng(0), []
    for _ in range(min(sizes.images, DISTINCT)):
        buffer = io.BytesIO()
        picture(draws, sizes.width, sizes.height).save(buffer, "JPEG", quality=ORIGINAL)
        contents.append(buffer.getvalue())
    files = []
    for number in range(sizes.images):
        file = root / f"class_{2 * number // sizes.images}" / f"{number:06d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[number % len(contents)])
        files.append(file)
    return files


def _pack(folder: Path, files: Sequence[Path], quality: int | None, threads: int) -> Store:
    folder.mkdir()
    with StoreWriter(folder, _settings(quality)) as writer:
        for file in files:
            writer.add(*encode(convert(Image.open(file), _settings(quality)), _settings(quality)))
        return Store(folder, writer.finish(), threads)


def _settings(quality: int | None) -> params.StoreSettings:
    return params.StoreSettings(resize="short-side", side=SHORT_SIDE, jpeg_quality=quality)


# --- variants -------------------------------------------------------------------------------------------------------------


class _TwoViews:
    """Both views of an image."""

    def __init__(self, *views: Callable[[Image.Image], Tensor]) -> None:
        self.views = views

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


def _folder(root: Path, sizes: Sizes, *views: Callable[[Image.Image], Tensor]) -> Callable[[], int]:
    """Two views of every image of an ImageFolder, in a new order at each call."""
    workers: dict[str, Any] = {}
    if sizes.workers:
        workers = {"num_workers": sizes.threads, "persistent_workers": True, "multiprocessing_context": "fork"}
    images = datasets.ImageFolder(str(root), _TwoViews(*views))
    reader: Any = DataLoader(images, sizes.batch, shuffle=True, generator=torch.Generator().manual_seed(0), **workers)
    return lambda: sum(len(both[0]) for both, _ in reader)


def _packed(store: Store, sizes: Sizes) -> Callable[[], int]:
    """Every image of a store, in a new order at each call."""
    draws = torch.Generator().manual_seed(0)
    return lambda: sum(len(store.read(index)[0]) for index in torch.randperm(sizes.images, generator=draws).split(sizes.batch))


# --- checks ---------------------------------------------------------------------------------------------------------------


def _wrong(store: Store, files: Sequence[Path]) -> int:
    """Pixels of the first images that are not those of Pillow: resized, and for JPEGs written and read again."""
    count = 0
    for at, file in enumerate(files[:_CHECKED]):
        image = Image.open(file).convert("RGB")
        scale = SHORT_SIDE / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        if (quality := store.info.settings.jpeg_quality) is not None:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, subsampling=2)
            image = Image.open(buffer)
        found = store.read(torch.tensor([at]))[0][0].permute(1, 2, 0).numpy()
        want = np.asarray(image)
        count += int((found != want).any(axis=2).sum()) if found.shape == want.shape else found.size
    return count


def _crop(store: Store) -> float:
    """Largest difference of views cut from a batch, with windows as training draws them, from torchvision's crops."""
    pixels, size = store.read(torch.arange(min(_CHECKED, len(store))))
    crop = augment.draw_crop(size, params.View(flip=0.0), generator_of(0, "bench", "crop"))
    found = augment.resample(pixels, crop, VIEW)
    worst = 0.0
    for row in range(len(pixels)):
        height, width = size[row].tolist()
        window = [int(side[row]) for side in (crop.top, crop.left, crop.height, crop.width)]
        image = pixels[row, :, :height, :width].float() / 255
        want = functional.resized_crop(image, *window, [VIEW, VIEW], antialias=True)
        worst = max(worst, float((found[row] - want).abs().max()))
    return worst
