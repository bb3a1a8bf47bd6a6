"""A ResNet is found wherever one prefix of one container owns its names; where several do, the user chooses."""

from __future__ import annotations

import argparse
import datetime as dt
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet50

from isd_repro import checkpoints
from isd_repro.runtime.errors import DataError
from tests.checkpoints.conftest import Write
from tests.checkpoints.foreign import State, backbone, features, mlp, numbered, queue, randomise, refused, under, unfit

Nets = dict[str, ResNet]


def transformers(state: State) -> State:
    """Names of transformers' ResNetModel."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    found = {}
    for name, tensor in state.items():
        *path, layer, tail = name.split(".")
        if not path:
            place = f"embedder.embedder.{kinds[layer[:-1]]}"
        else:
            place = f"encoder.stages.{int(path[0][-1]) - 1}.layers.{path[1]}."
            place += f"shortcut.{kinds[layer]}" if len(path) == 3 else f"layer.{int(layer[-1]) - 1}.{kinds[layer[:-1]]}"
        found[f"{place}.{tail}"] = tensor
    return found


def numpy_values(state: State) -> dict[str, Any]:
    """What the optimizers and arguments of trainers bring along."""
    return {
        "state_dict": under("module.", state),
        "optimizer": {"param_groups": [{"lr": np.float64(0.1), "step": np.int64(3)}]},
        "rng": np.random.default_rng(0).integers(0, 9, 3),
        "args": argparse.Namespace(output=Path("/tmp"), arch="resnet18"),
        "when": [dt.date(2026, 1, 1), dt.timedelta(1)],
        "losses": defaultdict(list, train=[0.5]),
        "hyper_parameters": omegaconf.OmegaConf.create({"lr": 0.1, "crops": [2, {"size": 32}]}),
    }


SINGLE: dict[str, Callable[[State], Any]] = {
    "swav": lambda state: {
        "state_dict": under("module.", state | mlp("projection_head") | {"prototypes.weight": torch.zeros(3, 2)})
    },
    "deepcluster": lambda state: {"state_dict": state | mlp("projection_head") | mlp("prototypes.prototypes0")},
    "averaged": lambda state: under("module.", state) | {"n_averaged": torch.tensor(3)},
    "vissl": lambda state: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": under("_feature_blocks.", state), "heads": mlp("0.clf")}, "meters": {}},
            "optimizer": {"lr": 0.1},
        }
    },
    "fsdp": lambda state: under("_fsdp_wrapped_module.", {
        name.replace("layer1.0.", "layer1.0._checkpoint_wrapped_module."): tensor for name, tensor in state.items()
    }),
    "barlow": lambda state: {"model": under("module.backbone.", state) | mlp("module.projector")},
    "simsiam": lambda state: {"state_dict": under("module.encoder.", state | mlp("fc")) | mlp("module.predictor")},
    "transformers": lambda state: under("resnet.", transformers(state)) | {"classifier.1.weight": torch.zeros(9, 512)},
    "transformers-bare": transformers,
    "byol-pytorch": lambda state: under("net.", state) | under("online_encoder.net.", state) | mlp("online_encoder.projector"),
    "values": numpy_values,
}  # fmt: skip
PREFIXES = ("model.", "net.", "resnet.", "base_model.", "model.backbone.", "a.b.c.")
CONTAINERS = ("state_dict_ema", "ema_state_dict", "model_state_dict", "net", "teacher", "encoder")


@pytest.mark.parametrize(("container", "prefix"), list(zip(CONTAINERS, PREFIXES, strict=True)))
def test_any_prefix_in_any_container(container: str, prefix: str, nets: Nets, write: Write) -> None:
    state = backbone(nets["student"])
    found = checkpoints.load(write({container: under(prefix, state), "epoch": 3})).encoders["student"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("case", SINGLE)
def test_one_prefix_owns_a_resnet(case: str, nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    path = write(SINGLE[case](backbone(nets["student"])))
    found = checkpoints.load(path)
    assert torch.equal(features(found.encoders["student"], images), wanted["student"])
    assert checkpoints.inspect(path).problems == ()
    assert sum(row.use == "used" for row in found.tensors) == 100
    heads = [row.key for row in found.tensors if "proj" in row.key or "proto" in row.key or "clas" in row.key]
    assert {row.use for row in found.tensors if row.key in heads} <= {"head dropped", "used", "counter", "not used"}


PAIRS: dict[str, Callable[[State, State], Any]] = {
    "dino": lambda student, ema: {
        "student": under("module.backbone.", student) | mlp("module.head"),
        "teacher": under("backbone.", ema) | mlp("head"),
        "epoch": 1,
    },
    "moco-v3": lambda student, ema: {
        "state_dict": under("module.base_encoder.", student | mlp("fc")) | under("module.momentum_encoder.", ema | mlp("fc"))
    },
    "opensefsup": lambda student, ema: {
        "state_dict": under("encoder_q.0.", student) | under("encoder_k.0.", ema) | under("backbone.", student) | queue()
    },
    "byol-pytorch": lambda student, ema: under("online_encoder.net.", student) | under("target_encoder.net.", ema),
    "ema": lambda student, ema: {"state_dict": student, "state_dict_ema": ema},
    "numbered": lambda student, ema: under("backbone.0.", numbered(student)) | under("backbone_momentum.0.", numbered(ema)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_student_and_its_teacher(case: str, nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    """Also where their weights are still the same."""
    student, teacher = backbone(nets["student"]), backbone(nets["teacher"])
    path = write(PAIRS[case](student, teacher))
    found = checkpoints.load(path, "both").encoders
    assert all(torch.equal(features(found[name], images), wanted[name]) for name in ("student", "teacher"))
    assert checkpoints.inspect(path).encoders == ("student", "teacher")
    assert list(checkpoints.load(write(PAIRS[case](student, student)), "both").encoders) == ["student", "teacher"]


def test_several_resnets_are_named_and_chosen(nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    one, other = backbone(nets["student"]), backbone(nets["teacher"])
    path = write({"model": under("backbone.", one) | under("encoder.", other), "best": one})
    unfit(path, "2 different ResNets: model/backbone., model/encoder.", "--key (the container) or --prefix")
    chosen: list[tuple[dict[str, Any], str]] = [
        ({"prefix": "module.encoder"}, "teacher"),
        ({"prefix": "backbone."}, "student"),
        ({"key": "best"}, "student"),
        ({"key": "model", "prefix": "encoder."}, "teacher"),
    ]
    for options, name in chosen:
        assert torch.equal(features(checkpoints.load(path, **options).encoders["student"], images), wanted[name])
        assert checkpoints.inspect(path, **options).problems == ()
    words = "no ResNet under --key best and --prefix encoder.; there are model/backbone., "
    refused(path, words, looks=(checkpoints.load,), key="best", prefix="encoder.")


def test_unknown_modules_are_dropped_on_request_and_parts_never(nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    state = backbone(nets["student"])
    path = write(state | {"extra.weight": torch.zeros(2)})
    unfit(path, "1 tensor surplus: extra.weight", "--drop-unknown")
    found = checkpoints.load(path, drop_unknown=True)
    assert {row.key: row.use for row in found.tensors}["extra.weight"] == "dropped"
    assert torch.equal(features(found.encoders["student"], images), wanted["student"])
    for part in ("layer3.1.attention.weight", "bn2.weight", "attnpool.positional_embedding", "layer5.0.weight", "conv1.bias"):
        with pytest.raises(DataError, match=r"surplus|deep stem|pooling"):
            checkpoints.load(write(state | {part: torch.zeros(2)}), drop_unknown=True)


def same(images: Tensor, kernel: int, stride: int, low: float) -> Tensor:
    """Pad as TensorFlow's SAME: ceil(n / stride) outputs, the odd pixel behind."""
    for axis in (3, 2):
        length = images.shape[axis]
        total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
        images = F.pad(images, [0, 0] * (3 - axis) + [total // 2, total - total // 2], value=low)
    return images


def tensorflow(net: ResNet, images: Tensor) -> Tensor:
    """A ResNet of bottlenecks whose windows lie as TensorFlow lays them."""

    def conv(layer: nn.Conv2d, hidden: Tensor) -> Tensor:
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        return F.conv2d(same(hidden, kernel, stride, 0.0), layer.weight, stride=stride)

    hidden = net.relu(net.bn1(conv(net.conv1, images)))
    hidden = F.max_pool2d(same(hidden, 3, 2, -math.inf), 3, 2)
    for block in (block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage.children()):
        parts: Any = block
        shortcut = hidden if parts.downsample is None else parts.downsample(hidden)
        for index in (1, 2, 3):
            hidden = getattr(parts, f"bn{index}")(conv(getattr(parts, f"conv{index}"), hidden))
            hidden = parts.relu(hidden) if index < 3 else parts.relu(hidden + shortcut)
    means: Tensor = hidden.mean((2, 3))
    return means


@pytest.mark.parametrize("side", [64, 70])
def test_weights_converted_from_jax_are_padded_as_tensorflow_does(side: int, write: Write) -> None:
    net: Any = randomise(resnet50(num_classes=2), 4)
    net.fc = nn.Identity()
    state = {name: tensor for name, tensor in backbone(net).items() if "num_batches" not in name}
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    head = {name: tensor for name, tensor in mlp("predict_q", 4).items() if "num_batches" not in name}
    path = write(under("encoder_q.", state) | under("encoder_k.", state) | head)
    found = checkpoints.load(path)
    with torch.inference_mode():
        expected = tensorflow(net, images)
        torch.testing.assert_close(found.encoders["student"](images), expected, rtol=1e-4, atol=1e-4)
        assert (net(images) - expected).norm() > 0.05 * expected.norm()
    assert any("TensorFlow's SAME" in note for note in found.notes)
    bare = checkpoints.load(write(state))
    assert any("--padding same" in note for note in bare.notes)
    with torch.inference_mode():
        assert torch.equal(bare.encoders["student"](images), net(images))
        stated = checkpoints.load(write(state), padding="same").encoders["student"](images)
        torch.testing.assert_close(stated, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnetblur50", "resnetaa50"])
def test_a_variant_with_a_plain_resnets_tensors_is_refused(name: str, write: Write) -> None:
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False)
    state = {key: tensor.new_ones(tensor.shape, device="cpu") for key, tensor in net.state_dict().items()}
    for content in ({"arch": name, "state_dict": state}, {"args": argparse.Namespace(model=name), "state_dict": state}):
        path = write(content)
        unfit(path, f"calls itself {name}, a variant", "--arch resnet50")
        assert any(name in note for note in checkpoints.load(path, arch="resnet50").notes)


@pytest.mark.parametrize(
    "name", ["resnet18", "ResNet18", "resnet-18", "microsoft/resnet-18", "resnet18.a1_in1k", "ResNet", "tv_resnet18"]
)
def test_spellings_of_the_same_architecture(name: str, nets: Nets, write: Write) -> None:
    notes = checkpoints.load(write({"arch": name, "state_dict": backbone(nets["student"])})).notes
    assert any("calls itself" in note for note in notes) == (name == "tv_resnet18")


def test_a_name_is_not_compared_with_an_architecture_that_is_unknown(nets: Nets, write: Write) -> None:
    state = {name: tensor for name, tensor in backbone(nets["student"]).items() if ".running_" not in name}
    found = checkpoints.inspect(write({"arch": "resnet18_gn", "state_dict": state}))
    assert (len(found.problems), found.arch) == (1, "")
    assert not any("calls itself" in note for note in found.notes)


def test_subnormal_weights_are_said(nets: Nets, write: Write) -> None:
    state = {name: tensor.clone() for name, tensor in backbone(nets["student"]).items()}
    assert not any("subnormal" in note for note in checkpoints.load(write(state)).notes)
    state["layer4.0.conv1.weight"].fill_(1e-40)
    assert any("1,179,648 weights are subnormal" in note for note in checkpoints.load(write(state)).notes)
