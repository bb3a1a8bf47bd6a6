"""Files that describe themselves: encoders, features and records, written whole or not at all.

Encoders and features are safetensors with a JSON identity in the header and no time or machine in it, so equal results are
equal bytes. Records are small JSON files that are committed; they carry time, machine and commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from isd_repro.errors import DataError
from isd_repro.params import Frozen

FORMAT = 1
_KEY = "isd_repro"
NAME = r"^[a-z0-9][a-z0-9.-]*$"  # of a record's folder, as runs are named

# --- writing --------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, a kill or a full disk sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; `DataError` where the file is missing."""
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that makes it; `dvc repro` runs all that are needed")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- tensors with an identity -----------------------------------------------------------------------------------------


def save_tensors(
    path: Path, kind: Literal["encoder", "features"], tensors: Mapping[str, Tensor], identity: Mapping[str, Any]
) -> None:
    """Write named tensors and their identity; equal input gives equal bytes."""
    header = {_KEY: json.dumps({"format": FORMAT, "kind": kind, **identity}, sort_keys=True, allow_nan=False)}
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_atomic(path, save(ordered, metadata=header))


def load_tensors(path: Path, kind: Literal["encoder", "features"]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        DataError: the file is missing, damaged, of another kind, or of a newer format.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the stage that makes it; `dvc repro` runs all that are needed")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            identity = json.loads(text) if text else None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise DataError(f"{path}: damaged or not a safetensors file ({error})", "delete it and run its stage again") from error
    if identity is None or identity.get("kind") != kind or identity.get("format") != FORMAT:
        found = "no identity" if identity is None else f"kind {identity.get('kind')!r} format {identity.get('format')!r}"
        raise DataError(f"{path}: expected kind {kind!r} format {FORMAT}, found {found}", "delete it and run its stage again")
    return tensors, identity


# --- records ----------------------------------------------------------------------------------------------------------


class ManifestIdentity(Frozen):
    """What a record says of the images: enough to draw them again and to tell two sets apart."""

    sha256: str  # layout-independent identity of all images and roles
    dataset: str  # public name, never a path
    subset: str  # key in params.yaml
    rule: dict[str, Any]
    classes: tuple[str, ...]
    large: tuple[str, ...]  # empty where the subset is balanced
    train: int  # unlabelled training images
    search: int  # labelled search set
    query: int  # validation queries


class Machine(Frozen):
    """Where a result was made."""

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    system: str


class Provenance(Frozen):
    """Who could repeat a result: code, packages, machine, time."""

    commit: str | None  # None outside a git checkout
    dirty: bool | None  # uncommitted changes in the checkout
    source: str  # sha256 over the package's Python files
    versions: dict[str, str]
    machine: Machine
    written: str  # UTC, ISO 8601
    seconds: float


class Score(Frozen):
    """One number: `top1` percent of `n` queries of a group."""

    encoder: Literal["student", "teacher"]
    metric: str  # "1-NN", "20-NN", "linear-last", "linear-best", "linear-clean", and these three with "-top5"
    group: Literal["all", "rare", "large"]
    correct: int
    n: int

    @property
    def top1(self) -> float:
        """Percent, 0-100."""
        return 100.0 * self.correct / self.n


class PretrainRecord(Frozen):
    """What pretraining says of itself."""

    format: Literal[1] = 1
    kind: Literal["pretrain"] = "pretrain"
    profile: str
    run: str
    label: str
    notes: tuple[str, ...]
    config: dict[str, Any]  # the groups that the fingerprint covers, defaults included
    fingerprint: str
    manifest: ManifestIdentity
    encoder_sha256: str
    encoders: tuple[str, ...]
    steps: int
    curve: tuple[dict[str, float], ...]  # one row per epoch: epoch, lr, loss and the method's metrics
    sources: tuple[str, ...]  # source hashes of every session that trained; more than one after a resume across versions
    provenance: Provenance


class EvaluationRecord(Frozen):
    """What `knn` and `linear` say: scores, and the predictions that the scores can be recomputed from."""

    format: Literal[1] = 1
    kind: Literal["knn", "linear"]
    profile: str
    run: str
    protocol: str
    settings: dict[str, Any]
    manifest: ManifestIdentity
    encoder_sha256: str
    features_sha256: str | None
    scores: tuple[Score, ...]
    labels: str  # packed class index of every query
    predictions: dict[str, str]  # "<encoder>/<metric>" -> packed predicted class of every query
    provenance: Provenance


class ExternalRecord(Frozen):
    """What `evaluate` says of a checkpoint that no run of ours need have made: the file, and its evaluations."""

    format: Literal[1] = 1
    kind: Literal["external"] = "external"
    name: Annotated[str, Field(pattern=NAME)]  # of the record's folder
    label: str  # the row's name in tables
    file: str  # base name of the checkpoint
    sha256: str  # of its bytes
    layout: str  # the rule that recognised it
    arch: str
    teacher_bn: Literal["own", "student"]  # whose BatchNorm statistics a teacher ran with
    transform: dict[str, Any]
    command: str  # without folders, which differ from machine to machine
    evaluations: Annotated[tuple[EvaluationRecord, ...], Field(min_length=1)]
    provenance: Provenance


Record = TypeVar("Record", PretrainRecord, EvaluationRecord, ExternalRecord)


def pack_labels(values: Tensor) -> str:
    """Class indices below 65,536 as text: little-endian uint16, zlib, base64."""
    raw = values.cpu().numpy().astype("<u2").tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def unpack_labels(text: str) -> Tensor:
    """Inverse of `pack_labels`, as int64."""
    raw = zlib.decompress(base64.b64decode(text))
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


def write_record(path: Path, record: PretrainRecord | EvaluationRecord | ExternalRecord) -> None:
    """Write a record or one part of a run's, with stable key order."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def read_record(path: Path, model: type[Record]) -> Record:
    """Read one part of a record; `DataError` names the file and every problem."""
    if not path.is_file():
        raise DataError(f"{path}: no such record", "run the stage that makes it")
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(f"{path}: not a {model.__name__}: {problems}", "delete it and run its stage again") from error


# --- provenance -------------------------------------------------------------------------------------------------------


def provenance(seconds: float) -> Provenance:
    """Describe this process's code, packages and machine."""
    commit, dirty = _git()
    return Provenance(
        commit=commit,
        dirty=dirty,
        source=source_hash(),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
        },
        machine=Machine(
            cpu=_cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            system=f"{platform.system()} {platform.machine()}",
        ),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )


def remember_code() -> None:
    """Fix commit and source hash for this process, before hours pass and the checkout moves on."""
    source_hash()
    _git()


@cache
def source_hash() -> str:
    """Sha256 over names and bytes of the package's Python files."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _git() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that holds this package; a carried COMMIT file stands in for .git."""
    checkout = Path(__file__).parent.parent
    try:
        ours = [
            "git",
            "ls-files",
            "--error-unmatch",
            "isd_repro/artifacts.py",
        ]  # not a foreign repository around an installed copy
        subprocess.run(ours, cwd=checkout, capture_output=True, check=True)
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()
        paths = ["isd_repro", "dvc.yaml", ":(glob)**/params.yaml"]  # not dvc.lock, which every running stage changes
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", *paths], cwd=checkout, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        carried = checkout / "COMMIT"
        return (carried.read_text("utf-8").strip(), None) if carried.is_file() else (None, None)
    return head, bool(status.stdout.strip())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
