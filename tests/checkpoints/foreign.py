"""Checkpoints as other projects write them, made from any pair of ResNets by the naming rules of those projects."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

from isd_repro import checkpoints
from isd_repro.runtime.errors import DataError

State = dict[str, Tensor]
LOOKS = (checkpoints.load, checkpoints.inspect)
CHILDREN = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def features(net: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        out: Tensor = net(images)
    return out


def refused(path: Path, words: str, hint: str = "", looks: Iterable[Callable[..., Any]] = LOOKS, **options: Any) -> None:
    """Nothing reads the file; the message names it and has these words, literally, and so has the hint."""
    for look in looks:
        with pytest.raises(DataError) as caught:
            look(path, **options)
        assert words in caught.value.message
        assert caught.value.message.startswith(str(path))
        assert hint in caught.value.hint


def unfit(path: Path, words: str, hint: str = "") -> None:
    """It cannot be loaded, and an inspection says so in the same words, literally."""
    refused(path, words, hint, looks=(checkpoints.load,))
    assert words in checkpoints.inspect(path).problems[0]


def randomise(net: nn.Module, seed: int) -> nn.Module:
    """Weights and BatchNorm statistics that all differ, so that a tensor in another's place is seen."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * (2 / tensor[0].numel()) ** 0.5)
    return net.eval()


def backbone(net: ResNet) -> State:
    return {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("fc.")}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def mlp(prefix: str, inputs: int = 512) -> State:
    """Linear, BatchNorm, ReLU, Linear."""
    net = nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return under(f"{prefix}.", net.state_dict())


def queue(rows: int = 16, width: int = 4) -> State:
    return {"queue": torch.randn(rows, width), "queue_ptr": torch.zeros(1, dtype=torch.int64)}


def momentum(state: State) -> dict[str, Any]:
    """What SGD's state dict looks like, cut short."""
    first = next(iter(state.values()))
    return {"state": {0: {"momentum_buffer": torch.zeros_like(first)}}, "param_groups": [{"lr": 0.01, "params": [0]}]}


def saved(state: State, container: str = "state_dict") -> dict[str, Any]:
    """The authors' container, with the script's arguments in it."""
    options = argparse.Namespace(arch="resnet18", data="/images", learning_rate=0.01, lr_decay_epochs=[140, 180])
    return {"opt": options, container: state, "optimizer": momentum(state), "epoch": 200}


def authors(teacher: str = "encoder_k", *, parallel: bool, head: bool, predictor: bool, bank: bool, labels: bool) -> Any:
    """ISD and what grew from it: DataParallel wraps each encoder, not the whole."""
    wrap = "module." if parallel else ""

    def write(student: State, ema: State) -> dict[str, Any]:
        state = under(f"encoder_q.{wrap}", student) | (mlp(f"encoder_q.{wrap}fc") if head else {})
        state |= under(f"{teacher}.{wrap}", ema) | (mlp(f"{teacher}.{wrap}fc") if head else {})
        state |= mlp(f"predict_q.{wrap.rstrip('.')}".rstrip("."), 4) if predictor else {}
        state |= queue() if bank else {}
        state |= {"labels": -torch.ones(16, dtype=torch.int64)} if labels else {}
        return saved(state)

    return write


def moco(student: State, ema: State) -> dict[str, Any]:
    """Official MoCo v2: DistributedDataParallel around the whole, and a bank of columns."""
    state: State = {}
    for name, encoder in (("encoder_q", student), ("encoder_k", ema)):
        head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))
        state |= under(f"module.{name}.", encoder) | under(f"module.{name}.fc.", head.state_dict())
    state |= under("module.", queue(4, 16))
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": momentum(state)}


def compress(student: State, _: State) -> dict[str, Any]:
    fc = under("module.fc.", nn.Linear(512, 12).state_dict())
    return saved(under("module.", student) | fc, "model")


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 4}}}},
        "callbacks": {},
        "optimizer_states": [momentum(state)],
        "lr_schedulers": [{"last_epoch": 3}],
    }


