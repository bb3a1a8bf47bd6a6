r"""BYOL-asym: the student predicts the teacher's embedding of the other view, in one direction and without a bank.

With unit-norm prediction q and teacher embedding k, loss = mean over the batch of |q - k|^2 = 2 - 2 q . k. With `symmetric`,
which is BYOL's own form, the loss is the sum of both directions.

Source: Grill et al., arXiv 2006.07733, in the asymmetric form of the ISD paper; UMBCvision/ISD at 4bdd603, train_byol.py.
Deviations: DEV-01, DEV-02.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Unit
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn import ema
from isd_repro.nn.heads import Projected, mlp, unit
from isd_repro.nn.health import health


class Config(Frozen):
    """Keys of a run's `method` block."""

    momentum: Unit  # EMA factor of the teacher, per step
    # Records made before this key existed lack it, so it is written only where it is given.
    symmetric: Annotated[bool, Field(exclude_if=lambda given: not given)] = False


def byol_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Squared distance of unit vectors, averaged over the batch; only the student's take a gradient."""
    return (student_BD - teacher_BD).square().sum(1).mean()


class Method(nn.Module):
    """BYOL's networks: projector on both, predictor on the student."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        width = network.features
        embedding = width // 4
        self.student = Projected(network, mlp(width, 2 * width, embedding))
        self.predictor = mlp(embedding, 2 * width, embedding)
        self.teacher = ema.teacher_of(self.student)
        self.symmetric = config.symmetric

    def forward(self, batch: Batch) -> StepOutput:
        """Student, EMA, shuffled teacher, distance; then the other direction, if asked for."""
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, self.config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        loss = byol_loss(student_BD, teacher_BD)
        if self.symmetric:
            other_BD = unit(self.predictor(self.student(batch.view_teacher)))
            loss = loss + byol_loss(other_BD, ema.embed(self.teacher, batch.view_student, batch.shuffle))
        return StepOutput(loss, health(student_BD, teacher_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
