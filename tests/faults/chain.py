"""The whole pipeline at the size of seconds, command by command in this process, and what each command must leave behind."""

from __future__ import annotations

import atexit
import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from isd_repro import cli, tracking
from tests.faults import world

EVALUATED = """\
evaluation: {knn: {k: [1, 3]}, linear: {protocol: short, epochs: 2, batch_size: 8, milestones: [1]}}
linear_runs: [isd]
efficiency: {log"""
STAGES: dict[str, tuple[str, ...]] = {
    "prepare": ("prepare", "digits"),
    "pretrain": ("pretrain", "isd"),
    "extract": ("extract", "isd"),
    "knn": ("knn", "isd"),
    "linear": ("linear", "isd"),
    "report": ("report",),
}
OUTPUTS = {
    "prepare": ("data/prepared/digits",),
    "pretrain": ("runs/isd/encoder.safetensors", "runs/isd/metrics.jsonl", "reports/tiny/records/isd/pretrain.json"),
    "extract": ("runs/isd/features.safetensors",),
    "knn": ("reports/tiny/records/isd/knn.json",),
    "linear": ("reports/tiny/records/isd/linear.json",),
    "report": ("reports/tiny/tables",),
}
EVALUATE = ("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--k", "1")


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


def complete(folder: Path) -> None:
    """Run every stage after `prepare`."""
    world.edit(folder, ("efficiency: {log", EVALUATED))
    for stage, command in STAGES.items():
        if stage != "prepare":
            result = call(folder, *command)
            assert result.code == 0, result


@cache
def finished() -> Path:
    """A profile whose every stage has run, for all tests of a session: to be copied, not to be changed."""
    root = tempfile.mkdtemp(prefix="isd-finished-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(root) / "profile"
    folder.mkdir()
    (folder / "params.yaml").write_text(world.PARAMS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        assert call(folder, "prepare", "digits").code == 0
        complete(folder)
    return folder


def without(folder: Path, stage: str) -> None:
    """Remove what a stage makes, as DVC does before it starts the stage."""
    for name in OUTPUTS[stage]:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def files(folder: Path) -> dict[str, Any]:
    """Every file that a stage writes as output, hidden ones included, without what varies; locks, state and logs are none."""
    return {
        name: content
        for name, content in world.tree(folder).items()
        if name.startswith(("data/", "runs/", "reports/")) and "/.log/" not in name and not name.endswith("/")
    }


def logs(folder: Path) -> set[str]:
    """Names of the rows and pictures that stages keep for W&B, each of which must be sound: a torn last line at most."""
    found = {path for path in (folder / "runs" / ".log").rglob("*") if path.is_file()}
    for path in found:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.name == "metrics.jsonl":
            tracking.read_metrics(path)
    return {path.relative_to(folder).as_posix() for path in found}


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
