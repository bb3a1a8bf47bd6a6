"""What does not fit is refused, and each kind of misfit by a message of its own that names keys and shapes."""

from __future__ import annotations

import argparse
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet

from isd_repro import checkpoints
from isd_repro.checkpoints import read
from isd_repro.runtime.errors import ConfigError, DataError
from tests.checkpoints.conftest import Write
from tests.checkpoints.foreign import WRITERS, backbone, mlp, numbered, refused, under, unfit

LAYOUTS = ["isd", "moco-v2", "lightly-numbered", "torchvision"]
PREFIX = {"isd": "encoder_q.module.", "moco-v2": "module.encoder_q.", "lightly-numbered": "backbone.", "torchvision": ""}


def changed(case: str, nets: dict[str, ResNet]) -> tuple[dict[str, Any], dict[str, Tensor], str, str]:
    """A layout's content, its state dict, and the file's and the rule's name of one tensor."""
    content = WRITERS[case][1](backbone(nets["student"]), backbone(nets["teacher"]))
    state = content.get("state_dict", content)
    name = "5.0.conv1.weight" if case == "lightly-numbered" else "layer2.0.conv1.weight"
    shown = PREFIX[case].replace("module.", "") + "layer2.0.conv1.weight"
    assert PREFIX[case] + name in state
    return content, state, PREFIX[case] + name, shown


@pytest.mark.parametrize("case", LAYOUTS)
def test_renamed_missing_and_misshapen_are_three_errors(case: str, nets: dict[str, ResNet], write: Write) -> None:
    messages = {}
    for kind in ("renamed", "missing", "misshapen"):
        content, state, key, _ = changed(case, nets)
        tensor = state.pop(key)
        if kind == "renamed":
            state[key.replace("conv1", "convolution1")] = tensor
        elif kind == "misshapen":
            state[key] = tensor[:, :32]
        with pytest.raises(DataError) as caught:
            checkpoints.load(write(content))
        messages[kind] = (caught.value.message.partition(": student, resnet18: ")[2], caught.value.hint)
    shown = changed(case, nets)[3]
    new = shown.replace("conv1", "convolution1")
    shape = "(128, 64, 3, 3)"
    assert messages["renamed"][0] == f"1 tensor renamed: {new} {shape} where {shown} is expected"
    assert messages["missing"][0] == f"1 tensor missing: {shown}, expected {shape}"
    assert messages["misshapen"][0] == f"1 tensor of another shape: {shown} is (128, 32, 3, 3), expected {shape}"
    assert len({hint for _, hint in messages.values()}) == 3


def test_an_encoder_not_asked_for_may_be_broken(nets: dict[str, ResNet], write: Write) -> None:
    content = WRITERS["isd"][1](backbone(nets["student"]), backbone(nets["teacher"]))
    del content["state_dict"]["encoder_k.module.bn1.weight"]
    path = write(content)
    assert checkpoints.load(path, "student").arch == "resnet18"
    with pytest.raises(DataError, match=r"teacher, resnet18: 1 tensor missing: encoder_k\.bn1\.weight, expected \(64,\)"):
        checkpoints.load(path, "teacher")


def test_two_names_for_one_tensor(nets: dict[str, ResNet], write: Write) -> None:
    state = backbone(nets["student"])
    refused(write({1: state, "1": {}}), "two keys are both written '1'")
    unfit(write(state | {"module.conv1.weight": state["conv1.weight"]}), "conv1.weight and module.conv1.weight are both conv1")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("conv1.weight", float("nan"), "1 of 9408 values of module.encoder_q.conv1.weight are NaN or infinite"),
        ("layer4.1.bn2.running_var", float("inf"), "1 of 512 values of module.encoder_q.layer4.1.bn2.running_var are NaN or"),
        ("layer3.0.bn1.running_var", -1e-9, "1 of 256 values of module.encoder_q.layer3.0.bn1.running_var are negative"),
    ],
)
def test_values_that_no_weight_has(name: str, value: float, words: str, nets: dict[str, ResNet], write: Write) -> None:
    state = {key: tensor.clone() for key, tensor in backbone(nets["student"]).items()}
    state[name].view(-1)[3] = value
    state["bn1.running_mean"][:] = -1.0  # a mean may be negative
    unfit(write(under("module.encoder_q.", state)), words)


