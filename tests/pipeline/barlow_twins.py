r"""Barlow Twins: the dimensions of two views' embeddings correlate with themselves and with no other dimension.

With the embeddings z of both views normalised over the batch and C = z_1^T z_2 / B, D x D,

    loss = sum_i (1 - C_ii)^2 + weight * sum over i != j of C_ij^2.

Source: Zbontar et al., ICML 2021, arXiv 2103.03230.
"""

from collections.abc import Mapping

from pydantic import PositiveFloat
from torch import Tensor, nn

from isd_repro.config.fields import Count, Frozen
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn.heads import Projected, mlp, unit
from isd_repro.nn.health import health
from isd_repro.runtime import ranks


class Config(Frozen):
    """Keys of a run's `method` block."""

    weight: PositiveFloat = 0.005  # of the terms off the diagonal
    dim: Count = 64  # D of the embedding


def barlow_twins_loss(one_BD: Tensor, other_BD: Tensor, weight: float) -> Tensor:
    """The loss over the images of all ranks."""
    one_BD, other_BD = ((rows - rows.mean(0)) / rows.std(0) for rows in map(ranks.gather_with_gradient, (one_BD, other_BD)))
    correlation_DD = one_BD.T @ other_BD / len(one_BD)
    diagonal = correlation_DD.diagonal()
    return (1 - diagonal).square().sum() + weight * (correlation_DD.square().sum() - diagonal.square().sum())


class Method(nn.Module):
    """One network for both views; there is no teacher."""

    symmetric = True

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config, network = config, backbone()
        self.student = Projected(network, mlp(network.features, network.features, config.dim))

    def forward(self, batch: Batch) -> StepOutput:
        """Both views through the network, then the loss."""
        one_BD, other_BD = self.student(batch.view_student), self.student(batch.view_teacher)
        loss = barlow_twins_loss(one_BD, other_BD, self.config.weight)
        return StepOutput(loss, health(unit(one_BD.detach())))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """The backbone."""
        return {"student": self.student.backbone}
