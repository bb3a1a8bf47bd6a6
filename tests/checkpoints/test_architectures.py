"""Architectures by their shapes, and every width against torchvision, timm or a forward pass written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as Reference

from isd_repro import checkpoints
from isd_repro.checkpoints.architectures import Architecture, infer
from isd_repro.runtime.errors import DataError
from tests.checkpoints.conftest import Write
from tests.checkpoints.foreign import by_hand, features, randomise

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2")


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.state_dict().items() if not name.startswith("fc.")}


def filled(arch: Architecture, state: dict[str, Tensor]) -> nn.Module:
    net = arch.build()
    net.load_state_dict(state, assign=True)
    return net.eval()


@pytest.mark.parametrize("given", [*NAMES, *(f"timm/{name}" for name in NAMES), "timm/resnet50.tv_in1k"])
def test_real_models_are_named_and_rebuilt_tensor_for_tensor(given: str) -> None:
    library, _, name = given.rpartition("/")
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False) if library else getattr(models, name)()
    found = infer(shapes(net), "file")
    assert found.name == name.partition(".")[0]
    assert shapes(found.build()) == shapes(net)


@pytest.mark.parametrize(
    ("build", "name", "file"),
    [
        (timm.create_model, "resnet18", "timm.pth"),
        (timm.create_model, "resnet50", "timm.safetensors"),
        (models.get_model, "resnet50", "torchvision.pth"),
    ],
)
def test_files_of_real_models(build: Callable[[str], Any], name: str, file: str, images: Tensor, write: Write) -> None:
    net: Any = randomise(build(name), 1)
    found = checkpoints.load(write(net.state_dict(), file), arch=name)
    assert found.layout == "torchvision's names"
    assert sorted(row.key for row in found.tensors if row.use == "head dropped") == ["fc.bias", "fc.weight"]
    net.fc = nn.Identity()
    assert torch.equal(features(found.encoders["student"], images), features(net, images))


def test_wide_bottlenecks() -> None:
    with torch.device("meta"):
        net: Any = Reference(Bottleneck, [3, 4, 6, 3], width_per_group=64 * 3)
    net = net.to_empty(device="cpu")
    net.fc = nn.Identity()
    randomise(net, 2)
    found = infer(shapes(net), "file")
    assert (found.name, found.inner) == ("wide_resnet50_3", 3)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(features(filled(found, net.state_dict()), images), features(net, images))


@pytest.mark.parametrize(
    "arch",
    [
        Architecture("resnet18", (2, 2, 2, 2), bottleneck=False),
        Architecture("resnet18", (2, 2, 2, 2), bottleneck=False, multiplier=2),
        Architecture("resnet18", (2, 2, 2, 2), bottleneck=False, small=True, channels=1),
        Architecture("resnet34", (3, 4, 6, 3), bottleneck=False),
        Architecture("resnet50", (3, 4, 6, 3), bottleneck=True),
    ],
    ids=lambda arch: arch.name,
)
def test_features_against_a_forward_pass_written_out(arch: Architecture) -> None:
    net = randomise(arch.build().to_empty(device="cpu"), 4)
    found = infer(shapes(net), "file")
    assert found == arch
    images = torch.randn(2, arch.channels, 32, 32)
    state = net.state_dict()
    expected = by_hand(state, images, arch.layers, bottleneck=arch.bottleneck, small=arch.small)
    assert expected.std() > 0.01
    torch.testing.assert_close(features(filled(found, state), images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("multiplier", [1, 2, 3, 4])
def test_every_width_is_inferred_as_it_was_built(family: str, multiplier: int) -> None:
    layers = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}[family]
    for small in (False, True):
        arch = Architecture(family, layers, bottleneck=family in {"resnet50", "resnet101"}, multiplier=multiplier, small=small)
        assert infer(shapes(arch.build()), "file") == arch
        assert arch.name == family + (f"x{multiplier}" if multiplier > 1 else "") + ("-small" if small else "")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("resnet18d", "deep stem"),
        ("seresnet18", "squeeze-and-excitation"),
        ("resnext50_32x4d", "grouped convolutions"),
        ("resnet26", "no supported ResNet has (2, 2, 2, 2) bottleneck blocks"),
        ("resnet152", "no supported ResNet has (3, 8, 36, 3) bottleneck blocks"),
    ],
)
def test_variants_are_refused_by_name(given: str, reason: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(given, pretrained=False)
    with pytest.raises(DataError) as caught:
        infer(shapes(net), "file")
    assert reason in caught.value.message


def test_one_odd_tensor_does_not_decide_the_width() -> None:
    for name in ("conv1.weight", "bn1.weight", "layer1.0.bn2.weight", "layer4.0.conv1.weight"):
        found = shapes(Architecture("resnet18", (2, 2, 2, 2), bottleneck=False).build())
        found[name] = tuple(2 * size if axis == 0 else size for axis, size in enumerate(found[name]))
        assert infer(found, "file").name == "resnet18"
