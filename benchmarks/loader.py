"""`bench loader`: images from the disk to a step, against a plain PIL ImageFolder pipeline, in turns within one process.

Every turn, each arm works through the same images in the same shuffled order, in batches, in this one process; the order of the
arms rotates. What counts is processor time, of all threads: seconds a core works for an image.

- `pipeline`: what the published code does with an ImageFolder of the original files: decode, then two views of each image by
  torchvision's transforms on PIL images (a strong one with colours and blur, a weak one), to normalised float tensors.
- `crops`: the same files decoded and two random crops with flips, to uint8 tensors: what is left of that pipeline where colours
  and blur are a device's work.
- `jpeg`, `raw`: this project's loader alone, from a store of JPEGs or of pixels with the short side at 256, to a batch of uint8
  on the CPU. Views are made from it on the device, cropping included (`bench views` measures that), so the loader has fewer
  things to do than `pipeline`: that is the point of it, and why `crops` stands beside. Packing is done once, and is timed apart.

The images are made here: each channel is a sum of smoothed noise of 3 to 192 cells a side with an amplitude that falls with the
fineness, three quarters of it common to the channels, grain of 8 levels on every pixel, and 20 filled ellipses and rectangles
for edges; 500 x 375, JPEG of quality 90. That is nature's spectrum without its content. Their files are reported beside the
result; ImageNet's have about 110 kB on average (138 GB in 1,281,167 files), and larger files are slower to decode.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, features
from torch import Tensor

from benchmarks import plain
from benchmarks.views import MEAN, STD, STRONG, WEAK
from isd_repro.config import params
from isd_repro.data import augment
from isd_repro.data.loader import generator_of
from isd_repro.data.store import Store, StoreWriter, convert, encode
from isd_repro.provenance import describe
from isd_repro.runtime.errors import ConfigError

Arm = Literal["pipeline", "crops", "jpeg", "raw"]
ARMS: tuple[Arm, ...] = get_args(Arm)
SHORT_SIDE, VIEW, QUALITY = 256, 224, 90
ORIGINAL = 95  # quality of the files that are packed
GRAIN = 8.0  # levels


@dataclass(frozen=True)
class Sizes:
    """What is read, and how often."""

    images: int = 256
    batch: int = 64
    width: int = 500
    height: int = 375
    repeats: int = 7
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """Seconds of every turn, and whether the pixels are right.

    Attributes:
        cpu: processor seconds for an image, by arm, one a turn.
        wall: the same by the clock.
        packing: processor seconds for an image that making each store took, once.
        floor: processor seconds for an image of libjpeg-turbo's decoding of the packed JPEGs and of nothing else, one a turn.
        original, packed: mean bytes of an image's file and of its JPEG in the store.
        wrong_pixels: pixels of the batches that differ from Pillow's own reading of the same files.
        loss: mean difference of a pixel of the two stores, in levels of 255: what packing as JPEG costs.
        crop: largest difference of a view cut from a batch to torchvision's crop of the same window, in 0..1.
        peak: bytes of the largest batch.
    """

    sizes: Sizes
    cpu: dict[Arm, tuple[float, ...]]
    wall: dict[Arm, tuple[float, ...]]
    packing: dict[Arm, float]
    floor: tuple[float, ...]
    original: float
    packed: float
    wrong_pixels: int
    loss: float
    crop: float
    peak: int
    machine: str
    versions: dict[str, str]
    load: tuple[float, float]
    commit: str | None
    dirty: bool | None

    def ratios(self, ours: Arm, theirs: Arm) -> list[float]:
        """How many times less processor time ours takes, turn by turn."""
        return [other / own for own, other in zip(self.cpu[ours], self.cpu[theirs], strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratios computed."""
        pairs = {f"{ours} over {theirs}": self.ratios(ours, theirs) for ours, theirs in _PAIRS}
        medians = {name: statistics.median(values) for name, values in pairs.items()}
        faster = {name: {"median": medians[name], "turns": values} for name, values in pairs.items()}
        table = {"baseline": "pipeline", "n": self.sizes.repeats, "faster": faster, "less_memory": {}}
        table["wrong"] = [f"{self.wrong_pixels} pixels"] if self.wrong_pixels else [] if self.crop <= 1e-4 else ["crops"]
        return {**asdict(self), "ratios": pairs, "ratio": medians, **table}


_PAIRS: tuple[tuple[Arm, Arm], ...] = (("jpeg", "pipeline"), ("raw", "pipeline"), ("jpeg", "crops"), ("raw", "crops"))


