"""Encoders without heads: torchvision's ResNets, a narrow ResNet for CPUs, and raw pixels as a reference.

torchvision is imported where one of its ResNets is built for training: it brings torch's compiler along, which takes longer to
import than torch. So residual blocks are written out here, for the narrow ResNet and for encoders that are read from a file.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from isd_repro.config.params import BackboneConfig
from isd_repro.interfaces import Backbone
from isd_repro.runtime.errors import ConfigError


def build(config: BackboneConfig, image_size: int) -> Backbone:
    """A backbone with an int attribute `features`, mapping B x C x H x W to B x features.

    Its tensors have torchvision's names. Weights are drawn from torch's global generator, as torchvision does; callers seed it.

    Raises:
        ConfigError: a width, pool or stem that torchvision's architecture does not have.
    """
    if config.arch == "pixels":
        return Pixels(config.channels * image_size * image_size)
    if config.arch == "resnet-narrow":
        return NarrowResNet(config.width, config.channels, config.pool, strided=config.stem == "strided")
    if config.stem == "strided":
        raise ConfigError(f"backbone: {config.arch} has no strided stem", "use stem imagenet or small, or arch resnet-narrow")
    if (config.width, config.pool) != (64, 1):
        raise ConfigError(
            f"backbone: {config.arch} has width 64 and pool 1 (got width {config.width}, pool {config.pool})",
            "use arch resnet-narrow for other values",
        )
    from torchvision import models

    network: nn.Module = getattr(models, config.arch)()
    features = network.get_submodule("fc").in_features
    network.fc = nn.Identity()
    if config.stem == "small" or config.channels != 3:
        kernel, stride, padding = (3, 1, 1) if config.stem == "small" else (7, 2, 3)
        network.conv1 = nn.Conv2d(config.channels, 64, kernel, stride, padding, bias=False)
        _init(network.conv1)
    if config.stem == "small":
        network.maxpool = nn.Identity()
    network.features = features
    return cast("Backbone", network)


class NarrowResNet(Backbone):
    """Four one-block stages of width, 2, 4 and 8 times width behind a 3x3 stem: trains on a CPU in minutes.

    With `pool` above 1 the features keep a coarse layout, which tells digits apart where textures do not. A `strided` stem halves
    the sides of every stage, and with them nearly quarters the cost.
    """

    def __init__(self, width: int, channels: int, pool: int = 1, *, strided: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 2 if strided else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(ResidualBlock(width, width, width, 1))
        self.layer2 = nn.Sequential(ResidualBlock(width, 2 * width, 2 * width, 2))
        self.layer3 = nn.Sequential(ResidualBlock(2 * width, 4 * width, 4 * width, 2))
        self.layer4 = nn.Sequential(ResidualBlock(4 * width, 8 * width, 8 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.features = 8 * width * pool * pool
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        """B x C x H x W -> B x 8 width pool^2: means of the last stage over a grid."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        features: Tensor = self.pool(hidden).flatten(1)
        return features


class Pixels(Backbone):
    """The image itself as its features: the reference that a learned encoder has to beat."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """B x C x H x W -> B x CHW."""
        return images.flatten(1)


class _FewChannels(nn.Conv2d):
    """A 1x1 convolution with a stride, as one without a stride of every other pixel.

    With fewer than 8 input channels in channels_last, on CPUs with AVX2 and without AVX-512, the gradient of the strided weights
    is written out of bounds, and the process crashes (torch 2.15.0, oneDNN).
    """

    def forward(self, images: Tensor) -> Tensor:
        """B x C x H x W -> B x outputs x H/stride x W/stride."""
        rows, columns = self.stride
        return functional.conv2d(images[:, :, ::rows, ::columns], self.weight)


class ResidualBlock(nn.Module):
    """A block of torchvision's ResNet, basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1): the same tensors and the same operations.

    Args:
        inputs, inner, outputs: channels before the block, between its convolutions and behind it.
        stride: of the first 3x3 convolution.
        bottleneck: which of the two.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, *, bottleneck: bool = False) -> None:
        super().__init__()
        basic = [(inputs, inner, 3, stride), (inner, outputs, 3, 1)]
        convolutions = [(inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)] if bottleneck else basic
        self.depth = len(convolutions)
        for at, (before, after, kernel, step) in enumerate(convolutions, start=1):
            self.add_module(f"conv{at}", nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{at}", nn.BatchNorm2d(after))
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            kind = nn.Conv2d if inputs >= 8 else _FewChannels
            self.downsample = nn.Sequential(kind(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """B x inputs x H x W -> B x outputs x ceil(H / stride) x ceil(W / stride)."""
        hidden = images
        for at in range(1, self.depth + 1):
            hidden = getattr(self, f"bn{at}")(getattr(self, f"conv{at}")(hidden))
            if at < self.depth:
                hidden = functional.relu_(hidden)
        hidden += images if self.downsample is None else self.downsample(images)
        return functional.relu_(hidden)


def _init(module: nn.Module) -> None:
    """torchvision's ResNet initialisation; the last BatchNorm of a block keeps gamma 1, as in the released code."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
