r"""SimSiam: each view's prediction follows the other view's projection, which takes no gradient; no teacher, bank or negatives.

With predictions p and projections z of two views, D(p, z) = -cos(p, stop_gradient(z)):

    loss = D(p_1, z_2) / 2 + D(p_2, z_1) / 2, averaged over the batch.

Source: Chen and He, CVPR 2021, arXiv 2011.10566; facebookresearch/simsiam at 39ac33e, simsiam/builder.py and main_simsiam.py.
The widths of the heads (2,048 and a quarter of it there) follow the backbone's features. The released script also starts the last
BatchNorm of each residual block at zero; here all methods share one initialisation.
Deviations: DEV-01, DEV-02.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from isd_repro.config.fields import Frozen
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn.heads import Projected, mlp, unit
from isd_repro.nn.health import health


class Config(Frozen):
    """Keys of a run's `method` block."""

    fixed_predictor_lr: bool = True  # the predictor does not follow the schedule of the learning rate


def simsiam_loss(prediction_BD: Tensor, projection_BD: Tensor) -> Tensor:
    """Negative cosine similarity, averaged over the batch; rows are unit vectors and only the prediction takes a gradient."""
    return -(prediction_BD * projection_BD.detach()).sum(1).mean()


def projector(width: int) -> nn.Sequential:
    """Three linear layers with BatchNorm behind each; the last has neither ReLU nor weight and bias of its BatchNorm."""
    hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, width, bias=False), nn.BatchNorm1d(width, affine=False))


class Method(nn.Module):
    """One network for both views, and a predictor with a bottleneck."""

    symmetric = True
    least_loss = -1.0  # of a negative cosine

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config = config
        network = backbone()
        width = network.features
        self.student = Projected(network, projector(width))
        self.predictor = mlp(width, width // 4, width, bias=False)

    @property
    def fixed_lr(self) -> Sequence[nn.Module]:
        """Modules whose learning rate follows no schedule."""
        return [self.predictor] if self.config.fixed_predictor_lr else []

    def forward(self, batch: Batch) -> StepOutput:
        """Both views through projector and predictor, then the loss both ways."""
        z_1, z_2 = self.student(batch.view_student), self.student(batch.view_teacher)
        p_1, p_2 = unit(self.predictor(z_1)), unit(self.predictor(z_2))
        z_1, z_2 = unit(z_1), unit(z_2)
        loss = simsiam_loss(p_1, z_2) / 2 + simsiam_loss(p_2, z_1) / 2
        return StepOutput(loss, health(p_1.detach()))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """There is no teacher."""
        return {"student": self.student.backbone}
