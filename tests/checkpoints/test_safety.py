"""A pickle cannot run anything, whatever form it has and wherever the code hides."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isd_repro import checkpoints
from isd_repro.checkpoints import read
from isd_repro.checkpoints.outline import Stand
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file
from tests.checkpoints.foreign import refused, unfit

FORMS = ["zip", "legacy", "plain", "newer", "namespace"]


class Malicious:
    """Runs a shell command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def forms(content: Any, folder: Path) -> dict[str, Path]:
    """The same object in every form of pickle that there is."""
    made = {form: folder / f"{form}.pth" for form in FORMS}
    torch.save(content, made["zip"])
    torch.save(content, made["legacy"], _use_new_zipfile_serialization=False)
    made["plain"].write_bytes(pickle.dumps(content, protocol=2))
    made["newer"].write_bytes(pickle.dumps(content, protocol=4))
    torch.save({"opt": argparse.Namespace(inside=content), "state_dict": {}}, made["namespace"])
    return made


@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_pickle_does_not_run(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what a careless environment may hold
    mark = tmp_path / "it-ran"
    path = forms({"state_dict": {"x": Malicious(mark), "conv1.weight": torch.zeros(1)}}, tmp_path)[form]
    with pytest.raises(DataError, match=r"refused: the pickle asks for posix\.system; .* nothing of it was run") as caught:
        checkpoints.load(path)
    assert "safetensors.torch.save_file" in caught.value.hint
    found = checkpoints.inspect(path)
    assert found.problems == (caught.value.message,)
    assert not mark.exists()
    if form in {"zip", "legacy"}:  # names and shapes are in torch's own pickles alone
        assert [(row.key, row.shape, row.dtype) for row in found.tensors] == [("state_dict/conv1.weight", (1,), "float32")]
        assert found.sha256 == sha256_file(path)
    if form == "zip":  # the pickle does what it says where nobody looks
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_modules_and_other_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path)
    unfit(path, "refused: the pickle asks for torch.nn.modules.linear.Linear")
    assert {row.key: row.shape for row in checkpoints.inspect(path).tensors} == {"weight": (2, 2), "bias": (2,)}


class Calls:
    """Asks for a call of what torch's restricted unpickler allows."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((bytearray, (5 * 10**9,)), "builtins.bytearray"),
        ((bytearray, ("x" * 50_000, "punycode")), "builtins.bytearray"),
        ((codecs.encode, ("x" * 50_000, "punycode")), "_codecs.encode"),
        ((torch.Tensor, (2 * 10**9,)), "torch.Tensor"),
        ((torch.FloatStorage, (2 * 10**9,)), "torch.FloatStorage"),
    ],
    ids=["memory", "decoding", "encoding", "tensor", "storage"],
)
def test_a_small_file_that_asks_for_much_is_not_loaded(
    call: tuple[Any, Any], name: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": Calls(*call), "w": torch.zeros(2, 3)}, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    unfit(path, f"refused: the pickle calls {name}")
    assert [(row.key, row.shape) for row in checkpoints.inspect(path).tensors] == [("w", (2, 3))]


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # an entry of the memo far beyond the others
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",  # bytes that the file does not have
        pickle.dumps({10**5000: 1}, protocol=2),  # a key that Python does not print
        # (0,), then 50 times a tuple that holds the one before twice, as a key: 2**50 values to hash
        b"\x80\x02}K\x00\x85q\x00" + b"".join(b"h%c\x86q%c" % (at, at + 1) for at in range(50)) + b"K\x01s.",
    ],
)
def test_a_pickle_that_takes_memory_or_time(payload: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(payload)
    refused(path, "truncated or damaged")


def test_a_tensor_of_what_is_no_storage_is_not_printed(tmp_path: Path) -> None:
    """As text this list, which holds itself twice at each of 200 levels, would have no end."""
    levels: list[Any] = [0]
    for _ in range(200):
        levels = [levels, levels]
    rebuild = Calls(torch._utils._rebuild_tensor_v2, (levels, 0, levels, (), False, None))
    path = tmp_path / "file.pt"
    path.write_bytes(pickle.dumps({"a": rebuild, "b": Malicious(tmp_path / "ran")}, protocol=2))
    assert [(row.key, row.shape, row.dtype) for row in checkpoints.inspect(path).tensors] == [("a", (), "")]


def test_plain_values_of_other_libraries_are_bytes_and_nothing_else(tmp_path: Path) -> None:
    """No class of theirs is made: only stand-ins come out, and defaultdict as dict."""
    path = tmp_path / "file.pt"
    torch.save({"lr": np.float64(0.1), "out": tmp_path, "losses": defaultdict(list, a=[1]), "w": torch.zeros(1)}, path)
    tree = read.read(path).tree
    assert type(tree["lr"]).__mro__[1] is type(tree["out"]).__mro__[1] is Stand
    assert tree["losses"] == {"a": [1]}
    assert type(tree["losses"]) is dict


def test_the_allowance_ends_with_the_call(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"opt": argparse.Namespace(a=1), "model": OrderedDict(w=torch.zeros(1))}, path)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(DataError, match="no ResNet among its 1 tensors"):
        checkpoints.load(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/model.py"):
            archive.writestr(f"scripted/{name}", b"")
    refused(path, "a TorchScript archive, which holds code", "state_dict")


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, buffer)
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in whole.infolist():
            archive.writestr(info.filename, whole.read(info) + bytes(2**20 if "data/0" in info.filename else 0))
    refused(path, "bytes inside a file of", "do not trust the file")
