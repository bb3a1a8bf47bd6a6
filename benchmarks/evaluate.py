"""`isd-repro evaluate` on a folder of JPEG files against the plain script that people write for it.

The plain script loads the checkpoint into torchvision's network, reads both splits by ImageFolder with Resize, CenterCrop and
Normalize on 8-bit images, passes them forward in batches of 64, and takes the nearest of 1 and 20 by a product and `topk`. Ours
also hashes every file, accounts for every tensor of the checkpoint, resizes in float32, gives every image the same bits however
many there are, and writes features and record. Files are those of the subject `loader`; half of them are train, half are val.

The checks compare features: of each image with those of the image alone, bit for bit, and of all images with the plain script's.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

from benchmarks import harness, loader
from isd_repro import checkpoints
from isd_repro.data.eval_loader import Frame, centred
from isd_repro.data.image_folder import open_folder
from isd_repro.evaluations.external import IMAGENET, Request, evaluate_checkpoint
from isd_repro.evaluations.features import features
from isd_repro.runtime.errors import ConfigError

PLAIN, OURS = "plain script", "evaluate"
_BATCH = 64  # images of the plain script's batch
_CHECKED, _ALONE = 24, 4  # images of each split whose features are compared, and that are also computed alone


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """Files in both splits together, their size in pixels, and the side that the network sees."""

    images: int = 300
    width: int = 500
    height: int = 375
    side: int = 224


CPU = {"evaluate-2": Sizes(images=2), "evaluate-24": Sizes(images=24), "evaluate-300": Sizes(repetitions=3)}
CUDA: dict[str, Sizes] = {}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, images=min(sizes.images, 6), width=60, height=40, side=32, repetitions=2)


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare, in a temporary folder.

    Raises:
        ConfigError: an odd number of images.
    """
    if sizes.images % 2:
        raise ConfigError(f"cannot share {sizes.images} images between train and val", "give an even number")
    with tempfile.TemporaryDirectory(prefix="isd-bench-") as name, patch.dict(os.environ, ISD_STATE_ROOT=name):
        images, ckpt = Path(name) / "images", Path(name) / "resnet18.pth"
        _write_images(images, sizes)
        torch.save(models.resnet18().state_dict(), ckpt)
        options = {"--k": tuple(k for k in (1, 20) if k <= sizes.images // 2)}
        out = Path(name) / "out.json"
        request = Request(ckpt, images, out=out, options=options, image_size=sizes.side, workers=1, cache=False)

        def ours() -> None:
            with redirect_stdout(io.StringIO()):
                evaluate_checkpoint(request, Console(file=io.StringIO()))

        plain: dict[str, Tensor] = {}
        works: dict[str, Callable[[], object]] = {PLAIN: lambda: plain.update(_plain(images, ckpt, sizes)), OURS: ours}

        def check(name: str) -> dict[str, tuple[float, float]]:
            return {} if name == PLAIN else _check(images, ckpt, sizes, plain or _plain(images, ckpt, sizes))

        def floor() -> dict[str, float]:
            net, batch = models.resnet18().eval(), torch.zeros(min(8, sizes.images), 3, sizes.side, sizes.side)
            with torch.inference_mode():
                seconds = harness.seconds_of(lambda: net(batch), torch.device("cpu"), 2) / len(batch)
            return {"s of the forward passes": seconds * sizes.images}

        versions = {name: metadata.version(name) for name in ("torchvision", "pillow")}
        return harness.compare("evaluate", sizes, works, check=check, floor=floor, versions=versions, say=say)


def _write_images(root: Path, sizes: Sizes) -> None:
    """Two classes, or one where each split has one image."""
    draws, contents = np.random.default_rng(0), []
    for _ in range(min(sizes.images, loader.DISTINCT)):
        buffer = io.BytesIO()
        loader.picture(draws, sizes.width, sizes.height).save(buffer, "JPEG", quality=loader.ORIGINAL)
        contents.append(buffer.getvalue())
    for number in range(sizes.images):
        split, cls = ("train", "val")[number % 2], number // 2 % 2
        file = root / split / f"class_{cls}" / f"{number:06d}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[number % len(contents)] + number.to_bytes(4, "big"))  # no two files are copies


def _plain(root: Path, ckpt: Path, sizes: Sizes) -> dict[str, Tensor]:
    """Features by split, after the neighbours have been found as well."""
    net = models.resnet18()
    net.load_state_dict(torch.load(ckpt, weights_only=True))
    net.fc = nn.Identity()
    net.eval()
    steps = [transforms.Resize(round(sizes.side / 0.875)), transforms.CenterCrop(sizes.side)]
    view = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
    found, labels = {}, {}
    for split in ("train", "val"):
        batches: Any = DataLoader(datasets.ImageFolder(str(root / split), view), _BATCH)
        with torch.inference_mode():
            parts = [(net(images), label) for images, label in batches]
        found[split], labels[split] = (torch.cat(each) for each in zip(*parts, strict=True))
    query, bank = (functional.normalize(found[split], dim=1) for split in ("val", "train"))
    near = (query @ bank.T).topk(min(20, len(bank)), dim=1).indices
    for k in (1, 20):
        labels["train"][near[:, :k]].mode(dim=1)
    return found


def _check(root: Path, ckpt: Path, sizes: Sizes, plain: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Images whose bits depend on the others, and the largest cosine distance to the plain script's features."""
    frame, device = Frame(sizes.side, 0.875, *IMAGENET), torch.device("cpu")
    encoders = checkpoints.load(ckpt).encoders
    changed, distance = 0, 0.0
    with open_folder(root, 3, workers=1) as opened:
        for split, name in (("search", "train"), ("query", "val")):
            index = opened.prepared.split("search" if split == "search" else "query").index[:_CHECKED]

            def of(index: Tensor) -> Tensor:
                return features(encoders, centred(opened.reader, index, frame, device), len(index), device)["student"]

            whole = of(index)
            changed += sum(not torch.equal(of(index[at : at + 1])[0], whole[at]) for at in range(min(_ALONE, len(index))))
            distance = max(distance, float((1 - functional.cosine_similarity(whole, plain[name][:_CHECKED])).max()))
    return {
        "images whose bits depend on the others": (float(changed), 0.0),
        "cosine distance to the plain script": (distance, 1e-3),
    }
