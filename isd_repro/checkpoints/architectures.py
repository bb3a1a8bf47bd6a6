"""Infers a ResNet from the names and shapes of its tensors, and builds it without its head.

Names: `resnet18`, `resnet34`, `resnet50`, `resnet101`; `wide_resnet50_2` if only the inner width of bottlenecks is multiplied
(torchvision, timm); `resnet50x2` if the number of all channels is (SimCLR, BYOL); `-small` if the stem is 3x3; `resnet-narrow:2`
is this project's narrow ResNet with a 2 x 2 pooling grid, `resnet-narrow-strided` the one whose stem has stride 2.

Shapes do not determine strides, paddings, activations or pooling. A 7x7 stem is assumed to be torchvision's (stride 2, padding 3,
max-pool), a 3x3 stem the small one (stride 1, no max-pool), and a bottleneck is assumed to have its stride in the 3x3
convolution.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from isd_repro.interfaces import Backbone
from isd_repro.nn.backbones import NarrowResNet, ResidualBlock
from isd_repro.runtime.errors import ConfigError, DataError

AUTO = "auto"
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # torchvision's name -> shape

_KNOWN: dict[tuple[bool, Shape], str] = {  # (bottlenecks?, blocks of each stage) -> family
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (False, (1, 1, 1, 1)): "resnet-narrow",
}
_NAMES = re.compile(
    r"resnet(18|34|50|101)(x[2-4])?(-small)?|wide_resnet(50|101)_[2-4](-small)?|resnet-narrow(-strided)?(:[1-9]\d?)?"
)
NAMES = (
    "auto, resnet18, resnet34, resnet50, resnet101, wide_resnet50_2 (to _4), resnet50x2 (to x4), with -small for a 3x3 stem, "
    "resnet-narrow, with -strided for a stem of stride 2"
)
_HINT = "supported: ResNet-18, 34, 50 and 101 of torchvision and timm with the standard stem, widths 1 to 4"


@dataclass(frozen=True)
class Architecture:
    """Everything on which the forward pass depends."""

    family: str
    layers: Shape  # blocks of each stage
    bottleneck: bool
    multiplier: int = 1  # of every channel
    inner: int = 1  # of the bottlenecks' inner channels
    small: bool = False  # 3x3 stem
    padding: str = "1"  # of a 3x3 stem; "same": every convolution and the max-pool as TensorFlow's SAME
    channels: int = 3  # of the images
    width: int = 64  # resnet-narrow: channels of the first stage
    pool: int = 1  # resnet-narrow: side of the pooling grid
    strided: bool = False  # resnet-narrow: stem of stride 2

    @property
    def name(self) -> str:
        """The name that `--arch` accepts."""
        if self.family == "resnet-narrow":
            return self.family + ("-strided" if self.strided else "") + (f":{self.pool}" if self.pool > 1 else "")
        name = f"wide_{self.family}_{self.inner}" if self.inner > 1 else self.family
        return name + (f"x{self.multiplier}" if self.multiplier > 1 else "") + ("-small" if self.small else "")

    def build(self) -> Backbone:
        """The network on the meta device: shapes and no weights."""
        with torch.device("meta"):
            if self.family == "resnet-narrow":
                return NarrowResNet(self.width, self.channels, self.pool, strided=self.strided)
            return ResNet(self)


class ResNet(Backbone):
    """torchvision's ResNet without its classifier, at any width and with either stem; tensors have torchvision's names."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        width = 64 * arch.multiplier
        same = arch.padding == "same"
        stem = (3, 1, 1 if same else int(arch.padding)) if arch.small else (7, 2, 3)  # kernel, stride, padding
        self.conv1 = nn.Conv2d(arch.channels, width, *stem, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if arch.small else nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage, blocks in enumerate(arch.layers):
            planes = width * 2**stage
            self.add_module(f"layer{stage + 1}", _stage(arch, inputs, planes, blocks, 1 if stage == 0 else 2))
            inputs = planes * (4 if arch.bottleneck else 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.features = inputs
        for module in self.modules() if same else ():
            if isinstance(module, nn.Conv2d | nn.MaxPool2d) and module.padding not in {0, (0, 0)}:
                size = (module.kernel_size[0], module.stride[0]) if isinstance(module, nn.Conv2d) else (3, 2)
                module.padding = (0, 0)
                module.register_forward_pre_hook(partial(_pad_as_same, *size))

    def forward(self, images: Tensor) -> Tensor:
        """B x C x H x W -> B x features: means of the last stage."""
        hidden = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in (1, 2, 3, 4):
            hidden = self.get_submodule(f"layer{stage}")(hidden)
        features: Tensor = self.avgpool(hidden).flatten(1)
        return features


def _pad_as_same(kernel: int, stride: int, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Pad with zeros as TensorFlow's SAME: ceil(side / stride) outputs, an odd pixel right and below."""
    sides = []
    for length in (inputs[0].shape[3], inputs[0].shape[2]):
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        sides += [total // 2, total - total // 2]
    return functional.pad(inputs[0], sides)


def _stage(arch: Architecture, inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    inner, outputs = (planes * arch.inner, 4 * planes) if arch.bottleneck else (planes, planes)
    first = ResidualBlock(inputs, inner, outputs, stride, bottleneck=arch.bottleneck)
    others = (ResidualBlock(outputs, inner, outputs, 1, bottleneck=arch.bottleneck) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


def infer(shapes: Shapes, where: str) -> Architecture:
    """The architecture that matches these tensors best; the caller reports the differences.

    Args:
        shapes: shape by torchvision's name, without heads.
        where: file and encoder, for messages.

    Raises:
        DataError: no supported architecture is similar.
    """
    _refuse_variants(shapes, where)
    if not any(name.endswith(".running_mean") for name in shapes):
        words = "normalisation layers without running statistics (GroupNorm, or BatchNorm that uses each batch's own)"
        raise DataError(f"{where}: {words}", _HINT)
    blocks = {match[0] for name in shapes if (match := re.match(r"layer(\d)\.(\d{1,3})\.", name))}
    layers = tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in (1, 2, 3, 4))
    bottleneck = any(re.search(r"^layer\d\.\d+\.conv3\.weight$", name) for name in shapes)
    family = _KNOWN.get((bottleneck, layers))
    if family is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise DataError(f"{where}: no supported ResNet has {layers} {kind} blocks in its four stages", _HINT)
    stem = shapes.get("conv1.weight", (0, 3, 3 if family == "resnet-narrow" else 7, 0))
    kernel = stem[2] if len(stem) == 4 else 0
    if kernel not in {3, 7}:
        raise DataError(f"{where}: conv1.weight is {stem}; a stem has a kernel of 7x7 or 3x3", _HINT)
    if stem[1] not in {1, 3}:
        raise DataError(f"{where}: conv1.weight is {stem}, so images have {stem[1]} channels; 1 or 3 can be read", _HINT)
    base = _width(shapes, bottleneck, where)
    if family == "resnet-narrow":
        return Architecture(family, layers, bottleneck, small=True, channels=stem[1], width=base)
    inner = _inner(shapes, base) if bottleneck else 1
    if base % 64 or not 1 <= base // 64 <= 4 or not 1 <= inner <= 4 or (inner > 1 and base != 64):
        found = f"a {family} with {base} channels in its first stage and {inner} times the inner width"
        supported = "supported are 64, 128, 192 and 256 channels, or 1 to 4 times the inner width"
        raise DataError(f"{where}: {found}; {supported}", _HINT)
    return Architecture(family, layers, bottleneck, base // 64, inner, kernel == 3, channels=stem[1])


def settle(found: Architecture, given: str, where: Path | str, *, known: bool) -> Architecture:
    """Apply `--arch`: check the name, and take from it what shapes do not show of `resnet-narrow`, unless the file states it.

    Raises:
        ConfigError: no architecture has this name.
        DataError: the shapes belong to another architecture.
    """
    if given == AUTO:
        return found
    if not _NAMES.fullmatch(given):
        raise ConfigError(f"--arch: unknown architecture {given!r}", f"one of: {NAMES}")
    if found.family == "resnet-narrow" and not known:
        found = replace(found, pool=int(given.partition(":")[2] or 1), strided="-strided" in given)
    if given not in {found.name, found.name.removesuffix("-small"), found.name.partition(":")[0]}:
        raise DataError(f"{where}: --arch says {given}, but the tensor shapes say {found.name}", "leave --arch at auto")
    return found


def _refuse_variants(shapes: Shapes, where: str) -> None:
    signs = {
        r"^(?:conv|bn)[2-9]\.": "a deep stem of several convolutions (CLIP's ModifiedResNet)",
        r"pool\w*\.": "pooling with weights of its own",
        r"^conv1\.\d+\.": "a deep stem of three convolutions (timm's ResNet-C, -D, -S and -T)",
        r"^layer\d\.\d+\.se\.": "squeeze-and-excitation blocks",
        r"\.downsample\.2\.": "shortcuts with average pooling (ResNet-D)",
    }
    for sign, words in signs.items():
        if name := next((name for name in shapes if re.search(sign, name)), ""):
            raise DataError(f"{where}: {words}: {name}", _HINT)
    for name, shape in shapes.items():
        if re.search(r"^layer\d\.\d+\.conv2\.weight$", name) and len(shape) == 4 and shape[0] >= 32 * shape[1] > 0:
            raise DataError(f"{where}: grouped convolutions (ResNeXt): {name} is {shape}", _HINT)


def _width(shapes: Shapes, bottleneck: bool, where: str) -> int:
    """Number of channels of the first stage, by the majority of the stages, so that one wrong tensor does not decide."""
    last, expansion = ("bn3", 4) if bottleneck else ("bn2", 1)
    places = {"bn1": 1, **{f"layer{stage}.0.{last}": expansion << (stage - 1) for stage in (1, 2, 3, 4)}}
    votes = [_size(shapes, f"{name}.{part}") // times for name, times in places.items() for part in ("weight", "bias")]
    if not any(votes):
        raise DataError(f"{where}: no BatchNorm with one value per channel (GroupNorm, or not a ResNet)", _HINT)
    return statistics.mode(filter(None, votes))


def _inner(shapes: Shapes, base: int) -> int:
    return statistics.mode(_size(shapes, f"layer{stage}.0.bn1.weight") // (base << (stage - 1)) for stage in (1, 2, 3, 4))


def _size(shapes: Shapes, name: str) -> int:
    shape: Shape = shapes.get(name, ())
    return shape[0] if len(shape) == 1 else 0
