"""The frozen teacher of CompRess: read from a checkpoint, and no part of the method's state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isd_repro.methods.compress import Method
from isd_repro.nn import backbones
from isd_repro.runtime.errors import ConfigError
from isd_repro.runtime.files import sha256_file
from isd_repro.train import pretrain
from tests.conformance.problem import BACKBONE, SIDE, Noise, build, frozen


def test_the_teacher_is_the_encoder_of_the_stated_checkpoint(tmp_path: Path) -> None:
    path, network = tmp_path / "teacher.pth", backbones.build(BACKBONE, SIDE).eval()
    torch.save(network.state_dict(), path)
    sha256, images = sha256_file(path), Noise().at(0).view_student
    found = pretrain._frozen(path, sha256, 1)
    assert torch.equal(found(images), network(images))
    assert not found.training
    with pytest.raises(ConfigError, match=rf"method\.sha256: {64 * '0'}, but that of {path} is {sha256}"):
        pretrain._frozen(path, 64 * "0", 1)
    with pytest.raises(ConfigError, match=r"takes images of 1 channels, and the backbone of 3"):
        pretrain._frozen(path, sha256, 3)


def test_the_teacher_follows_the_method_and_is_not_saved() -> None:
    method = build("compress").double().train()
    assert isinstance(method, Method)
    teacher = method._teachers[0]
    assert not any("teacher" in key for key in method.state_dict())
    batch = Noise().at(0)
    images = batch.view_student.double()
    method(replace(batch, view_student=images))
    assert not teacher.training
    want = frozen("", "").double().state_dict()
    assert all(torch.equal(value, want[key]) for key, value in teacher.state_dict().items())
    assert {value.dtype for value in teacher.parameters()} == {torch.float64}
