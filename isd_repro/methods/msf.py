r"""MSF (mean shift): the student predicts the teacher's nearest neighbours in the bank, the image itself among them.

The bank first takes the teacher embeddings of the batch. With unit-norm prediction q, teacher embedding k of the same image and
N(k) the `neighbours` bank rows nearest to k (the first is k itself),

    loss = mean over the batch and over x in N(k) of |q - x|^2 = 2 - 2 q . x.

With one neighbour this is BYOL-asym.
Source: Koohpayegani et al., ICCV 2021, arXiv 2105.07269; UMBCvision/MSF at c47cf8a, train_msf.py.
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


class Config(Frozen):
    """Keys of a run's `method` block."""

    neighbours: PositiveInt = 5
    momentum: Unit  # EMA factor of the teacher, per step
    bank_size: PositiveInt  # K, in images

    @model_validator(mode="after")
    def _bank_holds_the_neighbours(self) -> Config:
        if self.neighbours > self.bank_size:
            raise ValueError(f"neighbours: {self.neighbours} of a bank of {self.bank_size} images; enlarge bank_size")
        return self


def msf_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, neighbours: int) -> Tensor:
    """Mean squared distance to the teacher's nearest rows; rows are unit vectors and only the student's take a gradient."""
    nearest_BN = (teacher_BD.to(bank_KD.dtype) @ bank_KD.T).topk(neighbours, dim=1).indices
    mean_BD = bank_KD[nearest_BN].to(student_BD.dtype).mean(1)
    return (2 - 2 * (student_BD * mean_BD).sum(1)).mean()


class Method(nn.Module):
    """ISD's networks with projector and predictor, which are MSF's: the released scripts share them."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        embedding = network.features // 4
        self.student, self.predictor = contrastive(network, network.features, "mlp", embedding)
        self.teacher = ema.teacher_of(self.student)
        self.bank = Bank(config.bank_size, embedding, setting.batch_size, dtype=setting.bank_dtype)

    def forward(self, batch: Batch) -> StepOutput:
        """Student, EMA, shuffled teacher, enqueue, distance to the nearest rows."""
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, self.config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        self.bank.push(teacher_BD)
        with torch.autocast(student_BD.device.type, enabled=False):
            loss = msf_loss(student_BD, teacher_BD, self.bank.rows, self.config.neighbours)
        return StepOutput(loss, health(student_BD, teacher_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
