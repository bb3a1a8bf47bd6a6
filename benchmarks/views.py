"""`bench views`: both views of a batch, PIL images one at a time and ours as a batch, in turns; kornia's where it is installed.

Images are smooth random colours with noise, in memory as bytes: no decoding on either side. The student's view is MoCo v2's
strong law, the teacher's crop and flip alone. PIL works in 8 bits, so the pixels agree in distribution only: `check` compares
their means and deviations over the batch; tests hold ours to torchvision's own float operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks import peers, plain, turns
from benchmarks.turns import Comparison
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
class Sizes:
    """What is measured, and how often."""

    batch: int = 256
    side: int = 32
    repeats: int = 7
    threads: int = 1


class Images:
    """A batch in the forms that both sides read."""

    def __init__(self, batch: int, side: int) -> None:
        draws = torch.Generator().manual_seed(0)
        smooth = functional.interpolate(torch.rand(batch, 3, 4, 4, generator=draws), (side, side), mode="bicubic")
        noise = 0.1 * torch.randn(batch, 3, side, side, generator=draws)
        self.pixels = (255 * (smooth + noise)).clamp(0, 255).to(torch.uint8)
        self.sizes = torch.full((batch, 2), side)
        self.pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in self.pixels]
        self.pixels = self.pixels.to(turns.device_of())
        self._made = [plain.transform(law, side, MEAN, STD) for law in (STRONG, WEAK)]
        self._step = 0

    def plain_views(self) -> list[Tensor]:
        """By PIL, on the CPU."""
        return plain.views(self.pil, *self._made)

    def kornia_views(self) -> Callable[[], list[Tensor]] | None:
        """By kornia, on the device."""
        made = peers.kornia_views((STRONG, WEAK), self.pixels.shape[-1], MEAN, STD)
        return None if made is None else lambda: [each(self.pixels) for each in made]

    def views(self, changes: tuple[augment.Change, ...] = augment.CHANGES) -> list[Tensor]:
        """By ours, on the device; other draws at every call. `changes` are the colour operations, which may be compiled."""
        self._step += 1
        draws, side = generator_of(0, "bench", self._step), self.pixels.shape[-1]
        drawn = [(augment.draw(self.sizes, law, draws), law) for law in (STRONG, WEAK)]
        made = [augment.apply(self.pixels, *each, side, changes) for each in drawn]
        return [augment.normalise(images, MEAN, STD) for images in made]


def bench(sizes: Sizes, *, say: turns.Say = lambda line: None) -> Comparison:
    """Measure; `ConfigError` for sizes that are none."""
    turns.check_sizes(sizes)
    device = turns.device_of()
    with turns.threads(sizes.threads), torch.random.fork_rng():
        torch.manual_seed(0)
        images = Images(sizes.batch, sizes.side)

        def floor() -> dict[str, float]:
            pixels = 3 * sizes.batch * sizes.side**2
            rate = turns.copy_rate(device)
            return {"GB/s": rate / 1e9, "s to read bytes and write floats": 2 * pixels * 5 / rate}

        works: dict[str, Callable[[], list[Tensor]]] = {"PIL": images.plain_views, "batched": images.views}
        if changes := engine.changes_of(augment.CHANGES, device, Numerics(engine="fast")) if device.type == "cuda" else ():
            works["batched, compiled"] = lambda: images.views(changes)
        versions = {}
        if (kornia := images.kornia_views()) is not None:
            works["kornia"], versions = kornia, {"kornia": peers.version("kornia")}
        check = {key: value for arm in list(works)[1:] for key, value in _moments(arm, works[arm], images.plain_views).items()}
        limits = dict.fromkeys(check, 1.6 / sizes.batch**0.5)  # of draws: 0.1 for 256 images
        return turns.compare("views", sizes, works, floor=floor, check=check, limits=limits, versions=versions, say=say)


def _moments(arm: str, make: Callable[[], list[Tensor]], plain_views: Callable[[], list[Tensor]]) -> dict[str, float]:
    """How far from PIL's mean and deviation of all normalised pixels an arm's are, by view, over four draws."""
    ours, theirs = ([[view.cpu() for view in each()] for _ in range(4)] for each in (make, plain_views))
    found = {}
    for at, name in enumerate(("student's", "teacher's")):
        one, other = (torch.stack([draw[at] for draw in draws]) for draws in (ours, theirs))
        found[f"{arm}: {name} mean"] = float((one.mean() - other.mean()).abs())
        found[f"{arm}: {name} deviation"] = float((one.std() - other.std()).abs())
    return found