def test_a_tensor_without_values(nets: dict[str, ResNet], write: Write) -> None:
    state = backbone(nets["student"]) | {"layer1.0.conv1.weight": torch.empty(64, 64, 3, 3, device="meta")}
    path = write({"state_dict": state})
    refused(path, "state_dict/layer1.0.conv1.weight (64, 64, 3, 3) has a shape but no values")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet18_2", "vit_small", None, 7])
def test_an_architecture_that_the_shapes_contradict_is_noted(arch: Any, nets: dict[str, ResNet], write: Write) -> None:
    state = backbone(nets["student"])
    notes = [f"the file calls itself {arch}; it is read as resnet18, as its tensor shapes say"]
    for content in ({"arch": arch, "state_dict": state}, {"opt": argparse.Namespace(arch=arch), "state_dict": state}):
        path = write(content)
        expected = notes if arch in {"resnet50", "wide_resnet18_2"} else []
        for notes_of in (checkpoints.load, checkpoints.inspect):
            assert [note for note in notes_of(path).notes if "not show in" not in note] == expected


@pytest.mark.parametrize(
    ("dtype", "hint"), [(torch.int8, "quantised"), (torch.complex64, "complex"), (torch.float8_e4m3fn, "quantised")]
)
def test_weights_of_another_kind(dtype: torch.dtype, hint: str, nets: dict[str, ResNet], write: Write) -> None:
    state = backbone(nets["student"])
    state["conv1.weight"] = state["conv1.weight"].to(dtype)
    name = str(dtype).removeprefix("torch.")
    path = write(state)
    unfit(path, f"conv1.weight is {name}, expected float16", hint)
    assert not any("were converted" in note for note in checkpoints.inspect(path).notes)


def test_weights_that_torch_does_not_compare_are_not_the_same(nets: dict[str, ResNet], write: Write) -> None:
    state = backbone(nets["student"])
    small = state | {"conv1.weight": state["conv1.weight"].to(torch.float8_e4m3fn)}
    refused(write({"one": small, "two": state}), "2 different ResNets: one, two", looks=(checkpoints.load,))


def test_an_architecture_given_by_name(nets: dict[str, ResNet], write: Write) -> None:
    path = write(backbone(nets["student"]))
    assert checkpoints.load(path, arch="resnet18").arch == "resnet18"
    with pytest.raises(DataError, match="--arch says resnet50, but the tensor shapes say resnet18"):
        checkpoints.load(path, arch="resnet50")
    with pytest.raises(ConfigError, match="unknown architecture 'resnet19'"):
        checkpoints.load(path, arch="resnet19")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"epoch": torch.zeros(1)}, "no ResNet among its 1 tensors (epoch)"),
        ({"epoch": 3, "state_dict": {}}, "no tensors in it: found epoch, state_dict"),
        ({}, "no tensors in it: the file is empty"),
        ({"features.0.weight": torch.zeros(2, 3, 5, 5)}, "no ResNet among its 1 tensors (features.0.weight)"),
        ({"backbone.2.0.shortcut.0.weight": torch.zeros(2, 3, 1, 1)}, "lightly's own ResNet"),
        (
            {"embedder.x": torch.zeros(2), "encoder.stages.0.layers.0.shortcut.convolution.weight": torch.zeros(2)},
            "(embedder.x, ",
        ),
        ({"stem.conv.weight": torch.zeros(2), "stages.0.blocks.0.conv1.weight": torch.zeros(2)}, "weight): none is named layer1"),
        ({"cls_token": torch.zeros(1, 1, 4), "blocks.0.norm1.weight": torch.zeros(4)}, "a vision transformer"),
        (
            {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3), "bn1.running_mean": torch.zeros(64)},
            "no supported ResNet has (1, 0, 0, 0) basic blocks",
        ),
    ],
)
def test_other_networks(state: dict[str, Tensor], reason: str, write: Write) -> None:
    unfit(write(state), reason)


