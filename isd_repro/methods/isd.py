r"""ISD: the student gives the same soft similarities to a bank of images as the teacher.

Two views of an image are compared with the K past teacher embeddings x_i in the bank, never with each other. With
unit-norm student embedding q and teacher embedding k,

    p_s(i) = softmax_i(q . x_i / tau_student),    p_t(i) = softmax_i(k . x_i / tau_teacher),
    loss   = mean over the batch of KL(p_t || p_s),

and the teacher is the exponential moving average of the student.
Source: Tejankar et al., ICCV 2021, arXiv 2012.09259; UMBCvision/ISD at 4bdd603, train_isd.py (heads `none`) and
train_isd_plus.py (heads `mlp`). Heads `moco` are no recipe of the paper's: with them the loss alone differs from MoCo v2.
With a weak teacher view in addition they make ReSSL (Zheng et al., NeurIPS 2021, arXiv 2107.09282), whose cross-entropy has the
same gradient.
Deviations: DEV-01, DEV-02, DEV-03, DEV-24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Unit
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn import ema
from isd_repro.nn.bank import Bank, BankInit
from isd_repro.nn.bank_attention import attend
from isd_repro.nn.heads import Projected, contrastive, mlp, unit
from isd_repro.nn.health import health


class Config(Frozen):
    """Keys of a run's `method` block."""

    tau_student: PositiveFloat  # softmax temperature of the student's similarities
    tau_teacher: PositiveFloat
    momentum: Unit  # EMA factor of the teacher, per step
    bank_size: PositiveInt  # K, in images
    bank_init: BankInit = "unit"
    # none: predictor on pooled features; mlp: projector and predictor; moco: MoCo v2's projector and no predictor
    heads: Literal["none", "mlp", "moco"] = "none"
    # D; none means the width of the pooled features, a quarter of it with heads `mlp`. Records made before this key existed
    # lack it, so it is written only where it is given.
    dim: Annotated[PositiveInt | None, Field(exclude_if=lambda dim: dim is None)] = None

    @model_validator(mode="after")
    def _dim_goes_with_a_projector(self) -> Config:
        if self.heads == "none" and self.dim is not None:
            raise ValueError(
                "heads none compares the pooled features themselves, so dim cannot be chosen; remove it or set heads"
            )
        return self


def isd_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
    """KL(p_t || p_s) in nats, averaged over the batch; rows are unit vectors and only the student's take a gradient."""
    log_student_BK = F.log_softmax(student_BD @ bank_KD.T / tau_student, dim=1)
    log_teacher_BK = F.log_softmax(teacher_BD @ bank_KD.T / tau_teacher, dim=1)
    return F.kl_div(log_student_BK, log_teacher_BK, reduction="batchmean", log_target=True)


def attended_isd_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
    """`isd_loss` without a B x K matrix: lse_s - lse_t + mean_t . (k / tau_teacher - q / tau_student), averaged (DEV-24).

    lse and mean are those of `attend`; sum_i p_t(i) x_i . (...) needs p_t in its mean alone.
    """
    asked_BD, taught_BD = student_BD / tau_student, teacher_BD.detach() / tau_teacher
    lse, mean = attend(torch.cat([asked_BD, taught_BD]), bank_KD)
    (lse_s, lse_t), mean_t = lse.chunk(2), mean.chunk(2)[1]
    return (lse_s - lse_t + (mean_t * (taught_BD - asked_BD)).sum(1)).mean()


class Method(nn.Module):
    """ISD with one bank, filled by the teacher."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        width = network.features
        embedding = config.dim or (width // 4 if config.heads == "mlp" else width)
        self.predictor: nn.Module
        if config.heads == "none":
            self.student = Projected(network, nn.Identity())
            self.predictor = mlp(width, width, width, bias=False)
        else:
            self.student, self.predictor = contrastive(network, width, config.heads, embedding)
        self.teacher = ema.teacher_of(self.student)
        self.bank = Bank(config.bank_size, embedding, setting.batch_size, config.bank_init, setting.bank_dtype)
        self.fast = setting.fast

    def forward(self, batch: Batch) -> StepOutput:
        """One step in the paper's order: student, EMA, shuffled teacher, similarities to the old bank, enqueue."""
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, self.config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        loss_of, bank_KD = (attended_isd_loss, self.bank.rows) if self.fast else (isd_loss, self.bank.before_push())
        with torch.autocast(student_BD.device.type, enabled=False):
            loss = loss_of(student_BD, teacher_BD, bank_KD, self.config.tau_student, self.config.tau_teacher)
        self.bank.push(teacher_BD)
        return StepOutput(loss, health(student_BD, teacher_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
