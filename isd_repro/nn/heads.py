"""Projectors and predictors, and the encoder that carries a projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projected(nn.Module):
    """A backbone and the projector behind it: what a teacher is a copy of."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Tensor:
        """B x C x H x W -> B x D."""
        embedding: Tensor = self.projector(self.backbone(images))
        return embedding


def mlp(inputs: int, hidden: int, outputs: int, *, batchnorm: bool = True, bias: bool = True) -> nn.Sequential:
    """Linear, BatchNorm unless told otherwise, ReLU, Linear; `bias` is that of the first layer."""
    norm = [nn.BatchNorm1d(hidden)] if batchnorm else []
    return nn.Sequential(nn.Linear(inputs, hidden, bias=bias), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def unit(embedding_BD: Tensor) -> Tensor:
    """Rows of norm 1, in float32 or better whatever autocast left."""
    return F.normalize(embedding_BD.to(torch.promote_types(embedding_BD.dtype, torch.float32)), dim=1)
