"""The whole pipeline at the size of seconds, command by command in this process, and what each command must leave behind."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from isd_repro import cli, tracking
from tests.faults import world

SHORT = (
    "efficiency: {log",
    "evaluation: {knn: {k: [1, 3]}, linear: {protocol: short, epochs: 2, batch_size: 8, milestones: [1]}}\nefficiency: {log",
)
STAGES: dict[str, tuple[str, ...]] = {
    "prepare": ("prepare", "digits"),
    "pretrain": ("pretrain", "isd"),
    "extract": ("extract", "isd"),
    "knn": ("knn", "isd"),
    "linear": ("linear", "isd"),
    "report": ("report",),
}
WHEN = {"provenance", "sources", "attempts"}  # keys of a record that say when, where and how often
OUTPUTS = {
    "prepare": ("data/prepared/digits",),
    "pretrain": ("runs/isd/encoder.safetensors", "runs/isd/metrics.jsonl", "reports/tiny/records/isd/pretrain.json"),
    "extract": ("runs/isd/features.safetensors",),
    "knn": ("reports/tiny/records/isd/knn.json",),
    "linear": ("reports/tiny/records/isd/linear.json",),
    "report": ("reports/tiny/tables",),
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(folder: Path, *arguments: str) -> Result:
    """The command line in this process; an exception that no user may see is an error of the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr("sys.argv", ["isd-repro", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def refused(result: Result, *words: str, code: int = 4) -> None:
    """The documented exit code, one message with a hint, and no traceback."""
    assert result.code == code, result
    assert result.err.startswith("error: ") or "\nerror: " in result.err, result.err
    assert "hint: " in result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, (word, result.err)


def without(folder: Path, stage: str) -> None:
    """Remove what a stage makes, as DVC does before it starts the stage."""
    for name in OUTPUTS[stage]:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def files(folder: Path) -> dict[str, bytes]:
    """Every file that a stage writes as output, hidden ones included; locks, memory, resume state and logs are none."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for name in ("data", "runs", "reports")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and ".log" not in path.parts
    }


def logs(folder: Path) -> set[str]:
    """Names of the rows and pictures that stages keep for W&B, each of which must be sound: a torn last line at most."""
    found = set()
    for path in (folder / "runs" / ".log").rglob("*"):
        if path.is_dir():
            continue
        found.add(path.relative_to(folder).as_posix())
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.name == "metrics.jsonl":
            tracking.read_metrics(path)
    return found


def meaning(found: dict[str, bytes]) -> dict[str, Any]:
    """Files without what differs from one run to the next: time, machine, speed, the process's highest memory."""
    plain: dict[str, Any] = {}
    for name, content in found.items():
        if "/records/" in name:
            plain[name] = {key: value for key, value in json.loads(content).items() if key not in WHEN}
        elif name.endswith("metrics.jsonl"):
            plain[name] = [world.plain(json.loads(line)) for line in content.decode().splitlines()]
        else:
            plain[name] = content
    return plain


@contextmanager
def small_disk(folder: Path, size: int, names: int = 0) -> Iterator[Path]:
    """A file system of its own in memory, of so many bytes and, if not 0, files; skipped where mounting is not allowed."""
    folder.mkdir()
    start = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={names}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(start, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def complete(folder: Path) -> None:
    """Run every stage."""
    if "\nevaluation:" not in world.PARAMS:
        world.edit(folder, SHORT)
    for stage, command in STAGES.items():
        if stage != "prepare":
            result = call(folder, *command)
            assert result.code == 0, result
