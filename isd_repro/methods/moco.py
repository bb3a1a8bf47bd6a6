r"""MoCo v2: contrast each image's teacher embedding against a bank of other images' embeddings.

With unit-norm student q, teacher k of the same image and bank rows x_i,

    loss = -log( exp(q . k / tau) / (exp(q . k / tau) + sum_i exp(q . x_i / tau)) ), averaged over the batch.

Source: He et al., arXiv 1911.05722 and Chen et al., arXiv 2003.04297; facebookresearch/moco at 7397dfe, moco/builder.py.
Deviations: DEV-01, DEV-02, DEV-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Unit
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn import ema
from isd_repro.nn.bank import Bank
from isd_repro.nn.bank_attention import attend
from isd_repro.nn.heads import contrastive, unit
from isd_repro.nn.health import health
from isd_repro.nn.temperature import OptionalTauSchedule, tau_at


class Config(Frozen):
    """Keys of a run's `method` block."""

    tau: PositiveFloat
    momentum: Unit  # EMA factor of the teacher, per step
    bank_size: PositiveInt  # K, in images
    dim: PositiveInt = 128  # D of the embedding; heads `isd` do not read it
    # mlp: ISD's projector and predictor, for ISD with a hard target; isd: the same, with a quarter of the encoder's width for D
    heads: Literal["moco", "mlp", "isd"] = "moco"
    tau_schedule: OptionalTauSchedule = None  # see nn.temperature


def logits_of(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau: float) -> Tensor:
    """B x (1 + K) similarities over tau: the positive first, then the bank."""
    positive_B1 = (student_BD * teacher_BD).sum(1, keepdim=True)
    return torch.cat([positive_B1, student_BD @ bank_KD.T], dim=1) / tau


def moco_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau: float) -> Tensor:
    """InfoNCE in nats, averaged over the batch; rows are unit vectors and only the student's take a gradient."""
    logits = logits_of(student_BD, teacher_BD, bank_KD, tau)
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()


def attended_moco_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau: float) -> Tensor:
    """`moco_loss` without a B x K matrix: the positive joins the bank's log-sum-exp (DEV-24)."""
    positive_B = (student_BD * teacher_BD.detach()).sum(1) / tau
    lse_B, _ = attend(student_BD / tau, bank_KD)
    return (torch.logaddexp(lse_B, positive_B) - positive_B).mean()


class Method(nn.Module):
    """MoCo v2 with its two-layer head (no BatchNorm in it) on both networks; or ISD's networks under MoCo's loss."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        width = network.features
        embedding = width // 4 if config.heads == "isd" else config.dim
        self.student, self.predictor = contrastive(network, width, "moco" if config.heads == "moco" else "mlp", embedding)
        self.teacher = ema.teacher_of(self.student)
        self.bank = Bank(config.bank_size, embedding, setting.batch_size, dtype=setting.bank_dtype)
        self.fast, self.steps_per_epoch = setting.fast, setting.steps_per_epoch

    def forward(self, batch: Batch) -> StepOutput:
        """Student, EMA, shuffled teacher, logits against the old bank, enqueue."""
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, self.config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        loss_of, bank_KD = (attended_moco_loss, self.bank.rows) if self.fast else (moco_loss, self.bank.before_push())
        tau = tau_at(batch.step, self.steps_per_epoch, self.config.tau, self.config.tau_schedule)
        with torch.autocast(student_BD.device.type, enabled=False):
            loss = loss_of(student_BD, teacher_BD, bank_KD, tau)
        self.bank.push(teacher_BD)
        return StepOutput(loss, health(student_BD, teacher_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
