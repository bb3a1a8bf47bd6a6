"""Encoder files: loaded whole or refused with every difference named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isd_repro.config.params import BackboneConfig
from isd_repro.evaluations.encoders import check_manifest, load_encoders
from isd_repro.nn.backbones import build
from isd_repro.runtime.errors import DataError
from isd_repro.tensor_files import save_tensors

CONFIG = BackboneConfig(arch="resnet-narrow", width=2, channels=1)


def backbone(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(CONFIG, 12)
        net(torch.randn(4, 1, 12, 12))  # BatchNorm statistics that are not the initial ones
    return net


def identity(**changes: Any) -> dict[str, Any]:
    given = {
        "profile": "t",
        "run": "isd",
        "fingerprint": "f",
        "manifest": "m",
        "backbone": CONFIG.model_dump(mode="json"),
        "image_size": 12,
        "crop_ratio": 0.875,
        "mean": [0.5],
        "std": [0.25],
        "encoders": ["student", "teacher"],
    }
    return {key: value for key, value in {**given, **changes}.items() if value is not None}


def tensors(nets: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}


@pytest.fixture
def nets() -> dict[str, nn.Module]:
    return {"student": backbone(1), "teacher": backbone(2)}


def test_round_trip(tmp_path: Path, nets: dict[str, nn.Module]) -> None:
    path = tmp_path / "encoder.safetensors"
    save_tensors(path, "encoder", tensors(nets), identity())
    before = torch.get_rng_state()
    back, found = load_encoders(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.mean == (0.5,)
    assert found.crop_ratio == 0.875
    images = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    for name, net in nets.items():
        assert not back[name].training
        assert all(not parameter.requires_grad for parameter in back[name].parameters())
        assert torch.equal(back[name](images), net.eval()(images))
    assert not torch.equal(back["student"](images), back["teacher"](images))


def test_every_difference_is_listed(tmp_path: Path, nets: dict[str, nn.Module]) -> None:
    path = tmp_path / "encoder.safetensors"
    given = tensors(nets)
    del given["teacher.bn1.running_var"]
    given["student.fc.weight"] = torch.zeros(3)
    given["student.conv1.weight"] = torch.zeros(2, 3, 3, 3)
    given["student.bn1.weight"] = given["student.bn1.weight"].double()
    save_tensors(path, "encoder", given, identity())
    with pytest.raises(DataError) as caught:
        load_encoders(path)
    message = caught.value.message
    assert "4 tensors do not fit" in message
    assert "missing teacher.bn1.running_var" in message
    assert "unmatched student.fc.weight" in message
    assert "student.conv1.weight is (2, 3, 3, 3) float32, expected (2, 1, 3, 3) float32" in message
    assert "student.bn1.weight is (2,) float64, expected (2,) float32" in message


def test_tensors_of_an_encoder_that_is_not_declared_are_unmatched(tmp_path: Path, nets: dict[str, nn.Module]) -> None:
    path = tmp_path / "encoder.safetensors"
    save_tensors(path, "encoder", tensors(nets), identity(encoders=["student"]))
    with pytest.raises(DataError, match=r"unmatched teacher\.bn1\.bias"):
        load_encoders(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"crop_ratio": None}, "crop_ratio: Field required"),
        ({"backbone": {"arch": "vgg"}}, r"backbone\.arch: Input should be"),
        ({"encoders": []}, "encoders: Tuple should have at least 1 item"),
        ({"encoders": ["head"]}, r"encoders\.0: Input should be 'student' or 'teacher'"),
    ],
)
def test_a_wrong_identity_is_named(tmp_path: Path, nets: dict[str, nn.Module], changes: dict[str, Any], problem: str) -> None:
    path = tmp_path / "encoder.safetensors"
    save_tensors(path, "encoder", tensors(nets), identity(**changes))
    with pytest.raises(DataError, match=problem):
        load_encoders(path)


def test_pixels_need_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    pixels = BackboneConfig(arch="pixels", channels=1).model_dump(mode="json")
    save_tensors(path, "encoder", {}, identity(backbone=pixels, encoders=["student"]))
    encoders, _ = load_encoders(path)
    images = torch.rand(2, 1, 12, 12)
    assert torch.equal(encoders["student"](images), images.reshape(2, 144))


def test_changed_manifest_is_named(tmp_path: Path) -> None:
    check_manifest(tmp_path / "e", "a" * 64, "a" * 64)
    with pytest.raises(DataError, match="made with aaaaaaaaaaaa, the prepared subset has bbbbbbbbbbbb"):
        check_manifest(tmp_path / "e", "a" * 64, "b" * 64)
