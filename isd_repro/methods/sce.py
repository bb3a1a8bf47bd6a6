r"""SCE: a target between MoCo's hard positive and ISD's soft similarities, mixed by one factor `lam`.

With unit-norm student q, teacher k of the same image and bank rows x_i, the target puts `lam` on the positive and spreads the
rest over the bank as the teacher does:

    p_t(i) = softmax_i(k . x_i / tau_teacher) over the bank,
    p_s    = softmax of (q . k, q . x_1, ..., q . x_K) / tau_student,
    loss   = -lam log p_s(positive) - (1 - lam) sum_i p_t(i) log p_s(i), averaged over the batch.

`lam` 1 is MoCo's loss. With `lam` 0 the gradient is ISD's but for the positive in the student's softmax.
Source: Denize et al., WACV 2023, arXiv 2111.14585; juliendenize/eztorch at e2dfb4c, eztorch/losses/sce_loss.py. The released code
gives the positive a logit of 0 in the teacher's softmax; here it is left out of it, as in the paper's equation.
Deviations: DEV-01, DEV-02, DEV-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Unit
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn import ema
from isd_repro.nn.bank import Bank
from isd_repro.nn.bank_attention import attend
from isd_repro.nn.heads import contrastive, unit
from isd_repro.nn.health import health


class Config(Frozen):
    """Keys of a run's `method` block."""

    lam: Unit  # weight of the positive in the target: 1 is a hard target, 0 a soft one
    tau_student: PositiveFloat
    tau_teacher: PositiveFloat
    momentum: Unit  # EMA factor of the teacher, per step
    bank_size: PositiveInt  # K, in images
    dim: PositiveInt = 128  # D of the embedding
    heads: Literal["moco", "mlp"] = "moco"  # see nn.heads.contrastive


def sce_loss(
    student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, lam: float, tau_student: float, tau_teacher: float
) -> Tensor:
    """Cross-entropy in nats, averaged over the batch; rows are unit vectors and only the student's take a gradient."""
    positive_B1 = (student_BD * teacher_BD).sum(1, keepdim=True)
    log_student = F.log_softmax(torch.cat([positive_B1, student_BD @ bank_KD.T], dim=1) / tau_student, dim=1)
    target_BK = F.softmax(teacher_BD @ bank_KD.T / tau_teacher, dim=1)
    return -(lam * log_student[:, 0] + (1 - lam) * (target_BK * log_student[:, 1:]).sum(1)).mean()


def attended_sce_loss(
    student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, lam: float, tau_student: float, tau_teacher: float
) -> Tensor:
    """`sce_loss` without a B x K matrix: the teacher's mean row stands for the bank in the target (DEV-24)."""
    asked_BD, teacher_BD = student_BD / tau_student, teacher_BD.detach()
    positive_B = (asked_BD * teacher_BD).sum(1)
    lse, mean = attend(torch.cat([asked_BD, teacher_BD / tau_teacher]), bank_KD)
    lse_B, mean_BD = lse.chunk(2)[0], mean.chunk(2)[1]
    return (torch.logaddexp(lse_B, positive_B) - lam * positive_B - (1 - lam) * (asked_BD * mean_BD).sum(1)).mean()


class Method(nn.Module):
    """MoCo v2's networks, or ISD's, under the mixed loss."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        self.student, self.predictor = contrastive(network, network.features, config.heads, config.dim)
        self.teacher = ema.teacher_of(self.student)
        self.bank = Bank(config.bank_size, config.dim, setting.batch_size, dtype=setting.bank_dtype)
        self.fast = setting.fast

    def forward(self, batch: Batch) -> StepOutput:
        """Student, EMA, shuffled teacher, similarities to the old bank, enqueue."""
        config = self.config
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        loss_of, bank_KD = (attended_sce_loss, self.bank.rows) if self.fast else (sce_loss, self.bank.before_push())
        with torch.autocast(student_BD.device.type, enabled=False):
            loss = loss_of(student_BD, teacher_BD, bank_KD, config.lam, config.tau_student, config.tau_teacher)
        self.bank.push(teacher_BD)
        return StepOutput(loss, health(student_BD, teacher_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
