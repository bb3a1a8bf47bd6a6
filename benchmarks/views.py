"""Both augmented views of a batch: PIL images one at a time, our batched operations, and kornia's if it is installed.

The images are smooth random colours with noise and lie in memory as bytes, so nobody decodes. The student's view is MoCo v2's
strong augmentation; the teacher's is a crop and a flip, or strong too. PIL works in 8 bits, so pixels agree in distribution only:
the check compares their mean and standard deviation over the batch. Tests compare ours with torchvision's float operations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks import harness, peers, plain_recipe
from isd_repro.config.params import Blur, Jitter, Numerics, View
from isd_repro.data import augment
from isd_repro.data.loader import generator_of
from isd_repro.nn import engine

STRONG = View(
    jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    grayscale=0.2,
    blur=Blur(sigma_min=0.1, sigma_max=2.0, p=0.5),
)
WEAK = View()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """Images of `source` pixels, but no smaller than the views, which have `side` pixels."""

    batch: int = 256
    side: int = 32
    source: int = 1
    teacher: Literal["weak", "strong"] = "weak"

    @property
    def views(self) -> tuple[View, View]:
        """The student's and the teacher's."""
        return STRONG, STRONG if self.teacher == "strong" else WEAK


CPU = {
    "views-32": Sizes(),
    "views-64": Sizes(side=64),
    "views-224": Sizes(batch=64, side=224),
}
CUDA = {"views-224": Sizes(batch=256, side=224, source=256, teacher="strong")}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, batch=32, side=16, source=20, repetitions=2)


class Images:
    """Random images on the device, and batches of their views."""

    def __init__(self, batch: int, side: int, views: tuple[View, View], *, source: int = 1, count: int = 0) -> None:
        """`count` images of `source` pixels, no fewer than `batch` and `side`, from which every batch is drawn."""
        device, source = harness.device_of(), max(source, side)
        draws = torch.Generator(device).manual_seed(0)
        parts = []
        for rows in torch.arange(max(count, batch)).split(256):
            few = torch.rand(len(rows), 3, 4, 4, generator=draws, device=device)
            noise = 0.1 * torch.randn(len(rows), 3, source, source, generator=draws, device=device)
            smooth = functional.interpolate(few, (source, source), mode="bicubic")
            parts.append((255 * (smooth + noise)).clamp(0, 255).to(torch.uint8))
        self.pixels, self.sizes, self.device = torch.cat(parts), torch.full((batch, 2), source), device
        self.batch, self.side, self.views, self.step = batch, side, views, 0
        self.shuffle = torch.randperm(batch, generator=draws, device=device)

    @cached_property
    def pil(self) -> list[Image.Image]:
        """The first batch as PIL images."""
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in self.pixels[: self.batch].cpu()]

    def by_pil(self) -> list[Tensor]:
        """Both views by PIL, on the CPU."""
        return plain_recipe.views(self.pil, *(plain_recipe.transform(each, self.side, MEAN, STD) for each in self.views))

    def batched(self, changes: tuple[augment.Change, ...] = augment.CHANGES) -> list[Tensor]:
        """Both views by ours, with other draws at every call; `changes` are the colour operations, which may be compiled."""
        self.step += 1
        draws = generator_of(0, "bench", self.step)
        pixels = self.pixels
        if len(pixels) > self.batch:
            index = torch.randint(len(pixels), (self.batch,), generator=draws)
            pixels = pixels[augment.to_device(index, self.device)]
        drawn = [(augment.draw(self.sizes, view, draws), view) for view in self.views]
        made = [augment.apply(pixels, *each, self.side, changes) for each in drawn]
        return [augment.normalise(images, MEAN, STD) for images in made]


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare all variants that this device has."""
    images, device = Images(sizes.batch, sizes.side, sizes.views, source=sizes.source), harness.device_of()
    cuda = device.type == "cuda"
    works: dict[str, Callable[[], list[Tensor]]] = {"PIL": images.by_pil, "batched": images.batched}
    changes = engine.changes_of(augment.CHANGES, device, Numerics(engine="fast"))
    if cuda:
        works["batched, compiled"] = lambda: images.batched(changes)
        works["batched, compiled, TF32"] = lambda: _in_tf32(lambda: images.batched(changes))
    if (kornia := peers.module("kornia.augmentation")) is not None:
        made = [peers.kornia_view(kornia, view, sizes.side, MEAN, STD) for view in sizes.views]
        works["kornia"] = lambda: [each(images.pixels) for each in made]
    draws = 1 if cuda else 4
    few = images.pixels[:32]
    drawn = augment.draw(images.sizes[:32], STRONG, generator_of(0, "bench", "check"))

    def moments(work: Callable[[], list[Tensor]]) -> list[float]:
        found = [[view.float().cpu() for view in work()] for _ in range(draws)]
        both = [torch.stack([each[at] for each in found]) for at in range(2)]
        return [float(value) for view in both for value in (view.mean(), view.std())]

    expected = moments(images.by_pil)

    def check(name: str) -> dict[str, tuple[float, float]]:
        if name == "PIL":
            return {}
        names = [f"{view} {value}" for view in ("student's", "teacher's") for value in ("mean", "deviation")]
        apart = [abs(one - other) for one, other in zip(moments(works[name]), expected, strict=True)]
        limit = 3.2 / (draws * sizes.batch) ** 0.5  # of draws: 0.1 for four of 256 images
        found = {key: (value, limit) for key, value in zip(names, apart, strict=True)}
        if cuda and name.startswith("batched"):
            given = changes if "compiled" in name else augment.CHANGES
            with harness.tf32() if "TF32" in name else nullcontext():
                ours = augment.apply(few, drawn, STRONG, sizes.side, given).cpu()
            gap = float((ours - augment.apply(few.cpu(), drawn, STRONG, sizes.side)).abs().max())
            found["largest difference from the CPU's, in 0..1"] = (gap, 5e-2 if "TF32" in name else 1e-3)
        return found

    def floor() -> dict[str, float]:
        rate = harness.copy_rate(device)
        size = 3 * sizes.batch * (images.pixels.shape[-1] ** 2 + 4 * sizes.side**2)
        return {"GB/s": rate / 1e9, "s to read bytes and write floats": 2 * size / rate}

    versions = {"kornia": peers.version("kornia")} if "kornia" in works else {}
    return harness.compare("views", sizes, works, check=check, floor=floor, versions=versions, say=say)


def _in_tf32(work: Callable[[], list[Tensor]]) -> list[Tensor]:
    with harness.tf32():
        return work()
