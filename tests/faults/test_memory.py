"""Memory: the highest point of each stage, in a process of its own, at two sizes.

What grows with what is stated in docs/reliability.md; the bounds here are for the small network of these tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CODE = """
import json, re, sys
from pathlib import Path
from isd_repro import cli
import torch, torchvision, pydantic, ruamel.yaml, rich.console, rich.progress, PIL.Image, safetensors.torch
from isd_repro.evaluations import stage, knn, linear, external
from isd_repro.report import output
from isd_repro.data import prepare
from isd_repro.train import pretrain

def highest():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = highest()
sys.argv = ["isd-repro", *json.loads(sys.argv[1])]
try:
    cli.main()
except SystemExit as end:
    if end.code:
        raise
print("KiB", highest() - before)
"""
PARAMS = """\
profile: tiny
root: .
report: {title: Tiny, caption: Noise}
evaluation: {knn: {k: [1]}, linear: {protocol: short, epochs: 1, batch_size: 32, milestones: []}}
tracking: {wandb: "off"}
subsets:
  noise:
    source: {name: image-folder, root_env: ISD_TEST_ROOT, dataset: Noise}
    rule: {name: all}
    store: {channels: 3}
runs:
  isd:
    label: ISD
    backbone: {arch: resnet-narrow, width: 4, channels: 3}
    method: {name: isd, tau_student: 0.1, tau_teacher: 0.02, momentum: 0.9, bank_size: 64, heads: none}
    optim: {epochs: EPOCHS, batch_size: 32, lr: 0.05, schedule: {name: cosine}}
    data: {subset: noise, image_size: 32, view_student: {}, view_teacher: {}}
"""
SIDE = 96  # pixels; an image is 27 kB
COMMANDS = {
    "prepare": ("prepare", "noise"),
    "pretrain": ("pretrain", "isd"),
    "extract": ("extract", "isd"),
    "knn": ("knn", "isd"),
    "linear": ("linear", "isd"),
    "report": ("report",),
}


def images(root: Path, count: int) -> Path:
    """Noise: `count` train and a quarter as many val images, in two classes."""
    draw = np.random.default_rng(0)
    for split, many in (("train", count), ("val", count // 4)):
        for number in range(many):
            path = root / split / f"c{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path, compress_level=0)
    return root


def profile(folder: Path, epochs: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(PARAMS.replace("EPOCHS", str(epochs)), "utf-8")
    return folder


def peak(folder: Path, root: Path, *command: str) -> float:
    """MiB that a command takes beyond its imports; the memory of mapped files that the system may take back counts too."""
    environment = {
        **os.environ, "ISD_TEST_ROOT": str(root),
        "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    start = [sys.executable, "-c", CODE, json.dumps(command)]
    ended = subprocess.run(start, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.splitlines()[-1].split()[1]) / 1024


def peaks(tmp_path: Path, count: int, epochs: int) -> dict[str, float]:
    root = images(tmp_path / f"images{count}", count)
    folder = profile(tmp_path / f"profile{count}-{epochs}", epochs)
    return {stage: peak(folder, root, *command) for stage, command in COMMANDS.items()}


EPOCHS = 24  # MiB that may differ between two runs of one size: allocators are no clocks


@pytest.mark.slow
def test_every_stage_at_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four times as many images: 44 MB more pixels, of which no stage holds more than a part at a time."""
    small, large = peaks(tmp_path, 512, 1), peaks(tmp_path, 2048, 1)
    with capsys.disabled():
        print("\n" + "\n".join(f"{stage}: {small[stage]:.0f} MiB, {large[stage]:.0f} MiB" for stage in small))
    more = (2048 - 512) * 1.25 * SIDE * SIDE * 3 / 2**20  # MiB of pixels
    for stage in ("pretrain", "extract", "linear"):  # they map the store: its pages count while the system has room
        assert large[stage] - small[stage] < more + EPOCHS, (stage, small, large)
    for stage in ("prepare", "knn", "report"):
        assert large[stage] - small[stage] < EPOCHS, (stage, small, large)
    assert max(large.values()) < 700


@pytest.mark.slow
def test_pretraining_over_many_epochs(tmp_path: Path) -> None:
    root = images(tmp_path / "images", 64)
    sizes = {}
    for epochs in (10, 1000):
        folder = profile(tmp_path / str(epochs), epochs)
        peak(folder, root, "prepare", "noise")
        sizes[epochs] = peak(folder, root, "pretrain", "isd")
    assert sizes[1000] - sizes[10] < EPOCHS, sizes
