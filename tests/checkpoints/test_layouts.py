"""Every layout gives back, bit for bit, the features of the network that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from isd_repro import checkpoints
from isd_repro.checkpoints import TensorUse
from isd_repro.config.params import BackboneConfig
from isd_repro.interfaces import Setting
from isd_repro.methods.isd import Config, Method
from isd_repro.nn.backbones import build
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.tensor_files import save_tensors
from isd_repro.train.checkpoint import RunProgress
from isd_repro.train.checkpoint import save as save_resume
from tests.checkpoints.conftest import Write
from tests.checkpoints.foreign import WRITERS, State, authors, backbone, features, mlp, randomise, solo, under

Nets = dict[str, ResNet]
ISD = authors(parallel=True, head=False, predictor=True, bank=True, labels=False)


def states(nets: Nets) -> tuple[State, State]:
    return backbone(nets["student"]), backbone(nets["teacher"])


@pytest.mark.parametrize("case", WRITERS)
def test_a_foreign_file_gives_the_native_features(case: str, nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    layout, writer, teacher = WRITERS[case]
    content = writer(*states(nets))
    path = write(content)
    found = checkpoints.load(path)
    assert (found.layout, found.arch, found.channels) == (layout, "resnet18", 3)
    assert (found.image_size, found.crop_ratio, found.mean, found.std, found.identity) == (None,) * 5
    assert found.sha256 == sha256_file(path)
    every_tensor_is_listed_once(found.tensors, content, teacher)
    encoders = {**found.encoders}
    if teacher:
        encoders |= checkpoints.load(path, "teacher").encoders
    assert list(encoders) == (["student", "teacher"] if teacher else ["student"])
    for name, encoder in encoders.items():
        assert not encoder.training
        assert encoder.features == 512
        assert not any(parameter.requires_grad or parameter.dtype != torch.float32 for parameter in encoder.parameters())
        assert torch.equal(features(encoder, images), wanted[name])


def every_tensor_is_listed_once(rows: tuple[TensorUse, ...], content: Any, teacher: bool) -> None:
    state = next((content[name] for name in ("state_dict", "model") if name in content), content)
    optimizer = [row for row in rows if row.use == "optimizer"]
    assert sorted(row.key for row in rows if row not in optimizer) == sorted(state)
    assert len(optimizer) == ("optimizer" in content or "optimizer_states" in content)
    assert {row.key: row.shape for row in rows if row.key in state} == {key: tuple(value.shape) for key, value in state.items()}
    kinds = {use: [row for row in rows if row.use == use] for use in {row.use for row in rows}}
    assert len(kinds["used"]) == 100
    assert len(kinds["counter"]) == 20
    assert len(kinds.get("other encoder", [])) == (120 if teacher else 0)
    heads = [key for key in state if any(word in key for word in ("fc.", "predict", "projec", "classifier"))]
    assert sorted(row.key for row in kinds.get("head dropped", [])) == sorted(heads)
    banks = [key for key in state if any(word in key for word in ("queue", "labels", "memory_bank"))]
    assert sorted(row.key for row in kinds.get("bank", [])) == sorted(banks)
    assert not kinds.keys() - {"used", "counter", "other encoder", "head dropped", "bank", "optimizer"}


def test_the_old_format_of_torch(nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    path = write(ISD(*states(nets)), _use_new_zipfile_serialization=False)
    assert torch.equal(features(checkpoints.load(path).encoders["student"], images), wanted["student"])


def test_safetensors_of_a_foreign_layout(nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    path = write(ISD(*states(nets))["state_dict"], "foreign.safetensors")
    found = checkpoints.load(path, "teacher")
    assert (found.layout, found.identity) == ("isd", None)
    assert torch.equal(features(found.encoders["teacher"], images), wanted["teacher"])


def test_counters_may_be_absent(nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    old = {name: value for name, value in backbone(nets["student"]).items() if not name.endswith("num_batches_tracked")}
    encoder = checkpoints.load(write(old)).encoders["student"]
    assert torch.equal(features(encoder, images), wanted["student"])
    assert int(encoder.state_dict()["bn1.num_batches_tracked"]) == 0


def test_other_precisions_become_float32(nets: Nets, images: Tensor, write: Write) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in backbone(nets["student"]).items()}
    found = checkpoints.load(write(half))
    weights = found.encoders["student"].state_dict()
    assert all(torch.equal(weights[name], value.float()) for name, value in half.items() if value.is_floating_point())
    assert found.notes[1:] == ("weights are float16 in the file and were converted to float32",)


# --- teacher and its statistics -----------------------------------------------------------------------------------------


def test_the_mix_of_the_released_evaluation_only_when_asked_for(nets: Nets, wanted: State, images: Tensor, write: Write) -> None:
    student, teacher = states(nets)
    path = write(ISD(student, teacher))
    mixed = {name: (student if "running_" in name else teacher)[name] for name in teacher}
    with torch.device("meta"):
        net = build(BackboneConfig(arch="resnet18"), 64)
    net.load_state_dict(mixed, assign=True)
    expected = features(net.eval(), images)
    found = checkpoints.load(path, "teacher", teacher_bn="student")
    assert torch.equal(features(found.encoders["teacher"], images), expected)
    assert not torch.equal(expected, wanted["teacher"])
    used = [row.key for row in found.tensors if row.use == "used"]
    assert sorted(used) == sorted(
        [f"encoder_q.module.{name}" for name in student if "running_" in name]
        + [f"encoder_k.module.{name}" for name in teacher if "running_" not in name and "num_" not in name]
    )
    both = checkpoints.load(path, "both", teacher_bn="student").encoders
    assert torch.equal(features(both["student"], images), wanted["student"])
    with pytest.raises(ConfigError, match="no teacher is evaluated"):
        checkpoints.load(path, "student", teacher_bn="student")


@pytest.mark.parametrize("which", ["teacher", "both"])
def test_a_teacher_that_is_not_there(which: Any, nets: Nets, write: Write) -> None:
    with pytest.raises(DataError, match=r"no teacher in it \(layout torchvision's names: student\)") as caught:
        checkpoints.load(write(backbone(nets["student"])), which)
    assert caught.value.hint == "use --which student"


# --- our own files --------------------------------------------------------------------------------------------------------


def our_file(path: Path, config: BackboneConfig, nets: dict[str, nn.Module]) -> None:
    identity: dict[str, Any] = {
        "run": "r",
        "profile": "p",
        "fingerprint": "f",
        "manifest": "m",
        "backbone": config.model_dump(mode="json"),
    }
    identity |= {"image_size": 12, "crop_ratio": 0.75, "mean": [0.5], "std": [0.25], "encoders": list(nets)}
    tensors = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    save_tensors(path, "encoder", tensors, identity)


def test_our_encoder_file(tmp_path: Path) -> None:
    config = BackboneConfig(arch="resnet-narrow", width=2, channels=1, pool=2)
    nets: dict[str, nn.Module] = {name: randomise(build(config, 12), seed) for seed, name in enumerate(("student", "teacher"))}
    path = tmp_path / "encoder.safetensors"
    our_file(path, config, nets)
    found = checkpoints.load(path, "both", arch="resnet-narrow:2")
    images = torch.randn(2, 1, 12, 12)
    for name, net in nets.items():
        assert torch.equal(features(found.encoders[name], images), features(net, images))
    assert (found.layout, found.arch, found.channels) == ("isd-repro encoder", "resnet-narrow:2", 1)
    assert (found.image_size, found.crop_ratio, found.mean, found.std) == (12, 0.75, (0.5,), (0.25,))
    assert found.identity is not None
    assert found.identity["run"] == "r"
    with pytest.raises(DataError, match="--arch says resnet18, but the tensor shapes say resnet-narrow:2"):
        checkpoints.load(path, arch="resnet18")


def test_our_encoder_file_states_a_strided_stem(tmp_path: Path) -> None:
    config = BackboneConfig(arch="resnet-narrow", stem="strided", width=2, channels=1)
    net = randomise(build(config, 12), 0)
    path = tmp_path / "encoder.safetensors"
    our_file(path, config, {"student": net})
    images = torch.randn(2, 1, 12, 12)
    for arch in ("auto", "resnet-narrow-strided"):
        found = checkpoints.load(path, arch=arch)
        assert found.arch == "resnet-narrow-strided"
        assert torch.equal(features(found.encoders["student"], images), features(net, images))
    with pytest.raises(DataError, match="--arch says resnet-narrow, but"):
        checkpoints.load(path, arch="resnet-narrow")


def test_raw_pixels_are_an_encoder_without_tensors(tmp_path: Path) -> None:
    config = BackboneConfig(arch="pixels", channels=1)
    path = tmp_path / "encoder.safetensors"
    our_file(path, config, {"student": build(config, 12)})
    found = checkpoints.load(path)
    images = torch.randn(2, 1, 12, 12)
    assert torch.equal(features(found.encoders["student"], images), images.flatten(1))
    assert (found.arch, found.tensors) == ("pixels", ())
    with pytest.raises(DataError, match="is the raw-pixels encoder"):
        checkpoints.load(path, arch="resnet18")


@pytest.mark.parametrize(
    ("stem", "pool", "arch"),
    [
        ("small", 1, "auto"),
        ("small", 2, "resnet-narrow:2"),
        ("strided", 1, "resnet-narrow-strided"),
        ("strided", 2, "resnet-narrow-strided:2"),
    ],
)
def test_our_resume_file_infers_its_backbone(stem: Literal["small", "strided"], pool: int, arch: str, tmp_path: Path) -> None:
    config = BackboneConfig(arch="resnet-narrow", stem=stem, width=2, channels=1, pool=pool)
    method = Method(
        Config(tau_student=0.1, tau_teacher=0.1, momentum=0.9, bank_size=8, heads="mlp"),
        lambda: build(config, 12),
        Setting(classes=2, images=4, batch_size=4, steps=1),
    )
    randomise(method.student, 1)
    randomise(method.teacher, 2)
    path = tmp_path / "checkpoint.pt"
    # training keeps channels_last; reading has to undo it
    kept = method.to(memory_format=torch.channels_last)
    save_resume(path, "f", kept, torch.optim.SGD(method.student.parameters(), 0.1, 0.9), RunProgress(step=3))
    found = checkpoints.load(path, "both", arch=arch)
    images = torch.randn(2, 1, 12, 12)
    native = build(config, 12).eval()
    for name, encoder in found.encoders.items():
        native.load_state_dict(method.encoders[name].state_dict())
        assert torch.equal(features(encoder, images), features(native, images))
    assert found.layout == "isd-repro resume"
    assert any(f"stride {1 if stem == 'small' else 2} and a pooling grid of {pool} x {pool}" in note for note in found.notes)
    uses = {row.key: row.use for row in found.tensors}
    assert uses["bank.rows"] == "bank"
    assert uses["student.projector.0.weight"] == uses["predictor.0.weight"] == "head dropped"


def test_a_features_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "features.safetensors"
    save_tensors(path, "features", {"student.search": torch.zeros(2, 2)}, {"run": "r"})
    with pytest.raises(DataError, match="expected kind 'encoder' format 1, found kind 'features'"):
        checkpoints.load(path)


def test_solo_learn_pads_its_small_stem_by_two(nets: Nets, images: Tensor, write: Write) -> None:
    net: Any = randomise(build(BackboneConfig(arch="resnet18", stem="small"), 32), 5)
    state = net.state_dict()
    net.conv1.padding = (2, 2)
    path = write(solo(state, state))
    found = checkpoints.load(path)
    small = images[:, :, :16, :16]
    assert torch.equal(features(found.encoders["student"], small), features(net, small))
    assert found.arch == "resnet18-small"
    assert any("padding 2 (solo-learn's)" in note for note in found.notes)
    net.conv1.padding = (1, 1)
    plain = features(net, small)
    named = under("backbone.", state)
    for other in (named, named | mlp("projector"), named | mlp("projector") | mlp("predictor", 4)):  # Barlow Twins, SimSiam
        found = checkpoints.load(write({"state_dict": other}))
        assert torch.equal(features(found.encoders["student"], small), plain)
        assert found.layout == "torchvision's names"
        assert any("--padding states another" in note for note in found.notes)
    assert torch.equal(features(checkpoints.load(write(solo(state, state)), padding="1").encoders["student"], small), plain)
    with pytest.raises(ConfigError, match="--padding 2: the stem is 7x7"):
        checkpoints.load(write(WRITERS["moco-v2"][1](*states(nets))), padding="2")
