"""A file is read once: its hash and its values are of the same bytes, whatever becomes of it meanwhile."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torchvision.models import ResNet, resnet50

from isd_repro import checkpoints
from isd_repro.runtime.errors import DataError
from tests.checkpoints.conftest import Write
from tests.checkpoints.foreign import backbone, refused
from tests.faults.test_memory import peak

FORMS = {"zip": ("x.pt", torch), "legacy": ("x.pt", torch), "safetensors": ("x.safetensors", safetensors.torch)}


def written(form: str, net: ResNet, write: Write) -> Path:
    options = {"_use_new_zipfile_serialization": False} if form == "legacy" else {}
    return write(backbone(net), FORMS[form][0], **options)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_after_it_was_read_is_still_what_was_read(
    form: str, nets: dict[str, ResNet], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(form, nets["student"], write)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    module = FORMS[form][1]
    load = module.load

    def cutting(*args: Any, **options: Any) -> Any:
        os.truncate(path, 100)
        return load(*args, **options)

    monkeypatch.setattr(module, "load", cutting)
    found = checkpoints.load(path)
    assert path.stat().st_size == 100
    assert found.sha256 == digest
    for name, tensor in found.encoders["student"].state_dict().items():
        assert torch.equal(tensor, nets["student"].state_dict()[name])


@pytest.mark.parametrize("change", ["longer", "shorter", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: str, nets: dict[str, ResNet], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(backbone(nets["student"]))
    fstat, calls = os.fstat, []

    def late(handle: int) -> os.stat_result:
        """The second look is the one after reading."""
        calls.append(handle)
        if len(calls) == 2:
            size = path.stat().st_size
            if change == "rewritten":
                before = path.stat().st_mtime_ns
                path.write_bytes(path.read_bytes())
                os.utime(path, ns=(before, before))
            else:
                os.truncate(path, size + (1 if change == "longer" else -1))
        return fstat(handle)

    monkeypatch.setattr(os, "fstat", late)
    with pytest.raises(DataError, match="changed while it was being read") as caught:
        checkpoints.load(path)
    assert "written completely" in caught.value.hint
    assert len(calls) >= 2


def test_a_flipped_bit_of_a_torch_archive(nets: dict[str, ResNet], write: Write) -> None:
    path = write(backbone(nets["student"]))
    with zipfile.ZipFile(path) as archive:
        (entry,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 2000] ^= 1
    path.write_bytes(content)
    refused(path, "data/0")


@pytest.mark.parametrize("entry", ["/data/0", "/data.pkl"])
def test_an_entry_marked_as_a_folder(entry: str, nets: dict[str, ResNet], write: Write) -> None:
    """torch would leave the tensor's memory as it found it."""
    path = write(backbone(nets["student"]))
    content = bytearray(path.read_bytes())
    at = -1
    while not (name := entry_name(content, at := content.index(b"PK\x01\x02", at + 1))).endswith(entry.encode()):
        pass
    content[at + 38] |= 0x10  # external attributes, DOS directory bit
    path.write_bytes(content)
    refused(path, f"{name.decode()} is marked as a folder")


def entry_name(content: bytes | bytearray, at: int) -> bytes:
    """Of the index entry that begins there."""
    return bytes(content[at + 46 : at + 46 + int.from_bytes(content[at + 28 : at + 30], "little")])


def test_a_size_beyond_any_machine(nets: dict[str, ResNet], write: Write) -> None:
    """The zip reader's own error for it is no error of zip files."""
    path = write(backbone(nets["student"]))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x06\x06")  # torch writes the 64-bit end record
    content[at + 40 : at + 48] = (2**63 - 1).to_bytes(8, "little")  # size of the index
    path.write_bytes(content)
    refused(path, "damaged torch archive")


def test_words_for_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    words = {
        "pipe": "a pipe or a device",
        "dangling": "a link to a file that does not exist",
        "loop": "Too many levels of symbolic links",
        "x" * 300: "File name too long",
        ".": "a directory",
        "none": "no such file",
    }
    for name, said in words.items():
        refused(tmp_path / name, said)


@pytest.mark.parametrize("name", ["bn1.\x1b[31mweight", "layer\n1", "\u202eweight"])
@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_names_that_drive_a_terminal(form: str, name: str, nets: dict[str, ResNet], write: Write) -> None:
    path = write(backbone(nets["student"]) | {name: torch.zeros(2)}, FORMS[form][0])
    for look in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(DataError, match="name cannot be shown") as caught:
            look(path)
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_memory_is_below_twice_the_file(form: str, write: Write, tmp_path: Path) -> None:
    with torch.device("meta"):
        net = resnet50()
    net = net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.fill_(1)
    path = written(form, net, write)
    size = path.stat().st_size / 2**20
    assert size > 85
    assert peak(tmp_path, tmp_path, "checkpoint", "inspect", str(path), "--json") < 2 * size + 60
