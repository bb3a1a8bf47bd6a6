"""Projectors and predictors, and the encoder that carries a projector."""

from __future__ import annotations

from typing import Literal

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


def contrastive(backbone: nn.Module, features: int, heads: Literal["mlp", "moco"], dim: int) -> tuple[Projected, nn.Module]:
    """The student and its predictor, for either loss.

    Args:
        backbone: gives B x `features`.
        features: the backbone's width.
        heads: `mlp` is ISD's projector and predictor with BatchNorm (train_isd_plus.py); `moco` is MoCo v2's projector
            Linear, ReLU, Linear (moco/builder.py, `mlp=True`), and no predictor.
        dim: D, dimensions of the embedding.
    """
    if heads == "moco":
        return Projected(backbone, mlp(features, features, dim, batchnorm=False)), nn.Identity()
    return Projected(backbone, mlp(features, 2 * features, dim)), mlp(dim, 2 * features, dim)


def unit(embedding_BD: Tensor) -> Tensor:
    """Rows of norm 1, in float32 or better whatever autocast left."""
    return F.normalize(embedding_BD.to(torch.promote_types(embedding_BD.dtype, torch.float32)), dim=1)
