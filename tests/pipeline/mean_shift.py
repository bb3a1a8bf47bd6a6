"""Mean shift: pull the student towards the nearest past embeddings of the teacher's view (MSF, arXiv 2105.07269)."""

from collections.abc import Mapping

from torch import Tensor, nn

from isd_repro.config.fields import Count, Frozen, Unit
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn import ema
from isd_repro.nn.bank import Bank
from isd_repro.nn.heads import Projected, mlp, unit


class Config(Frozen):
    """Keys of a run's `method` block."""

    neighbours: Count
    bank_size: Count
    momentum: Unit = 0.99


def mean_shift_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, neighbours: int) -> Tensor:
    """Mean squared distance of the student to the teacher's nearest bank rows."""
    nearest_BN = (teacher_BD @ bank_KD.T).topk(neighbours).indices
    return (2 - 2 * (student_BD[:, None] * bank_KD[nearest_BN]).sum(2)).mean()


class Method(nn.Module):
    """Backbone and projector on both sides, a predictor on the student."""

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config, network = config, backbone()
        self.student = Projected(network, mlp(network.features, 2 * network.features, 64))
        self.predictor = mlp(64, 128, 64)
        self.teacher = ema.teacher_of(self.student)
        self.bank = Bank(config.bank_size, 64, setting.batch_size)

    def forward(self, batch: Batch) -> StepOutput:
        """One step; the new embeddings are pushed first, so that each image is its own nearest neighbour."""
        student_BD = unit(self.predictor(self.student(batch.view_student)))
        ema.update(self.teacher, self.student, self.config.momentum)
        teacher_BD = ema.embed(self.teacher, batch.view_teacher, batch.shuffle)
        self.bank.push(teacher_BD)
        loss = mean_shift_loss(student_BD, teacher_BD, self.bank.rows.clone(), self.config.neighbours)
        return StepOutput(loss, {"distance": loss.detach()})

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Both backbones."""
        return {"student": self.student.backbone, "teacher": self.teacher.backbone}
