"""Parts of other projects as arms of a comparison, where they are installed: kornia's views, lightly's bank and loss.

They are measured and never needed: no group of dependencies names them, and without them a comparison has its other arms alone.
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
    """A package, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def version(package: str) -> str:
    """Of an installed package."""
    return metadata.version(package)


def kornia_views(laws: tuple[View, ...], size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Views] | None:
    """kornia's operations of whole batches for each law, with the odds and ranges of the law; None without kornia."""
    kornia = module("kornia.augmentation")
    return None if kornia is None else [_kornia_view(kornia, law, size, mean, std) for law in laws]


def _kornia_view(kornia: Any, law: View, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Views:
    # `resample` cuts all crops at once; kornia's default, `slice`, takes them one by one
    parts = [kornia.RandomResizedCrop((size, size), scale=(law.crop_min, law.crop_max), cropping_mode="resample")]
    if law.jitter is not None:
        each = law.jitter
        parts.append(kornia.ColorJitter(each.brightness, each.contrast, each.saturation, each.hue, p=each.p))
    if law.grayscale:
        parts.append(kornia.RandomGrayscale(p=law.grayscale))
    if law.blur is not None:
        taps = 2 * min(round(3 * law.blur.sigma_max), size - 1) + 1
        parts.append(kornia.RandomGaussianBlur((taps, taps), (law.blur.sigma_min, law.blur.sigma_max), p=law.blur.p))
    if law.flip:
        parts.append(kornia.RandomHorizontalFlip(p=law.flip))
    made = nn.Sequential(*parts, kornia.Normalize(mean, std))
    return lambda pixels: made(pixels.float() / 255)


def lightly_loss(bank_KD: Tensor, tau: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    """lightly's contrastive loss with its own memory bank, filled with these rows; None without lightly.

    It normalises the student's rows itself, so its gradient has no part along them. Each call ends with the teacher's rows
    pushed into its bank, after the bank was copied for the loss.
    """
    lightly = module("lightly.loss")
    if lightly is None:
        return None
    loss: Callable[[Tensor, Tensor], Tensor] = lightly.NTXentLoss(tau, memory_bank_size=tuple(bank_KD.shape)).to(bank_KD.device)
    loss.memory_bank.bank.copy_(bank_KD)  # type: ignore[attr-defined]
    return loss
