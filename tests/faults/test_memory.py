"""Memory: the highest point of each stage, in a process of its own, at two sizes."""

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
ROOM = 24  # MiB that may differ between two runs of one size: allocators are no clocks
STAGES = {"prepare": "noise", "pretrain": "isd", "extract": "isd", "knn": "isd", "linear": "isd", "report": ""}


def images(root: Path, count: int) -> Path:
    """Noise: `count` train and a quarter as many val images, in two classes."""
    draw = np.random.default_rng(0)
    for split, many in (("train", count), ("val", count // 4)):
        for number in range(many):
            path = root / split / f"c{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path, compress_level=0)
    return root


def peak(folder: Path, root: Path, *command: str) -> float:
    """MiB that a command takes beyond its imports; the memory of mapped files that the system may take back counts too."""
    arenas = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    start = [sys.executable, "-c", CODE, json.dumps(command)]
    environment = {**os.environ, "ISD_TEST_ROOT": str(root), **arenas}
    ended = subprocess.run(start, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.splitlines()[-1].split()[1]) / 1024


def peaks(folder: Path, root: Path, epochs: int, *stages: str) -> dict[str, float]:
    folder.mkdir()
    (folder / "params.yaml").write_text(PARAMS.replace("EPOCHS", str(epochs)), "utf-8")
    return {stage: peak(folder, root, stage, *STAGES[stage].split()) for stage in stages}


@pytest.mark.slow
def test_every_stage_at_two_sizes(tmp_path: Path) -> None:
    """Four times as many images: 44 MB more pixels, of which no stage holds more than a part at a time."""
    small, large = (peaks(tmp_path / f"of{count}", images(tmp_path / str(count), count), 1, *STAGES) for count in (512, 2048))
    more = (2048 - 512) * 1.25 * SIDE * SIDE * 3 / 2**20  # MiB of pixels
    for stage in STAGES:  # some map the store: its pages count while the system has room
        room = ROOM + (more if stage in {"pretrain", "extract", "linear"} else 0)
        assert large[stage] - small[stage] < room, (stage, small, large)
    assert max(large.values()) < 700


@pytest.mark.slow
def test_pretraining_over_many_epochs(tmp_path: Path) -> None:
    root = images(tmp_path / "images", 64)
    few, many = (peaks(tmp_path / str(epochs), root, epochs, "prepare", "pretrain")["pretrain"] for epochs in (10, 100))
    assert many - few < ROOM, (few, many)
