r"""CompRess: a student learns the similarities that a frozen encoder gives; in ISD the student's own average takes its place.

The teacher is the encoder of a checkpoint. With its unit-norm features k of an image, the student's features q of the same view,
mapped linearly to the teacher's width and normalised, and K past teacher features x_i in the bank,

    p_s(i) = softmax_i(q . x_i / tau),    p_t(i) = softmax_i(k . x_i / tau),    loss = mean over the batch of KL(p_t || p_s).

The teacher sees the student's view as the run normalises it, in eval mode; the second view is not used.
Source: Koohpayegani et al., NeurIPS 2020, arXiv 2010.14713, the form with one queue; UMBCvision/CompRess at c5e57ed,
train_student_one_queue.py. The released bank begins with uniform numbers, here with random directions.
Deviations: DEV-01, DEV-02.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from isd_repro.config.fields import Frozen, Words
from isd_repro.config.params import Sha256
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn.bank import Bank
from isd_repro.nn.heads import Projected, unit
from isd_repro.nn.health import health


class Config(Frozen):
    """Keys of a run's `method` block."""

    teacher: Words  # path of its checkpoint, from the profile's folder
    sha256: Sha256  # of the checkpoint, so that another one is another run
    tau: PositiveFloat
    bank_size: PositiveInt  # K, in images


def compress_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau: float) -> Tensor:
    """KL(p_t || p_s) in nats, averaged over the batch; rows are unit vectors and only the student's take a gradient."""
    log_student_BK, log_teacher_BK = (F.log_softmax(rows @ bank_KD.T / tau, dim=1) for rows in (student_BD, teacher_BD))
    return F.kl_div(log_student_BK, log_teacher_BK, reduction="batchmean", log_target=True)


class Method(nn.Module):
    """A student with a linear layer, and a teacher that is no part of the state, because its file is."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        assert setting.frozen is not None
        self.config = config
        teacher, network = setting.frozen(config.teacher, config.sha256), backbone()
        self.student = Projected(network, nn.Linear(network.features, teacher.features))
        self.bank = Bank(config.bank_size, teacher.features, setting.batch_size)
        self._teachers = (teacher,)  # a tuple keeps it out of parameters, buffers and modes

    def forward(self, batch: Batch) -> StepOutput:
        """Both encoders on one view, similarities to the old bank, enqueue."""
        student_BD = unit(self.student(batch.view_student))
        with torch.no_grad():
            teacher_BD = unit(self._teachers[0].to(batch.view_student)(batch.view_student))  # where and as what the images are
        with torch.autocast(student_BD.device.type, enabled=False):
            loss = compress_loss(student_BD, teacher_BD, self.bank.before_push(), self.config.tau)
        self.bank.push(teacher_BD)
        return StepOutput(loss, health(student_BD))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """The student alone."""
        return {"student": self.student.backbone}
