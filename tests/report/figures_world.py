"""A small profile with encoders and features of four runs, and classes with hostile names."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.config.params import BackboneConfig
from isd_repro.data.manifests import Image, Manifest
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.evaluations.stage import extract
from isd_repro.report.image_figures import Asked, figures
from tests.evaluations.test_stages import SIDE, write_encoder, write_prepared

CLASSES = ("'><script>alert(1)</script>", "[bold]bee & <co>", "cat")  # sorted, as strangers name folders
TRAIN, QUERY = 9, 6  # images a class
NARROW = BackboneConfig(arch="resnet-narrow", width=2, channels=1)
PIXELS = BackboneConfig(arch="pixels", channels=1)
PARAMS = """\
profile: tiny
report: {title: Tiny, caption: A profile for tests}
tracking: {wandb: "off"}
subsets:
  toy: {source: {name: digits, dataset: "toy <i>"}, rule: {name: all}, store: {channels: 1}}
runs:
  isd: &isd
    label: "A run <b>"
    backbone: {arch: resnet-narrow, width: 2, channels: 1}
    optim: {epochs: 1, batch_size: 4, lr: 0.1, schedule: {name: cosine}}
    data: {subset: toy, image_size: 8, crop_ratio: 1.0, mean: [0.0], std: [1.0], view_student: {}, view_teacher: {}}
    method: {name: isd, tau_student: 0.1, tau_teacher: 0.02, momentum: 0.9, bank_size: 64, heads: none}
  isd-mlp:
    <<: *isd
    method: {name: isd, tau_student: 0.1, tau_teacher: 0.02, momentum: 0.9, bank_size: 8, heads: mlp}
  moco:
    <<: *isd
    method: {name: moco, tau: 0.2, momentum: 0.9, bank_size: 64, dim: 16}
  raw:
    <<: *isd
    backbone: {arch: pixels, channels: 1}
    method: {name: supervised}
    optim: {epochs: 0, batch_size: 4, lr: 0.1, schedule: {name: cosine}}
"""


@dataclass
class World:
    layout: Layout
    pixels: Tensor
    manifest: Manifest

    def draw(self, run: str, **options: Any) -> dict[str, Any]:
        """What figures.json holds."""
        params, layout = config.load(self.layout.file)
        figures(run, params, layout, Asked(**options), Console(file=io.StringIO()))
        found: dict[str, Any] = json.loads((self.folder(run) / "figures.json").read_text("utf-8"))
        return found

    def folder(self, run: str) -> Path:
        return self.layout.folder / "runs" / run / "figures"

    def files(self, run: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder(run).iterdir())}

    def rows(self, run: str, encoder: str) -> Tensor:
        """Unit features of every image straight from its bytes, float64."""
        net = load_encoders(self.layout.encoder(run))[0][encoder]
        with torch.inference_mode():
            found = net(self.pixels.float() / 255)  # the evaluation's view of an image of its own size is the image
        return torch.nn.functional.normalize(found.double(), dim=1)


def make_manifest() -> Manifest:
    images = [Image("train", cls, f'{i}".png', f"{at}-train-{i}") for at, cls in enumerate(CLASSES) for i in range(TRAIN)]
    images += [Image("val", cls, f"{i}.png", f"{at}-val-{i}") for at, cls in enumerate(CLASSES) for i in range(QUERY)]
    cut = TRAIN * len(CLASSES)
    train = np.arange(cut, dtype=np.int64)
    query = np.arange(cut, len(images), dtype=np.int64)
    search = train[2:]  # so that a position in a split is no position in the store
    return Manifest("toy <i>", "toy", {"name": "toy"}, CLASSES, (), tuple(images), train, search, query)


def make_world(tmp_path: Path) -> World:
    """Prepared images, encoders and features of every run."""
    draw = torch.Generator().manual_seed(0)
    manifest = make_manifest()
    centre = 60 + 130 * torch.rand(len(CLASSES), 1, SIDE, SIDE, generator=draw)
    noise = 40 * torch.randn(len(manifest.images), 1, SIDE, SIDE, generator=draw)
    pixels = (centre[torch.from_numpy(manifest.labels)] + noise).clamp(0, 255).to(torch.uint8)
    (tmp_path / "params.yaml").write_text(PARAMS, "utf-8")
    params, layout = config.load(tmp_path / "params.yaml")
    write_prepared(layout.prepared("toy"), manifest, pixels)
    for run in params.runs:
        both = run != "raw"
        encoders = ("student", "teacher") if both else ("student",)
        write_encoder(layout.encoder(run), NARROW if both else PIXELS, encoders, manifest.sha256)
        extract(run, params, layout, Console(file=io.StringIO()))
    return World(layout, pixels, manifest)
