"""Files that describe themselves: encoders, features and records, written whole or not at all.

Encoders and features are safetensors with a JSON identity in the header and no time or machine in it, so equal results are
equal bytes. Records are small JSON files that are committed; they carry time, machine and commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isd_repro.config.params import Frozen, Many, Words
from isd_repro.config.reader import fingerprint
from isd_repro.provenance import Machine as Machine
from isd_repro.provenance import Provenance as Provenance
from isd_repro.provenance import provenance as provenance
from isd_repro.provenance import remember_code as remember_code
from isd_repro.provenance import shown_provenance as shown_provenance
from isd_repro.provenance import source_hash as source_hash
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import write_atomic as write_atomic  # named here too, for those who write what they identify

FORMAT = 1
KEY = "isd_repro"
_DIGEST = "content_sha256"
MAX_RECORD = 64 * 2**20  # bytes of a record that is read; one of ImageNet's 50,000 queries has under 1 MB
MAX_QUERIES = 10_000_000  # of a manifest, so that packed predictions unpack to 20 MB at most
NAME = r"^[a-z0-9][a-z0-9.-]*$"  # of a record's folder, as runs are named

# --- files ------------------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; `DataError` where the file is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that makes it; `dvc repro` runs all that are needed")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path, folder: Path | None = None) -> str:
    """As `sha256_file` for large files: hashed once, and again only where size, times or inode have changed since.

    What was found is kept in `folder`; without one, or where it cannot be written, it is kept for this process.
    """
    found = path.stat()
    identity = [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    if folder is None:
        return _hashed(path, *identity)
    memory = folder / f"{fingerprint({'path': identity[0]})}.json"
    with suppress(OSError, ValueError, KeyError, RecursionError):
        kept = json.loads(memory.read_bytes())
        if isinstance(kept, dict) and kept.get("file") == identity:
            return str(kept["sha256"])
    digest = _hashed(path, *identity)
    with suppress(OSError):  # a torn line is no JSON, and then the file is hashed again
        folder.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps({"file": identity, "sha256": digest}), "utf-8")
    return digest


@cache
def _hashed(path: Path, *_identity: str | int) -> str:
    return sha256_file(path)


# --- tensors with an identity -----------------------------------------------------------------------------------------


def save_tensors(
    path: Path, kind: Literal["encoder", "features"], tensors: Mapping[str, Tensor], identity: Mapping[str, Any]
) -> None:
    """Write named tensors and their identity; equal input gives equal bytes."""
    said = {"format": FORMAT, "kind": kind, **identity}
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    text = json.dumps({**said, _DIGEST: _digest(said, ordered)}, sort_keys=True, allow_nan=False)
    write_atomic(path, save(ordered, metadata={KEY: text}))


def _digest(identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over an identity and over name, type, shape and bytes of every tensor: safetensors itself has no checksum."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tensors(path: Path, kind: Literal["encoder", "features"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: the file is missing, damaged, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that makes it; `dvc repro` runs all that are needed")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path}: damaged or not a safetensors file ({error})", "delete it and run its stage again") from error
    return tensors, identified(path, kind, metadata, tensors)


def identified(
    path: Path, kind: Literal["encoder", "features"], metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The identity in a file's metadata; `DataError` as `load_tensors` where it is none or the tensors are not its own."""
    try:
        identity = json.loads(metadata.get(KEY) or "null")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: damaged or not a safetensors file ({error})", "delete it and run its stage again") from error
    identity = identity if isinstance(identity, dict) else {}
    if identity.get("kind") != kind or identity.get("format") != FORMAT:
        found = f"kind {identity.get('kind')!r} format {identity.get('format')!r}" if identity else "no identity"
        raise DataError(f"{path}: expected kind {kind!r} format {FORMAT}, found {found}", "delete it and run its stage again")
    stated = identity.pop(_DIGEST, None)  # absent in files from before there was one
    if stated is not None and stated != _digest(identity, tensors):
        raise DataError(f"{path}: damaged: its content has another hash than it states", "delete it and run its stage again")
    return identity


# --- records ----------------------------------------------------------------------------------------------------------


Count = Annotated[int, Field(ge=0, lt=2**53)]  # a float holds it exactly
Measured = Annotated[float, Field(ge=-1e30, le=1e30)]  # differences and squares of such values stay finite


class ManifestIdentity(Frozen):
    """What a record says of the images: enough to draw them again and to tell two sets apart."""

    sha256: str  # layout-independent identity of all images and roles
    dataset: Words  # public name, never a path
    subset: Words  # key in params.yaml
    rule: dict[str, Any]
    classes: Many[Words]
    large: Many[Words]  # empty where the subset is balanced
    train: Count  # unlabelled training images
    search: Count  # labelled search set
    query: Annotated[int, Field(ge=0, le=MAX_QUERIES)]  # validation queries


class Score(Frozen):
    """One number: `top1` percent of `n` queries of a group."""

    encoder: Literal["student", "teacher"]
    # "1-NN", "20-NN"; "linear-" last, best or clean, "few-10pct-" last or best, these with "-top5", too; "transfer"
    metric: Annotated[
        str, Field(pattern=r"^([1-9][0-9]{0,8}-NN|(linear-(last|best|clean)|few-[0-9.]{1,9}pct-(last|best))(-top5)?|transfer)$")
    ]
    group: Literal["all", "rare", "large"]
    correct: Count
    n: Count

    @property
    def top1(self) -> float:
        """Percent, 0-100."""
        return 100.0 * self.correct / self.n


