"""Provenance of a result, as every record states it: code, packages, machine and time."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from isd_repro.config.fields import Frozen


class Machine(Frozen):
    """The machine that computed a result."""

    # `AMD EPYC (AVX2)`: model, and the vector units that torch uses, which make a difference in the last bits of a sum; records
    # made before 2026-12 lack the latter.
    cpu: str
    cores: int
    threads: int
    gpu: str | None
    system: str


class Provenance(Frozen):
    """Code, packages, machine and time of a result."""

    commit: str | None  # None outside a git checkout
    dirty: bool | None  # uncommitted changes in the checkout
    source: str  # sha256 over the package's Python files
    versions: dict[str, str]
    machine: Machine
    written: str  # UTC, ISO 8601
    seconds: Annotated[float, Field(ge=0, le=1e10)]


def describe(seconds: float) -> Provenance:
    """This process's code, packages and machine."""
    import torch

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
            cpu=f"{_model_name()} ({torch.backends.cpu.get_cpu_capability()})",
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            system=f"{platform.system()} {platform.machine()}",
        ),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
    )


def shown_provenance() -> dict[str, Any]:
    """What a tracker's config says of code, packages and machine: the same for every attempt in one place."""
    return {"provenance": describe(0.0).model_dump(mode="json", exclude={"seconds", "written"})}


def remember_code() -> None:
    """Fix commit and source hash for this process, before hours pass and the checkout moves on."""
    source_hash()
    _git()


@cache
def source_hash() -> str:
    """Sha256 over names and bytes of the package's Python files."""
    package = Path(__file__).parent
    return hash_of((path.relative_to(package), path.read_bytes()) for path in sorted(package.rglob("*.py")))


def hash_of(files: Iterable[tuple[Path, bytes]]) -> str:
    """Sha256 over the names, relative to the package, and the bytes of its Python files in the order of their paths."""
    digest = hashlib.sha256()
    for path, content in files:
        digest.update(f"{path.as_posix()}\0".encode())
        digest.update(content + b"\0")
    return digest.hexdigest()


@cache
def _git() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that holds this package; a carried COMMIT file stands in for .git."""
    checkout = Path(__file__).parent.parent

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()

    try:
        said("ls-files", "--error-unmatch", "isd_repro/__init__.py")  # not a foreign repository around an installed copy
        head = said("rev-parse", "HEAD")
        # not dvc.lock, which every running stage changes
        return head, bool(said("status", "--porcelain", "--", "isd_repro", "dvc.yaml", ":(glob)**/params.yaml"))
    except (OSError, subprocess.CalledProcessError):
        carried = checkout / "COMMIT"
        return (carried.read_text("utf-8").strip(), None) if carried.is_file() else (None, None)


def git_complaint() -> str:
    """What git says where it refuses to look at this checkout, such as one of another owner; empty elsewhere."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists() or _git()[0] is not None:
        return ""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"git cannot be started ({error.strerror})"
    return " ".join(asked.stderr.split())


def _model_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
