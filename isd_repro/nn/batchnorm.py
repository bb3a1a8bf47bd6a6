"""BatchNorm over groups of a batch, so that statistics do not depend on how many devices share it.

The paper's runs normalised each GPU's part of the batch by itself. `set_bn_groups` reproduces that on any hardware: group g
is the g-th contiguous part of the whole batch, as DataParallel scatters it. A rank holds several groups, or one, or a part of one
that it shares with its neighbours. Running values move by the rank's own group; `statistics` are to be averaged over the ranks
after each step, which makes them the mean over all groups, since every group counts equally often.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isd_repro.runtime import ranks
from isd_repro.runtime.errors import ConfigError


class _Grouped:
    """Mixin of the two BatchNorm classes below."""

    bn_groups: int = 1  # on this rank
    bn_ranks: int = 1  # that share a group

    def forward(self, x: Tensor) -> Tensor:
        """Any BatchNorm input of B rows, B divisible by `bn_groups` in training mode."""
        assert isinstance(self, nn.BatchNorm1d | nn.BatchNorm2d)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, self.momentum, self.eps)
        if self.bn_ranks > 1:
            weight = self.weight if self.affine else torch.ones_like(self.running_mean)
            bias = self.bias if self.affine else torch.zeros_like(self.running_mean)
            output, mean, variance = _Shared.apply(x, weight, bias, self.eps, self.bn_ranks)
            count = x.numel() // x.shape[1] * self.bn_ranks
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
            return output  # type: ignore[no-any-return]
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


class _Shared(torch.autograd.Function):
    """BatchNorm of a group that several ranks hold, equally many rows each; `nn.SyncBatchNorm` does this on CUDA alone.

    With y = (x - mean) * scale and n values of a channel in the group, dL/dx = w * scale * (g - sum(g) / n - y * sum(g * y) / n):
    one message there for the statistics and one back for both sums.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, span: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the group's mean and biased variance."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        means, variances = ranks.gather(torch.stack([mean, variance])[None], span).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.span = span
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input for all ranks' losses, of weight and bias for this rank's."""
        x, weight, mean, scale = ctx.saved_tensors
        axes, shape = [0, *range(2, x.dim())], (1, -1, *(1 for _ in range(2, x.dim())))
        gradient = gradients[0].to(mean.dtype)
        normed = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        own = torch.stack([gradient.sum(axes), (gradient * normed).sum(axes)])
        shift, slope = (ranks.total(own, ctx.span) / (x.numel() // x.shape[1] * ctx.span)).unbind(0)
        inner = gradient - shift.view(shape) - normed * slope.view(shape)
        return (inner * (weight * scale).view(shape)).to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None, None


def set_bn_groups(module: nn.Module, groups: int) -> None:
    """Turn every BatchNorm below `module` into its grouped form, in place; parameters and buffers stay the same tensors.

    Args:
        module: of this rank.
        groups: of the whole batch, however many ranks share it.

    Raises:
        ConfigError: neither of ranks and groups divides the other.
    """
    world = ranks.world()
    if groups % world and world % groups:
        raise ConfigError(
            f"numerics.bn_groups: {groups} groups on {world} processes; one number must be a multiple of the other",
            "start another number of processes",
        )
    if groups == world:
        return
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d):
            child.__class__ = GroupedBatchNorm1d
        elif isinstance(child, nn.BatchNorm2d):
            child.__class__ = GroupedBatchNorm2d
        if isinstance(child, _Grouped):
            child.bn_groups, child.bn_ranks = max(1, groups // world), max(1, world // groups)


def statistics(module: nn.Module) -> list[Tensor]:
    """Running means and variances of every BatchNorm below `module`."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d)]
    return [values for norm in norms for values in (norm.running_mean, norm.running_var) if values is not None]
