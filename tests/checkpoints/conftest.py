"""Two ResNet-18s and what they make of four random images; files are removed after each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18

from tests.checkpoints.foreign import randomise

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def nets() -> dict[str, ResNet]:
    """Student and teacher as torchvision builds them, without classifier."""
    made = {}
    for seed, name in enumerate(("student", "teacher")):
        with torch.device("meta"):
            net = resnet18()
        net = net.to_empty(device="cpu")
        net.fc = nn.Identity()
        made[name] = randomise(net, seed)
    return made


@pytest.fixture(scope="session")
def wanted(nets: dict[str, ResNet], images: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {name: net(images) for name, net in nets.items()}


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Save an object; large files do not outlive their test."""

    def save(content: Any, name: str = "checkpoint.pt", **options: Any) -> Path:
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
        else:
            torch.save(content, path, **options)
        return path

    yield save
    for path in tmp_path.iterdir():
        if path.is_file():
            path.unlink()
