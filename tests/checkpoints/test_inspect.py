"""`isd-repro checkpoint inspect`: the account of whole, broken and foreign files, for people and for machines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet

from isd_repro import checkpoints, cli
from tests.checkpoints.conftest import Write
from tests.checkpoints.foreign import WRITERS, backbone


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["isd-repro", "checkpoint", "inspect", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_whole_file(
    nets: dict[str, ResNet], write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(WRITERS["isd-plus"][1](backbone(nets["student"]), backbone(nets["teacher"])))
    assert command(monkeypatch, str(path)) == 0
    shown = capsys.readouterr().out
    for words in ("isd-plus", "resnet18", "student, teacher", "encoder_k.module.layer4.1.bn2.running_var", "512 x 512 x 3 x 3"):
        assert words in shown
    assert "100 used (student)" in shown
    assert command(monkeypatch, str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"used": 200, "counter": 40, "head dropped": 27, "bank": 3, "optimizer": 1}
    assert (found["layout"], found["arch"], found["problems"]) == ("isd-plus", "resnet18", [])
    assert len(found["tensors"]) == 271
    assert found["sha256"] == checkpoints.load(path).sha256


def test_a_broken_file_is_listed_and_refused(
    nets: dict[str, ResNet], write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = backbone(nets["student"])
    del state["layer1.0.bn1.bias"]
    state["layer1.0.extra"] = torch.zeros(3)
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    path = write(state)
    assert command(monkeypatch, str(path), "--json") == 4
    out, err = capsys.readouterr()
    rows = {row["key"]: row["use"] for row in json.loads(out)["tensors"]}
    assert rows["layer1.0.bn1.bias"] == "missing"
    assert rows["layer1.0.extra"] == "surplus"
    assert rows["layer1.0.conv1.weight"] == "other shape"
    assert rows["layer1.0.conv2.weight"] == "used"
    for words in ("missing: layer1.0.bn1.bias, expected (64,)", "surplus: layer1.0.extra (3,)", "is (64, 64, 1, 1), expected"):
        assert words in err


def test_an_unknown_file_is_listed_and_an_unreadable_one_is_not(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"net": {"weight": torch.zeros(2, 3)}})
    assert command(monkeypatch, str(path)) == 4
    out, err = capsys.readouterr()
    assert "net/weight" in out
    assert "not recognised" in out
    assert "no ResNet among its 1 tensors (net/weight)" in err
    path = tmp_path / "notes.txt"
    path.write_text("notes")
    assert command(monkeypatch, str(path)) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"error: {path}: a text file, not a checkpoint"
    assert err.splitlines()[1].startswith("hint: the download failed")


def test_what_shapes_do_not_show_is_said(nets: dict[str, ResNet], write: Write) -> None:
    """A blurred or antialiased ResNet has a plain one's names and shapes."""
    note = "strides, padding and activations do not show in shapes and are assumed to be torchvision's"
    student, teacher = backbone(nets["student"]), backbone(nets["teacher"])
    for name, bare in {"torchvision": True, "lightly": True, "isd": False, "moco-v2": False}.items():
        path = write(WRITERS[name][1](student, teacher))
        assert (note in checkpoints.load(path).notes) == bare
        assert (note in checkpoints.inspect(path).notes) == bare


def test_an_architecture_of_strange_signs(
    nets: dict[str, ResNet], write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write({"arch": "resnet50\n\x1b[31m\u202e" + "x" * 1000, "state_dict": backbone(nets["student"])})
    assert command(monkeypatch, str(path)) == 0
    out = capsys.readouterr().out
    (shown,) = [one for one in out.splitlines() if "calls itself" in one]
    assert "resnet50\\n\\x1b[31m\\u202ex" in shown
    assert "\x1b" not in out
    assert len(shown) < 500
    path = write({"a\n\x1b[31m": 1})
    assert command(monkeypatch, str(path)) == 4
    err = capsys.readouterr().err
    assert "found a\\n\\x1b[31m" in err