def solo(student: State, ema: State) -> dict[str, Any]:
    state = under("backbone.", student) | under("momentum_backbone.", ema)
    state |= mlp("projector") | mlp("momentum_projector") | mlp("predictor", 4)
    state |= under("classifier.", nn.Linear(512, 10).state_dict())
    return lightning(state | {"queue": torch.randn(2, 4, 16), "queue_ptr": torch.zeros(1, dtype=torch.int64)})


def lightly(student: State, ema: State) -> dict[str, Any]:
    state = under("backbone.", student) | under("backbone_momentum.", ema)
    return lightning(state | mlp("projection_head.layers") | mlp("projection_head_momentum.layers"))


def numbered(state: State) -> State:
    """Names of nn.Sequential(*resnet.children())."""
    return {f"{CHILDREN[name.split('.')[0]]}.{name.partition('.')[2]}": tensor for name, tensor in state.items()}


def lightly_numbered(student: State, ema: State) -> dict[str, Any]:
    state = under("backbone.", numbered(student)) | under("backbone_momentum.", numbered(ema))
    return lightning(state | mlp("projection_head.layers") | {"criterion.memory_bank.bank": torch.randn(4, 16)})


WRITERS: dict[str, tuple[str, Callable[[State, State], Any], bool]] = {  # test -> (layout, writer, is there a teacher)
    "isd": ("isd", authors(parallel=True, head=False, predictor=True, bank=True, labels=False), True),
    "isd-one-device": ("isd", authors(parallel=False, head=False, predictor=True, bank=True, labels=False), True),
    "isd-plus": ("isd-plus", authors(parallel=True, head=True, predictor=True, bank=True, labels=True), True),
    "byol": ("byol", authors(parallel=True, head=True, predictor=True, bank=False, labels=False), True),
    "msf": ("msf", authors("encoder_t", parallel=True, head=True, predictor=True, bank=True, labels=True), True),
    "compress": ("torchvision's names", compress, False),
    "moco-v2": ("moco-v2", moco, True),
    "moco-bare": ("moco", lambda student, ema: {"state_dict": under("encoder_q.", student)}, False),
    "solo-learn": ("solo-learn", solo, True),
    "solo-learn-old": (
        "solo-learn",
        lambda student, ema: lightning(
            under("encoder.", student)
            | under("momentum_encoder.", ema)
            | mlp("projector")
            | under("classifier.", nn.Linear(512, 10).state_dict())
        ),
        True,
    ),
    "lightly": ("torchvision's names", lightly, True),
    "lightly-numbered": ("numbered children", lightly_numbered, True),
    "lightly-backbone-alone": ("numbered children", lambda student, ema: numbered(student), False),
    "torchvision": (
        "torchvision's names",
        lambda student, ema: student | under("fc.", nn.Linear(512, 1000).state_dict()),
        False,
    ),
    "compiled": ("torchvision's names", lambda student, ema: under("_orig_mod.module.", student), False),
}


def by_hand(state: State, images: Tensor, layers: tuple[int, ...], *, bottleneck: bool, small: bool = False) -> Tensor:
    """Features of a ResNet from its tensors, written out: the oracle of every width."""

    def conv(hidden: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(hidden, state[f"{name}.weight"], stride=stride, padding=state[f"{name}.weight"].shape[-1] // 2)

    def norm(hidden: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(hidden, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    hidden = F.relu(norm(conv(images, "conv1", 1 if small else 2), "bn1"))
    if not small:
        hidden = F.max_pool2d(hidden, 3, 2, 1)
    for stage, blocks in enumerate(layers, start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            strides = [2 if stage > 1 and block == 0 else 1, 1]
            names = ["1", "2", "3"] if bottleneck else ["1", "2"]
            strides = [1, strides[0], 1] if bottleneck else strides
            out = hidden
            for index, (name, stride) in enumerate(zip(names, strides, strict=True)):
                out = norm(conv(out, f"{at}.conv{name}", stride), f"{at}.bn{name}")
                out = F.relu(out) if index < len(names) - 1 else out
            if f"{at}.downsample.0.weight" in state:
                hidden = norm(conv(hidden, f"{at}.downsample.0", 2 if stage > 1 else 1), f"{at}.downsample.1")
            hidden = F.relu(out + hidden)
    return hidden.mean((2, 3))
