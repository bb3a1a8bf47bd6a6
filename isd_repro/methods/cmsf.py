r"""CMSF in its self-supervised form: MSF with, in addition, neighbours that were near the image in the epoch before.

A second bank holds, row by row, what the teacher made of the same images in the epoch before, under another augmentation. With
unit-norm prediction q, teacher embedding k of the same image and its embedding k' of the epoch before, let N(k) be the
`neighbours` bank rows nearest to k, C(k') the images of the `candidates` rows of the second bank nearest to k', and N'(k) the
`neighbours` of their rows in the first bank that are nearest to k. Then

    loss = mean over the batch of 1/2 mean over x in N(k) of |q - x|^2 + 1/2 mean over x in N'(k) of |q - x|^2.

An image belongs to its own N and N'. In the first epoch k' is random.
Source: Navaneet et al., ECCV 2022, arXiv 2112.04607; UMBCvision/CMSF at 4aaac18, self_supervised/train_msf_2q.py. The released
code looks the second bank's rows up in a table with two embeddings of each image; here they are pushed beside the first bank's,
which differs for an image that is in the bank twice.
Deviations: DEV-01, DEV-02.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Unit
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn import ema
from isd_repro.nn.bank import Bank
from isd_repro.nn.heads import contrastive, unit
from isd_repro.nn.health import health
from isd_repro.runtime import ranks


class Config(Frozen):
    """Keys of a run's `method` block."""

    neighbours: PositiveInt = 5
    candidates: PositiveInt = 10  # rows of the second bank among which the constrained neighbours are
    momentum: Unit  # EMA factor of the teacher, per step
    bank_size: PositiveInt  # K, in images

    @model_validator(mode="after")
    def _each_choice_has_enough_rows(self) -> Config:
        if not self.neighbours <= self.candidates <= self.bank_size:
            found = f"{self.neighbours} neighbours of {self.candidates} candidates of a bank of {self.bank_size} images"
            raise ValueError(f"candidates: {found}; each must be at most the next")
        return self


def cmsf_loss(
    student_BD: Tensor, teacher_BD: Tensor, before_BD: Tensor, banks_KD: tuple[Tensor, Tensor], neighbours: int, candidates: int
) -> Tensor:
    """Mean squared distance to both kinds of neighbours; rows are unit vectors and only the student's take a gradient.

    `before_BD` are the images' embeddings of the epoch before, and the second of `banks_KD` those of the first one's rows.
    """
    bank_KD, second_KD = banks_KD
    similarity_BK = teacher_BD.to(bank_KD.dtype) @ bank_KD.T
    related_BC = (before_BD.to(second_KD.dtype) @ second_KD.T).topk(candidates, dim=1).indices
    chosen = similarity_BK.gather(1, related_BC).topk(neighbours, dim=1).indices
    nearest = torch.cat([similarity_BK.topk(neighbours, dim=1).indices, related_BC.gather(1, chosen)], dim=1)
    mean_BD = bank_KD[nearest].to(student_BD.dtype).mean(1)
    return (2 - 2 * (student_BD * mean_BD).sum(1)).mean()


class Method(nn.Module):
    """MSF's networks, a second bank, and the last embedding of every training image (N x D numbers)."""

    last: Tensor

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        embedding = network.features // 4
        self.student, self.predictor = contrastive(network, network.features, "mlp", embedding)
        self.teacher = ema.teacher_of(self.student)
        self.bank, self.second = (
            Bank(config.bank_size, embedding, setting.batch_size, dtype=setting.bank_dtype) for _ in range(2)
        )
        self.register_buffer("last", unit(torch.randn(setting.images, embedding)))

    def forward(self, batch: Batch) -> StepOutput:
        """Student, EMA, shuffled teacher, enqueue into both banks, distance to the neighbours."""
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, self.config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        before_BD = self.last[batch.index]
        self.bank.push(teacher_BD)
        self.second.push(before_BD)
        self.last[ranks.gather(batch.index)] = ranks.gather(teacher_BD).to(self.last.dtype)
        banks_KD = self.bank.rows, self.second.rows
        with torch.autocast(student_BD.device.type, enabled=False):
            loss = cmsf_loss(student_BD, teacher_BD, before_BD, banks_KD, self.config.neighbours, self.config.candidates)
        return StepOutput(loss, health(student_BD, teacher_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
