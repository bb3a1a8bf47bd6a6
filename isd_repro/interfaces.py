"""The interfaces between the parts: input and output of a method. There is no logic here.

Shape letters used in the whole package: N images, B batch, C channels, H W pixels, D embedding, K bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One training step's input, on the training device.

    Row i of every view, `index` and `label` belongs to the same image. With W ranks, rank r holds the B / W rows from
    r * B / W on.

    Attributes:
        view_student: normalised float images, B x C x H x W.
        view_teacher: another view of the same images, B x C x H x W.
        index: position of each image in the training split, int64, B.
        label: class of each image, int64, B; only `supervised` may read it.
        shuffle: a permutation of the whole batch, int64, the same on every rank; `ema.embed` uses it for shuffle-BN.
        step: number of the step, counted from 0 over all epochs, for schedules.
        more: further views of the same images, one for each of `data.views_more`.
    """

    view_student: Tensor
    view_teacher: Tensor
    index: Tensor
    label: Tensor
    shuffle: Tensor
    step: int = 0
    more: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """The output of a method for one batch.

    Attributes:
        loss: scalar with a gradient.
        metrics: detached scalar tensors by name; the loop averages them between two log lines.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method knows of its run apart from the batches: counts, arithmetic and other encoders.

    Attributes:
        classes: of the training split.
        images: of the training split; positions in `Batch.index` are below it.
        batch_size: B, over all ranks.
        steps: of the whole training.
        fast: `numerics.engine` is `fast`: the bank's loss by attention.
        bank_dtype: of the bank's rows; float16 with `fast` and bf16 alone.
        frozen: the encoder of a checkpoint, by a path from the profile's folder and the sha256 of its bytes; in eval mode.
    """

    classes: int
    images: int
    batch_size: int
    steps: int
    fast: bool = False
    bank_dtype: torch.dtype = torch.float32
    frozen: Callable[[str, str], Backbone] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; a last, smaller batch is dropped."""
        return self.images // self.batch_size


class Backbone(nn.Module):
    """An image encoder without heads: B x C x H x W -> B x `features`."""

    features: int


class Method(Protocol):
    """One self-supervised method: a module whose forward makes one training step's loss.

    Five attributes are optional: `symmetric`, True where both views pass through the student with a gradient; `fixed_lr`,
    modules whose learning rate does not follow the schedule; `needs_labels`, True where images without labels are refused;
    `takes_more_views`, without which `data.views_more` is refused; and `least_loss`, the bound below which `verify` refuses a
    recorded loss, 0 by default.
    """

    def __call__(self, batch: Batch) -> StepOutput: ...

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Backbones to export, without heads: `student`, and `teacher` where the method has one."""
        ...


BackboneFactory = Callable[[], Backbone]