def test_networks_that_begin_like_a_resnet(nets: dict[str, ResNet], write: Write) -> None:
    state = backbone(nets["student"])
    group_norm = {name: value for name, value in state.items() if "running" not in name and "num_" not in name}
    stems = {(channels, side): state | {"conv1.weight": torch.ones(64, channels, side, side)} for channels, side in STEMS}
    for content, words in (
        *((stems[stem], words) for stem, words in STEMS.items()),
        (group_norm, "without running statistics (GroupNorm, or BatchNorm"),
        (numbered(state) | mlp("9"), "tensors surplus: 9.0.weight (8, 512)"),
    ):
        unfit(write(content), words)


STEMS = {
    (3, 5): "conv1.weight is (64, 3, 5, 5); a stem has a kernel of 7x7 or 3x3",
    **{(n, 7): f"conv1.weight is (64, {n}, 7, 7), so images have {n} channels; 1 or 3 can be read" for n in (0, 2, 4)},
}


# --- files that are no checkpoints ---------------------------------------------------------------------------------------


def onnx() -> bytes:
    """The first fields of an ONNX model: ir_version 8, producer."""
    return b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x10" + bytes(range(200))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"epoch,loss\n1,0.5\n", "a text file"),
        (b'[["a1"],{"b": 2}]', "a text file"),
        (b'{"metadata": {}, "weight_map": {"conv1.weight": "model-00001.safetensors"}}', "the index of a checkpoint in several"),
        ("Résumé\n".encode(), "a text file"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (onnx(), "looks like an ONNX model"),
        (b"\x1f\x8b\x08\x00rest", "a gzip archive"),
        (bytes(257) + b"ustar\x00", "a tar archive"),
        (b"\xff\xfe\x00\x00\x01\x02\x03\x04\x05", "unknown file format (first bytes ff fe 00 00 01 02 03 04)"),
        (b"PK\x03\x04 and no more", "truncated or damaged torch archive"),
        (b"\x80\x02}q\x00.", "truncated or damaged torch checkpoint"),
    ],
)
def test_other_files(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    refused(path, reason)


@pytest.mark.parametrize(
    ("names", "reason", "hint"),
    [
        (["arr_0.npy", "arr_1.npy"], "a NumPy archive", "safetensors"),
        (["m/archive_format", "m/models/model.json"], "a program of torch.export", "state_dict"),
        (["run/log.txt", "run/last.ckpt"], "it holds run/log.txt, run/last.ckpt", "unpack it and give run/last.ckpt"),
        (["a.txt"], "did not write; it holds a.txt", "expected a torch checkpoint"),
    ],
)
def test_other_zips(names: list[str], reason: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    refused(path, reason, hint)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(form: str, keep: float, write: Write) -> None:
    state = under("module.", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).state_dict())
    options = {"_use_new_zipfile_serialization": form == "zip"} if form != "safetensors" else {}
    path = write(state, "file.safetensors" if form == "safetensors" else "file.pt", **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=r"truncated or damaged|truncated safetensors file"):
        checkpoints.load(path)


def safetensors(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (struct.pack("<Q", 2**62) + b"{}", "its header has 4,611,686,018,427,387,904 bytes and the file 10"),
        (struct.pack("<Q", 4) + b"{abc", "damaged safetensors header"),
        (
            safetensors({"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}),
            "truncated safetensors file: w (1099511627776, 1048576) ends at byte 4,611,686,018,427,387,904 of 0",
        ),
        (safetensors({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, bytes(4)), "damaged safetensors file"),
        (safetensors({"w": {"dtype": "F32"}}), "damaged safetensors file"),
        (safetensors({"__metadata__": {"x": "x" * 5 * 2**20}}), "absurd header: 5,242,"),
    ],
)
def test_absurd_safetensors_headers(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    refused(path, reason)


def test_absurd_counts(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_TENSORS", 20)
    state = {f"conv1.{index}": torch.zeros(1) for index in range(21)}
    for name in ("file.pt", "file.safetensors"):
        with pytest.raises(DataError, match=r"absurd (?:content: more than 20 tensors|header: 21 tensors)"):
            checkpoints.load(write(state, name))
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested]
    with pytest.raises(DataError, match="or 24 levels"):
        checkpoints.load(write({"state_dict": {}, "opt": nested}))


def test_a_shape_larger_than_the_file(write: Write) -> None:
    path = write({"conv1.weight": torch.zeros(1).expand(2**30, 2**10)})
    refused(path, "absurd tensor: conv1.weight (1073741824, 1024) torch.float32")