def bench(sizes: Sizes, on_turn: Callable[[int, dict[Arm, float]], object] = lambda turn, cpu: None) -> Result:
    """Measure, in a temporary folder.

    Raises:
        ConfigError: sizes that cannot be read.
    """
    if min(asdict(sizes).values()) < 1 or sizes.batch > sizes.images or min(sizes.width, sizes.height) < 32:
        raise ConfigError(
            f"cannot read {sizes}", "every size must be 1 or more, images 32 px or larger, a batch no larger than all"
        )
    before = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(sizes.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="isd-bench-") as folder:
            return _measure(Path(folder), sizes, before[1], on_turn)
    finally:
        torch.set_num_threads(before[0])


def _measure(folder: Path, sizes: Sizes, load: float, on_turn: Callable[[int, dict[Arm, float]], object]) -> Result:
    files = _write_images(folder / "train", sizes)
    packing: dict[Arm, float] = {}
    stores: dict[Arm, Store] = {}
    kinds: tuple[tuple[Arm, int | None], ...] = (("jpeg", QUALITY), ("raw", None))
    for arm, quality in kinds:
        settings = params.Store(resize="short-side", side=SHORT_SIDE, jpeg_quality=quality)
        (folder / arm).mkdir()
        began = time.process_time()
        stores[arm] = _pack(folder / arm, files, settings, sizes.threads)
        packing[arm] = (time.process_time() - began) / sizes.images
    work: dict[Arm, Callable[[Tensor], Tensor]] = {
        "pipeline": _pipeline(folder / "train"),
        "crops": _crops(folder / "train"),
        "jpeg": lambda index: stores["jpeg"].read(index)[0],
        "raw": lambda index: stores["raw"].read(index)[0],
    }
    cpu: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    wall: dict[Arm, list[float]] = {arm: [] for arm in ARMS}
    floor, peak = [], 0
    for arm in ARMS:
        peak = max(peak, work[arm](torch.arange(sizes.batch)).nbytes if arm in stores else 0)
    for turn in range(sizes.repeats):
        order = torch.randperm(sizes.images, generator=generator_of(0, "bench", turn))
        for arm in (*ARMS[turn % len(ARMS) :], *ARMS[: turn % len(ARMS)]):
            torch.manual_seed(turn)
            start, clock = time.process_time(), time.perf_counter()
            for index in order.split(sizes.batch):
                work[arm](index)
            cpu[arm].append((time.process_time() - start) / sizes.images)
            wall[arm].append((time.perf_counter() - clock) / sizes.images)
        floor.append(_floor(stores["jpeg"]))
        on_turn(turn, {arm: values[-1] for arm, values in cpu.items()})
    place = describe(0.0)
    machine = place.machine
    return Result(
        sizes=sizes,
        cpu={arm: tuple(values) for arm, values in cpu.items()},
        wall={arm: tuple(values) for arm, values in wall.items()},
        packing=packing,
        floor=tuple(floor),
        original=statistics.mean(file.stat().st_size for file in files),
        packed=stores["jpeg"].info.bytes / sizes.images,
        wrong_pixels=_wrong(stores, files),
        loss=_loss(stores),
        crop=_crop(stores["jpeg"], sizes),
        peak=peak,
        machine=f"{machine.cpu}, {sizes.threads} of {machine.cores} threads, {machine.system}",
        versions={
            **{name: metadata.version(name) for name in ("torch", "torchvision", "pillow")},
            "libjpeg-turbo": str(features.version("libjpeg_turbo")),
        },
        load=(round(load, 2), round(os.getloadavg()[0], 2)),
        commit=place.commit,
        dirty=place.dirty,
    )


# --- images and stores ------------------------------------------------------------------------------------------------


