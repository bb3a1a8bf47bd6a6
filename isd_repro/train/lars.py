r"""LARS: SGD with momentum in which the norm of each weight matrix sets the length of its step.

With weight w, gradient g, weight decay d, momentum m and learning rate lr,

    u = g + d w,    v <- m v + eta |w| / |u| u,    w <- w - lr v,

where eta is 0.001. Vectors (BatchNorm and biases) take plain SGD's step, v <- m v + u, as does a weight whose norm or u is 0.
Source: You et al., arXiv 1708.03888, with the learning rate outside the momentum, as in facebookresearch/moco-v3 at c349e6e,
moco/optimizer.py. There vectors have no weight decay; here that is `optim.exclude_norm_and_bias`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

ETA = 0.001  # the trust coefficient


class LARS(Optimizer):
    """Takes groups with `weight_decay`; the state of a parameter is its `momentum_buffer`."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; a ratio of norms stays on the device."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def _move(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        update = weight.grad + group["weight_decay"] * weight
        if weight.dim() > 1:
            ratio = ETA * weight.norm() / update.norm()
            update = update * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
        state = self.state[weight]
        state["momentum_buffer"] = update + group["momentum"] * state["momentum_buffer"] if state else update
        weight.sub_(group["lr"] * state["momentum_buffer"])
