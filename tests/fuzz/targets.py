"""Parsers under attack: for each a valid file, the reader, what its value means, and the exit code of a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from isd_repro import checkpoints, tracking
from isd_repro.checkpoints import read
from isd_repro.config import reader as config
from isd_repro.data import manifests
from isd_repro.data.lists import parse_list
from isd_repro.data.manifests import open_prepared
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.records import EvaluationRecord, ExternalRecord, PretrainRecord, read_record
from isd_repro.runtime.errors import EXIT_CONFIG, EXIT_DATA, UserError
from isd_repro.tensor_files import load_tensors
from tests.checkpoints import foreign

WORDS = (
    b"",
    b"\0",
    b"\xff",
    b"\n",
    b"\t",
    b"..",
    b"/",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"[",
    b"{",
    b"&a ",
    b"*a",
    b"!!",
)
COUNTS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        file: the file that is changed.
        read: reads it; gives something that compares equal where the meaning is equal.
        code: exit code of every refusal.
        hashed: no change of it may go unnoticed: what is read is what was written.
    """

    file: Path
    read: Callable[[], Any]
    code: int = EXIT_DATA
    hashed: bool = False


class Unsound(Exception):
    """What must not happen; the text says which input did it."""


def attempt(target: Target, content: bytes, whole: Any) -> bool:
    """Read a changed file: whether it was refused.

    Raises:
        Unsound: it ended in another exception, in another code, or, where all is hashed, in another value.
    """
    target.file.write_bytes(content)
    try:
        value = target.read()
    except UserError as error:
        if error.exit_code != target.code:
            raise Unsound(f"exit code {error.exit_code}: {error.message}") from error
        if str(target.file.name) not in error.message and str(target.file.parent.name) not in error.message:
            raise Unsound(f"the file is not named: {error.message}") from error
        return True
    except Exception as error:
        raise Unsound(f"{type(error).__name__}: {error}; input {content[:2000]!r}") from error
    if target.hashed and value != whole:
        raise Unsound(f"read as another value; input {content[:2000]!r}")
    return False


def mutations(whole: bytes, draws: random.Random) -> Iterator[bytes]:
    """Changed copies without end: bits, numbers, cuts, repeats, pieces of itself, and words that parsers mind."""
    while True:
        content = bytearray(whole)
        for _ in range(draws.choice((1, 1, 1, 2, 4, 16))):
            at = draws.randrange(len(content) + 1)
            end = min(len(content), at + draws.choice((1, 2, 4, 8, 64, 1024)))
            match draws.randrange(6):
                case 0 if content:
                    content[at % len(content)] ^= 1 << draws.randrange(8)
                case 1:
                    content[at:at] = content[at:end] * draws.choice((1, 2, 50))
                case 2:
                    content[at:end] = draws.choice(WORDS)
                case 3:
                    width = draws.choice((1, 2, 4, 8))
                    number = draws.choice(COUNTS) % 256**width
                    content[at : at + width] = number.to_bytes(width, draws.choice(("little", "big")))
                case 4:
                    del content[at:]
                case _:
                    source = draws.randrange(len(content) + 1)
                    content[at:at] = content[source : source + draws.choice((1, 8, 100))]
        yield bytes(content)


# --- the targets --------------------------------------------------------------------------------------------------------


def comparable(value: Any) -> Any:
    """Tensors as what compares with `==`."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    return value


def of_manifest(folder: Path) -> Any:
    found = open_prepared(folder)
    return found.identity.sha256, comparable(found.store.read(torch.arange(3))), comparable(found.split("train").label)


def of_checkpoint(path: Path) -> Any:
    return sorted(place for place, _ in read.tensors_in(read.read(path).tree))


def targets(done: Path, folder: Path) -> dict[str, Target]:
    """Every parser on files of the finished profile `done`; checkpoints of others are made in `folder`."""
    prepared, runs, records = done / "data/prepared/digits", done / "runs/isd", done / "reports/tiny/records/isd"
    params, rows, lists = done / "params.yaml", runs / "metrics.jsonl", folder / "D1.txt"
    encoder, features, old = runs / "encoder.safetensors", runs / "features.safetensors", folder / "old.safetensors"
    zipped, legacy = folder / "zip.pth", folder / "legacy.pth"
    tiny = {"conv1.weight": torch.arange(12.0).view(2, 2, 3), "bn1.running_mean": torch.ones(2)}
    torch.save(foreign.saved(tiny), zipped)
    torch.save(foreign.saved(tiny), legacy, _use_new_zipfile_serialization=False)
    names = "class names : \nn01\nn02\nTrain Images: \n/train/n01/a.JPEG\n/train/n01/b.JPEG\n/train/n02/c.JPEG\n"
    lists.write_text(names, "utf-8")
    tensors, identity = load_tensors(encoder, "encoder")  # without the hash, as files were before there was one
    save_file(tensors, old, metadata={"isd_repro": json.dumps(identity)})

    def record(path: Path, model: Any) -> Target:
        return Target(path, lambda: read_record(path, model).model_dump())

    def pages(name: str) -> Target:
        return Target(prepared / name, lambda: of_manifest(prepared), hashed=True)

    return {
        "params": Target(params, lambda: config.load(params)[0], EXIT_CONFIG),
        **{name: pages(name) for name in ("manifest.json", "images.tsv", "store.npy")},
        "header": Target(prepared / "manifest.json", lambda: manifests.read_header(prepared)),
        "list": Target(lists, lambda: parse_list(lists)),
        "pretrain record": record(records / "pretrain.json", PretrainRecord),
        "knn record": record(records / "knn.json", EvaluationRecord),
        "external record": record(done / "external.json", ExternalRecord),
        "metrics": Target(rows, lambda: tracking.read_metrics(rows)),
        "encoder": Target(encoder, lambda: comparable(load_tensors(encoder, "encoder"))),
        "features": Target(features, lambda: comparable(load_tensors(features, "features"))),
        "old encoder": Target(old, lambda: list(load_encoders(old)[0])),
        "our checkpoint": Target(encoder, lambda: len(checkpoints.inspect(encoder).tensors)),
        "torch checkpoint": Target(zipped, lambda: of_checkpoint(zipped)),
        "legacy checkpoint": Target(legacy, lambda: of_checkpoint(legacy)),
    }
