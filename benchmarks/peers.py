"""Parts of other projects as variants of a comparison, if installed: kornia's augmentations, lightly's loss with its bank.

They are measured and never needed: no group of dependencies names them, and without them a comparison has its other variants.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from isd_repro.config.params import View

Views = Callable[[Tensor], Tensor]  # uint8 B x 3 x H x W -> normalised B x 3 x S x S


def module(name: str) -> Any | None:
    """A package, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def version(package: str) -> str:
    """The version of an installed package."""
    return metadata.version(package)


def kornia_view(kornia: Any, view: View, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Views:
    """kornia's operations on whole batches with the probabilities and ranges of a view; `kornia` is `kornia.augmentation`."""
    # `resample` cuts all crops at once; kornia's default, `slice`, takes them one by one
    parts = [kornia.RandomResizedCrop((size, size), scale=(view.crop_min, view.crop_max), cropping_mode="resample")]
    if view.jitter is not None:
        each = view.jitter
        parts.append(kornia.ColorJitter(each.brightness, each.contrast, each.saturation, each.hue, p=each.p))
    if view.grayscale:
        parts.append(kornia.RandomGrayscale(p=view.grayscale))
    if view.blur is not None:
        taps = 2 * min(round(3 * view.blur.sigma_max), size - 1) + 1
        parts.append(kornia.RandomGaussianBlur((taps, taps), (view.blur.sigma_min, view.blur.sigma_max), p=view.blur.p))
    if view.flip:
        parts.append(kornia.RandomHorizontalFlip(p=view.flip))
    made = nn.Sequential(*parts, kornia.Normalize(mean, std))
    return lambda pixels: made(pixels.float() / 255)


def lightly_loss(bank_KD: Tensor, tau: float) -> Callable[[Tensor, Tensor], Tensor]:
    """lightly's contrastive loss with its own memory bank, filled with these rows; each call also pushes the teacher's rows."""
    lightly: Any = module("lightly.loss")
    loss = lightly.NTXentLoss(tau, memory_bank_size=tuple(bank_KD.shape)).to(bank_KD.device)
    loss.memory_bank.bank.copy_(bank_KD)
    return loss  # type: ignore[no-any-return]
