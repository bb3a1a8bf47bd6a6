"""BatchNorm over groups of a batch, so that statistics do not depend on how many devices share it.

The paper's runs normalised each GPU's part of the batch by itself. `set_bn_groups` reproduces that on any hardware: group g
is the g-th contiguous part of the batch, as DataParallel scatters it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Grouped:
    """Mixin of the two BatchNorm classes below."""

    bn_groups: int = 1

    def forward(self, x: Tensor) -> Tensor:
        """Any BatchNorm input of B rows, B divisible by `bn_groups` in training mode."""
        assert isinstance(self, nn.BatchNorm1d | nn.BatchNorm2d)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)
        means, variances, outputs = [], [], []
        for part in x.chunk(self.bn_groups):
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            outputs.append(F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps))
            means.append(mean)
            variances.append(variance)
        # Every group's statistics count equally; the released code keeps the first device's.  # DEV-02
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(outputs)


class GroupedBatchNorm1d(_Grouped, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with training statistics per group."""


class GroupedBatchNorm2d(_Grouped, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with training statistics per group."""


def set_bn_groups(module: nn.Module, groups: int) -> None:
    """Turn every BatchNorm below `module` into its grouped form, in place; parameters and buffers stay the same tensors."""
    if groups == 1:
        return
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d):
            child.__class__ = GroupedBatchNorm1d
        elif isinstance(child, nn.BatchNorm2d):
            child.__class__ = GroupedBatchNorm2d
        if isinstance(child, _Grouped):
            child.bn_groups = groups
