r"""SimCLR: two views of an image attract each other and repel every other view in the batch; there is no teacher and no bank.

With the 2B unit-norm embeddings z of both views of all ranks' images and j(i) the other view of i's image,

    loss = -mean over i of log( exp(z_i . z_j(i) / tau) / sum over l != i of exp(z_i . z_l / tau) ).

Source: Chen et al., ICML 2020, arXiv 2002.05709; google-research/simclr at 67b5625, tf2/objective.py, whose loss is the sum over
both views and so twice this one. The head is MoCo v2's: Linear, ReLU, Linear.
Deviations: DEV-01, DEV-02.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from isd_repro.config.fields import Frozen
from isd_repro.interfaces import BackboneFactory, Batch, Setting, StepOutput
from isd_repro.nn.heads import contrastive, unit
from isd_repro.nn.health import health
from isd_repro.nn.temperature import OptionalTauSchedule, tau_at
from isd_repro.runtime import ranks


class Config(Frozen):
    """Keys of a run's `method` block."""

    tau: PositiveFloat
    dim: PositiveInt = 128  # D of the embedding
    tau_schedule: OptionalTauSchedule = None  # see nn.temperature


def simclr_loss(one_BD: Tensor, other_BD: Tensor, tau: float) -> Tensor:
    """NT-Xent in nats, averaged over this rank's 2B views against those of all ranks; rows are unit vectors."""
    count, first = len(one_BD), ranks.rank() * len(one_BD)
    anchors_MD = torch.cat([ranks.gather_with_gradient(one_BD), ranks.gather_with_gradient(other_BD)])
    place_B = torch.arange(first, first + count, device=one_BD.device)
    own = torch.cat([place_B, place_B + count * ranks.world()])
    positive = own.roll(count)
    logits = (torch.cat([one_BD, other_BD]) @ anchors_MD.T / tau).scatter(1, own[:, None], -torch.inf)
    return (logits.logsumexp(1) - logits.gather(1, positive[:, None])[:, 0]).mean()


class Method(nn.Module):
    """One network for both views."""

    symmetric = True

    def __init__(self, config: Config, backbone: BackboneFactory, setting: Setting) -> None:
        super().__init__()
        self.config, self.steps_per_epoch = config, setting.steps_per_epoch
        network = backbone()
        self.student, _ = contrastive(network, network.features, "moco", config.dim)

    def forward(self, batch: Batch) -> StepOutput:
        """Both views through the network, then the loss."""
        one_BD, other_BD = (unit(self.student(view)) for view in (batch.view_student, batch.view_teacher))
        tau = tau_at(batch.step, self.steps_per_epoch, self.config.tau, self.config.tau_schedule)
        with torch.autocast(one_BD.device.type, enabled=False):
            loss = simclr_loss(one_BD, other_BD, tau)
        return StepOutput(loss, health(one_BD.detach()))

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """There is no teacher."""
        return {"student": self.student.backbone}
