"""A profile of 80 digits and one ISD run of seconds, ways to train it, and what may differ between two attempts at the same."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.records import PretrainRecord, read_record
from isd_repro.runtime import files
from isd_repro.train import loop
from isd_repro.train.pretrain import pretrain

ROOT = Path(__file__).parents[2]
PARAMS = """\
profile: tiny
root: .
report: {title: Tiny, caption: A profile for tests}
efficiency: {log_every: 2, checkpoint_every: 1}
tracking: {wandb: "off"}
subsets:
  digits:
    source: {name: digits, dataset: MNIST}
    rule: {name: balanced, per_class: 8, seed: 0}
    search_per_class: 2
    query_per_class: 2
    store: {channels: 1}
runs:
  isd:
    label: ISD
    backbone: {arch: resnet-narrow, width: 4, channels: 1}
    method:
      name: isd
      tau_student: 0.1
      tau_teacher: 0.02
      momentum: 0.9
      bank_size: 32
      heads: none
    optim:
      epochs: 3
      batch_size: 16
      lr: 0.05
      schedule: {name: cosine}
    data:
      subset: digits
      image_size: 20
      crop_ratio: 1.0
      mean: [0.13]
      std: [0.31]
      view_student: {crop_min: 0.4, flip: 0.0}
      view_teacher: {crop_min: 0.4, flip: 0.0}
    numerics: {seed: 0, bn_groups: 2, precision: float32}
"""


def layout_of(folder: Path) -> Layout:
    return config.load(folder / "params.yaml")[1]


def outputs(folder: Path) -> dict[str, Path]:
    layout = layout_of(folder)
    return {
        "encoder": layout.encoder("isd"),
        "metrics": layout.metrics("isd"),
        "record": layout.record("isd", "pretrain"),
    }


def record(folder: Path) -> PretrainRecord:
    return read_record(outputs(folder)["record"], PretrainRecord)


def encoder(folder: Path) -> bytes:
    return outputs(folder)["encoder"].read_bytes()


def states(folder: Path) -> list[Path]:
    """Folders of unfinished work."""
    found = sorted((folder / ".state").iterdir()) if (folder / ".state").is_dir() else []
    return [path for path in found if path.name not in ("verified", "dvc")]


def written(folder: Path) -> set[str]:
    """Every file below the folders that a stage writes its outputs to, hidden ones included; rows and pictures for W&B aside."""
    return {
        path.relative_to(folder).as_posix()
        for name in ("runs", "reports")
        for path in (folder / name).rglob("*")
        if path.is_file() and ".log" not in path.parts
    }


LONGER = ("epochs: 3", "epochs: 24")  # a signal to a launcher takes some of them to arrive
COMPLETE = {"runs/isd/encoder.safetensors", "runs/isd/metrics.jsonl", "reports/tiny/records/isd/pretrain.json"}


def edit(folder: Path, *changes: tuple[str, str]) -> None:
    path = folder / "params.yaml"
    text = path.read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the parameters"
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def train(folder: Path) -> str:
    """The stage itself, in this process; what it says."""
    params, layout = config.load(folder / "params.yaml")
    text = io.StringIO()
    pretrain("isd", params, layout, Console(file=text, force_terminal=False, width=200))
    return text.getvalue()


# --- what may differ between two attempts at the same -------------------------------------------------------------------


_VARIES = {"provenance", "sources", "seconds", "images_per_second", "memory_mib", "attempts"}


def plain(content: Any) -> Any:
    """JSON without what says when, where and how long."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key not in _VARIES}
    return [plain(value) for value in content] if isinstance(content, list) else content


def tree(folder: Path) -> dict[str, Any]:
    """Every file and empty folder below a folder by path: bytes; JSON without what varies; of a lock only that it is there.

    The memory of hashed stores is left out: it says what was read, and a stage that stops early has it, too.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if ".state/verified" in name:
            continue
        if path.is_dir():
            found |= {} if any(path.iterdir()) else {f"{name}/": None}
        else:
            found[name] = parsed(path, path.read_bytes())
    return found


def parsed(path: Path, content: bytes) -> Any:
    """A file's content without what varies; content that should be JSON and is not stays as it is."""
    if path.name == "lock":
        return None
    try:
        if path.suffix == ".json":
            return plain(json.loads(content))
        if path.suffix == ".jsonl":
            return [plain(json.loads(line)) for line in content.splitlines()]
    except ValueError:  # of the decoding, or of the JSON
        pass
    return content


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Paths that one has and the other lacks, or whose contents differ."""
    return sorted(name for name in {*ours, *theirs} if name not in ours or name not in theirs or ours[name] != theirs[name])


# --- the end of a process ------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The end of a process, as far as one process can play it."""


def crash_at(patch: pytest.MonkeyPatch, count: int, *, after: bool = False) -> None:
    """End at the given write of a checkpoint or output, before or after it lands."""
    before_write, after_write, seen, due = files._remove_leftovers, files._sync_folder, 0, False

    def begin(path: Path) -> None:
        nonlocal seen, due
        counts = path.suffix == ".pt" or not {".state", ".log"} & set(path.parts)
        seen += counts
        due = counts and seen == count
        if due and not after:
            raise Crash
        before_write(path)

    def end(folder: Path) -> None:
        after_write(folder)
        if due and after:
            raise Crash

    patch.setattr(files, "_remove_leftovers", begin)
    patch.setattr(files, "_sync_folder", end)


def stopped_at(folder: Path, write: int, *, after: bool = False) -> Path:
    """Train up to some whole-file write, crash before or after it, and give the state folder."""
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, write, after=after)
        with pytest.raises(Crash):
            train(folder)
    (state,) = states(folder)
    return state


def at_step(patch: pytest.MonkeyPatch, step: int, call: Callable[[], object]) -> None:
    """Call something in the middle of a step, counted from 1 in this process."""
    real, count = loop._set_lr, iter(range(1, 10**9))

    def set_lr(*arguments: Any) -> None:
        if next(count) == step:
            call()
        real(*arguments)

    patch.setattr(loop, "_set_lr", set_lr)


# --- real processes -----------------------------------------------------------------------------------------------------


@contextmanager
def process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`isd-repro pretrain isd` as a process of its own, with one thread; ended with the block."""
    start = [sys.executable, "-c", "from isd_repro.cli import main; main()", "pretrain", "isd"]
    environment = {**os.environ, "COLUMNS": "200"}
    with subprocess.Popen(start, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for_epochs(running: subprocess.Popen[str], count: int) -> list[str]:
    """Lines of standard error up to the given number of finished epochs, or to the process's end."""
    assert running.stderr is not None
    lines: list[str] = []
    while sum(" epoch " in line for line in lines) < count:
        line = running.stderr.readline()
        if not line:
            break
        lines.append(line)
    return lines
