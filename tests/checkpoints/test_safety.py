"""A pickle cannot run anything, whatever form it has and wherever the code hides."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isd_repro import checkpoints
from isd_repro.runtime.errors import DataError

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
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(DataError, match=r"refused: .* nothing of it was run") as caught:
            read(path)
        reason = "operations that torch.save does not write" if form == "newer" else "the pickle asks for posix.system"
        assert reason in caught.value.message
        assert not mark.exists()
        assert "safetensors.torch.save_file" in caught.value.hint
    if form == "zip":  # the pickle does what it says where nobody looks
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_modules_and_other_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(DataError, match=r"refused: the pickle asks for torch\.nn\.modules\.linear\.Linear"):
        checkpoints.load(path)
    torch.save({"state_dict": {}, "path": tmp_path}, path)
    with pytest.raises(DataError, match=r"refused: the pickle asks for pathlib"):
        checkpoints.load(path)


def test_the_allowance_ends_with_the_call(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"opt": argparse.Namespace(a=1), "model": OrderedDict(w=torch.zeros(1))}, path)
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(DataError, match="unknown layout"):
        checkpoints.load(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/model.py"):
            archive.writestr(f"scripted/{name}", b"")
    with pytest.raises(DataError, match="a TorchScript archive, which holds code"):
        checkpoints.load(path)


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, buffer)
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in whole.infolist():
            archive.writestr(info.filename, whole.read(info) + bytes(2**20 if "data/0" in info.filename else 0))
    with pytest.raises(DataError, match=r"absurd archive: .* bytes inside a file of"):
        checkpoints.load(path)


def test_other_zip_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(DataError, match=r"a zip archive that torch\.save did not write"):
        checkpoints.load(path)