def _write_images(root: Path, sizes: Sizes) -> list[Path]:
    """An ImageFolder of two classes, as ImageFolder itself orders it."""
    draws = np.random.default_rng(0)
    files = []
    for number in range(sizes.images):
        file = root / f"class_{2 * number // sizes.images}" / f"{number:06d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(draws, sizes.width, sizes.height).save(file, "JPEG", quality=ORIGINAL)
        files.append(file)
    return files


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
    total += draws.standard_normal((height, width, 1), dtype=np.float32) * GRAIN
    image = Image.fromarray((128 + total).clip(0, 255).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for shape in range(20):
        left, top = int(draws.integers(width)), int(draws.integers(height))
        box = (left, top, left + int(draws.integers(5, 80)), top + int(draws.integers(5, 80)))
        colour = (int(draws.integers(256)), int(draws.integers(256)), int(draws.integers(256)))
        (canvas.ellipse if shape % 2 else canvas.rectangle)(box, fill=colour)
    return image


def _pack(folder: Path, files: Sequence[Path], settings: params.Store, workers: int) -> Store:
    with StoreWriter(folder, settings) as writer:
        for file in files:
            writer.append(convert(Image.open(file), settings))
        info = writer.finish()
    return Store(folder, info, workers)


# --- what is compared with --------------------------------------------------------------------------------------------


def _pipeline(root: Path) -> Callable[[Tensor], Tensor]:
    """MoCo v2's strong view and the weak one, image by image on PIL, as the released code composes them."""
    return _folder(root, *(plain.transform(law, VIEW, MEAN, STD) for law in (STRONG, WEAK)))


def _crops(root: Path) -> Callable[[Tensor], Tensor]:
    """Two crops with flips and no colours."""
    transforms: Any = import_module("torchvision.transforms")
    crop = transforms.RandomResizedCrop(VIEW, scale=(0.2, 1.0))
    view = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    return _folder(root, view, view)


def _folder(
    root: Path, one: Callable[[Image.Image], Tensor], other: Callable[[Image.Image], Tensor]
) -> Callable[[Tensor], Tensor]:
    datasets: Any = import_module("torchvision.datasets")
    folder = datasets.ImageFolder(str(root))

    def read(index: Tensor) -> Tensor:
        pairs = [(one(image), other(image)) for image in (folder[at][0] for at in index.tolist())]
        return torch.stack([torch.stack(views) for views in zip(*pairs, strict=True)])

    return read


# --- checks -----------------------------------------------------------------------------------------------------------


def _floor(store: Store) -> float:
    """Processor seconds for an image of the decoder alone."""
    contents = [encode(image.numpy(), store.info.settings) for image in store.read(torch.arange(len(store)))[0]]
    began = time.process_time()
    for content in contents:
        Image.open(io.BytesIO(content)).load()
    return (time.process_time() - began) / len(contents)


def _wrong(stores: dict[Arm, Store], files: Sequence[Path]) -> int:
    """Pixels that are not those of Pillow: resized for the store of pixels, and for JPEGs written and read again."""
    count = 0
    for at, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        scale = SHORT_SIDE / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY, subsampling=2)
        wanted: dict[Arm, Image.Image] = {"raw": image, "jpeg": Image.open(buffer)}
        for arm, want in wanted.items():
            found = stores[arm].read(torch.tensor([at]))[0][0].permute(1, 2, 0).numpy()
            count += int((found != np.asarray(want)).any(axis=2).sum()) if found.shape[:2] == want.size[::-1] else found.size
    return count


def _loss(stores: dict[Arm, Store]) -> float:
    every = torch.arange(min(64, len(stores["raw"])))
    return float((stores["jpeg"].read(every)[0].float() - stores["raw"].read(every)[0].float()).abs().mean())


def _crop(store: Store, sizes: Sizes) -> float:
    """Views cut from a batch by the law that training draws from, against torchvision's of each image."""
    functional: Any = import_module("torchvision.transforms.v2.functional")
    index = torch.arange(min(16, sizes.images))
    pixels, size = store.read(index)
    crop = augment.draw_crop(size, params.View(flip=0.0), generator_of(0, "bench", "crop"))
    found = augment.resample(pixels, crop, VIEW)
    worst = 0.0
    for row in range(len(index)):
        height, width = size[row].tolist()
        window = [int(side[row]) for side in (crop.top, crop.left, crop.height, crop.width)]
        image = pixels[row, :, :height, :width].float() / 255
        want = functional.resized_crop(image, *window, [VIEW, VIEW], antialias=True)
        worst = max(worst, float((found[row] - want).abs().max()))
    return worst


def lines(result: Result) -> list[str]:
    """What was measured, for a reader."""
    sizes = result.sizes
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    said = [
        f"machine     {result.machine}; {versions}; load {result.load[0]:.1f} before, {result.load[1]:.1f} after",
        f"images      {sizes.images} of {sizes.width} x {sizes.height}, batches of {sizes.batch}, n={sizes.repeats} turns",
        f"bytes       an image's file {result.original:.0f}, packed as JPEG {result.packed:.0f}; a batch {result.peak}",
    ]
    for arm in ARMS:
        milliseconds = [1000 * value for value in result.cpu[arm]]
        rate = 1 / statistics.median(result.cpu[arm])
        said.append(f"{arm:<11} {_spread(milliseconds)} ms of processor time an image, {rate:.0f} images/s a core")
    said += [f"ratio       {ours} {_spread(result.ratios(ours, theirs))} times faster than {theirs}" for ours, theirs in _PAIRS]
    ms = {arm: 1000 * seconds for arm, seconds in result.packing.items()}
    return [
        *said,
        f"floor       {_spread([1000 * value for value in result.floor])} ms: the decoder alone on the packed JPEGs",
        f"packing     {ms['jpeg']:.2f} ms (jpeg), {ms['raw']:.2f} ms (raw) an image, once",
        f"same        {result.wrong_pixels} pixels differ from Pillow's; views within {result.crop:.1e} of torchvision's",
        f"loss        as JPEG a pixel moves by {result.loss:.2f} of 255 levels on average",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