class Attempt(Frozen):
    """One process's work on a run."""

    started: str  # UTC, ISO 8601
    seconds: float  # of a killed one: up to its last resume point
    first_step: int  # steps that were done before it
    last_step: int  # steps that were done after it; of a killed one, in its last resume point
    outcome: Literal["finished", "stopped", "failed", "killed"]
    device: str


class PretrainRecord(Frozen):
    """What pretraining says of itself."""

    format: Literal[1] = 1
    kind: Literal["pretrain"] = "pretrain"
    profile: Words
    run: Words
    label: Words
    notes: Many[Words]
    config: dict[str, Any]  # the groups that the fingerprint covers, defaults included
    fingerprint: str
    manifest: ManifestIdentity
    encoder_sha256: str
    encoders: Many[str]
    steps: Count
    curve: Many[dict[str, Measured]]  # one row per epoch: epoch, lr, loss and the method's metrics
    sources: Many[str]  # source hashes of every session that trained; more than one after a resume across versions
    attempts: Many[Attempt] = ()  # every process that worked on the run, in order
    warnings: Many[Words] = ()  # what a reader of the numbers should know: a collapse, a resume under other code
    provenance: Provenance


class EvaluationRecord(Frozen):
    """What an evaluating stage says: scores, and the predictions that the scores can be recomputed from."""

    format: Literal[1] = 1
    kind: Literal["knn", "linear", "few_label", "transfer"]
    profile: Words
    run: Words
    protocol: Words
    settings: dict[str, Any]
    manifest: ManifestIdentity
    encoder_sha256: str
    features_sha256: str | None
    scores: Many[Score]
    labels: str  # packed class index of every query
    predictions: dict[str, str]  # "<encoder>/<metric>" -> packed predicted class of every query
    provenance: Provenance


class TrajectoryPoint(Frozen):
    """Scores of the encoders that were kept after an epoch."""

    epoch: Annotated[int, Field(ge=1)]
    encoder_sha256: str  # of the snapshot's file; the last point's is the run's encoder
    scores: Annotated[Many[Score], Field(min_length=1)]


class TrajectoryRecord(Frozen):
    """What `trajectory` says: nearest-neighbour scores over a run's training, without predictions."""

    format: Literal[1] = 1
    kind: Literal["trajectory"] = "trajectory"
    profile: Words
    run: Words
    protocol: Words
    settings: dict[str, Any]
    manifest: ManifestIdentity
    points: Annotated[Many[TrajectoryPoint], Field(min_length=1)]
    provenance: Provenance


class ExternalRecord(Frozen):
    """What `evaluate` says of a checkpoint that no run of ours need have made: the file, and its evaluations."""

    format: Literal[1] = 1
    kind: Literal["external"] = "external"
    name: Annotated[str, Field(pattern=NAME)]  # of the record's folder
    label: Words  # the row's name in tables
    file: Words  # base name of the checkpoint
    sha256: str  # of its bytes
    layout: Words  # the rule that recognised it
    arch: Words
    teacher_bn: Literal["own", "student"]  # whose BatchNorm statistics a teacher ran with
    transform: dict[str, Any]
    command: Words  # without folders, which differ from machine to machine
    warnings: Many[Words] = ()  # what a reader of the numbers should know: a collapse
    evaluations: Annotated[Many[EvaluationRecord], Field(min_length=1)]
    provenance: Provenance


Record = TypeVar("Record", bound=Frozen)


def pack_labels(values: Tensor) -> str:
    """Class indices below 65,536 as text: little-endian uint16, zlib, base64."""
    raw = values.cpu().numpy().astype("<u2").tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def unpack_labels(text: str, most: int = MAX_QUERIES) -> Tensor:
    """Inverse of `pack_labels`, as int64; `ValueError` where the text is damaged or more than `most`, which are not unpacked."""
    packed = zlib.decompressobj()
    raw = packed.decompress(base64.b64decode(text), 2 * most + 1)
    if len(raw) > 2 * most:
        raise ValueError(f"more than {most} entries")
    if not packed.eof:
        raise ValueError("cut short")
    return torch.from_numpy(np.frombuffer(raw, dtype="<u2").astype(np.int64))


def score(
    encoder: Literal["student", "teacher"], metric: str, predicted: Tensor, label: Tensor, groups: Mapping[str, Tensor]
) -> list[Score]:
    """Scores of every group that has queries; `groups` maps a name to a boolean mask over the queries."""
    hit = predicted == label
    rows = []
    for group, mask in groups.items():
        if bool(mask.any()):
            rows.append(
                Score.model_validate(
                    {"encoder": encoder, "metric": metric, "group": group, "correct": int(hit[mask].sum()), "n": int(mask.sum())}
                )
            )
    return rows


def write_record(path: Path, record: Frozen) -> None:
    """Write a record or one part of a run's, with stable key order."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def read_record(path: Path, model: type[Record]) -> Record:
    """Read one part of a record; `DataError` names the file and every problem."""
    if not path.is_file():
        raise DataError(f"{path}: no such record, or no file", "run the stage that makes it")
    if path.stat().st_size > MAX_RECORD:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_RECORD:,} are read", "no record is as long")
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(f"{path}: not a {model.__name__}: {problems}", "delete it and run its stage again") from error
