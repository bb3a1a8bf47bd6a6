"""The baselines: the published recipe in its straightforward form, one image and one tensor at a time.

Written from the equations and from what the paper's code is known to do (a copy of the bank at every step, B x K logits, PIL
transforms, one operation per tensor of the teacher, contiguous weights), for comparison alone: no run uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor
from torch.optim import Optimizer
from torchvision import transforms

from isd_repro.config.params import View


def isd_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
    """KL(p_t || p_s), averaged over the batch."""
    anchors_KD = bank_KD.clone().detach()
    near_student, near_teacher = student_BD @ anchors_KD.T, teacher_BD @ anchors_KD.T
    near_student /= tau_student
    near_teacher /= tau_teacher
    return F.kl_div(F.log_softmax(near_student, dim=1), F.softmax(near_teacher, dim=1), reduction="batchmean")


def moco_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau: float) -> Tensor:
    """Cross entropy of the positive among B x (1 + K) logits, averaged over the batch."""
    anchors_KD = bank_KD.clone().detach()
    positive = torch.einsum("bd,bd->b", student_BD, teacher_BD)[:, None]
    logits = torch.cat([positive, student_BD @ anchors_KD.T], dim=1)
    logits /= tau
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@torch.no_grad()
def average(teacher: torch.nn.Module, student: torch.nn.Module, momentum: float) -> None:
    """The teacher's average, tensor by tensor, each a new one."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.data = ours.data * momentum + theirs.data * (1.0 - momentum)


def step(method: Any, optimizer: Optimizer, student_view: Tensor, teacher_view: Tensor, shuffle: Tensor) -> float:
    """One step of an `isd.Method`'s parts; its loss, read at once."""
    config, bank = method.config, method.bank
    student_BD = F.normalize(method.predictor(method.student(student_view)), dim=1)
    with torch.no_grad():
        average(method.teacher, method.student, config.momentum)
        teacher_BD = F.normalize(method.teacher(teacher_view[shuffle]), dim=1)[shuffle.argsort()]
    loss = isd_loss(student_BD, teacher_BD, bank.rows, config.tau_student, config.tau_teacher)
    bank.push(teacher_BD)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class _Blur:
    """PIL's own Gaussian blur, as in the published recipe; torchvision's goes through a tensor and a convolution."""

    def __init__(self, least: float, most: float) -> None:
        self.least, self.most = least, most

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(self.least, self.most))))


def transform(view: View, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
    """torchvision's transforms of PIL images for a view."""
    steps: list[Any] = [transforms.RandomResizedCrop(size, scale=(view.crop_min, view.crop_max))]
    if view.jitter is not None:
        jitter = transforms.ColorJitter(view.jitter.brightness, view.jitter.contrast, view.jitter.saturation, view.jitter.hue)
        steps.append(transforms.RandomApply([jitter], p=view.jitter.p))
    steps.append(transforms.RandomGrayscale(view.grayscale))
    if view.blur is not None:
        steps.append(transforms.RandomApply([_Blur(view.blur.sigma_min, view.blur.sigma_max)], p=view.blur.p))
    steps += [transforms.RandomHorizontalFlip(view.flip), transforms.ToTensor(), transforms.Normalize(mean, std)]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def views(images: list[Image.Image], *made: Callable[[Image.Image], Tensor]) -> list[Tensor]:
    """A batch of each view."""
    return [torch.stack([each(image) for image in images]) for each in made]
