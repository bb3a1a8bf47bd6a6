"""Weights and images stay in channels_last through the networks, the optimizer, the teacher's average and a resume.

Seen on a CPU: there, as in cuDNN, a convolution gives channels_last where its images or its weights have it, and all other
operators keep what they get.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from isd_repro import methods
from isd_repro.config.params import BackboneConfig
from isd_repro.nn import backbones
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.train import checkpoint
from isd_repro.train.checkpoint import RunProgress
from tests.conformance.problem import build, losses, optimizer_of

LAST = torch.channels_last


def not_last(network: nn.Module, images: Tensor) -> set[str]:
    """Names of the modules that give images, or are given the gradient of images, in another layout."""
    wrong: set[str] = set()
    for name, module in network.named_modules():

        def look(_module: nn.Module, _given: Any, out: Tensor, name: str = name) -> None:
            def check(value: Tensor) -> None:
                if value.dim() == 4 and not value.is_contiguous(memory_format=LAST):
                    wrong.add(name)

            check(out)
            if out.requires_grad:
                out.register_hook(check)

        module.register_forward_hook(look)
    network(images).square().sum().backward()
    return wrong


@pytest.mark.parametrize(("precision", "groups"), [("float32", 2), ("bf16", 1)])
@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "imagenet"), ("resnet50", "imagenet"), ("resnet-narrow", "small")])
def test_every_activation_and_its_gradient_is_in_channels_last(
    arch: Literal["resnet18", "resnet50", "resnet-narrow"], stem: Literal["imagenet", "small"], precision: str, groups: int
) -> None:
    """From views that are not. What the mean over the last images spreads back is one number, which has no layout."""
    images = torch.randn(4, 3, 64, 64)
    network = backbones.build(BackboneConfig(arch=arch, stem=stem), 64).train()
    set_bn_groups(network, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        found = not_last(network.to(memory_format=LAST), images)
    block = f"layer4.{len(network.get_submodule('layer4')._modules) - 1}"
    assert found <= {"layer4", block, f"{block}.relu"}


def test_the_test_before_would_notice() -> None:
    network = backbones.build(BackboneConfig(arch="resnet-narrow", width=4), 16).train()
    assert "layer1.0.bn1" in not_last(network, torch.randn(4, 3, 16, 16))


def strides(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Along the sides that are longer than 1; the others say nothing."""
    return {
        name: [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", methods.names())
def test_what_is_updated_together_lies_alike_after_a_resume_too(name: str, tmp_path: Path) -> None:
    """Weights, gradients, momenta and the teacher: one kernel updates many tensors only if their layouts are equal."""
    path = tmp_path / "checkpoint.pt"
    one, other = (build(name).to(memory_format=LAST) for _ in range(2))
    trained = optimizer_of(one)
    losses(one, 0, 2, trained)
    checkpoint.save(path, "a run", one, trained, RunProgress(step=2))
    resumed = optimizer_of(other)
    checkpoint.load(path, "a run", other, resumed, torch.device("cpu"))
    losses(other, 2, 3, resumed)
    for method, optimizer in ((one, trained), (other, resumed)):
        weights = {key: value for key, value in method.named_parameters() if value.requires_grad}
        want = strides(weights)
        assert any(value.dim() == 4 and not value.is_contiguous() for value in weights.values())
        assert strides({key: value.grad for key, value in weights.items() if value.grad is not None}) == want
        assert strides({key: optimizer.state[value]["momentum_buffer"] for key, value in weights.items()}) == want
        parts = dict(method.named_children())
        if "teacher" in parts:
            assert strides(dict(parts["teacher"].named_parameters())) == strides(dict(parts["student"].named_parameters()))
