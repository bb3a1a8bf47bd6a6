"""`isd-repro evaluate` on a folder of JPEG files against the plain script that people write for it (`plain_evaluate.py`).

Both are commands: each call is a process of its own, and its time is the whole process's, imports included. Ours also hashes
every file, accounts for every tensor of the checkpoint, resizes in float32, gives every image the same bits however many there
are, and writes features and record. Files are those of the subject `loader`; half of them are train, half are val.

The checks compare features: of each image with those of the image alone, bit for bit, and of all images with the plain script's.
They also take the longest time in which progress does not move.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision import models

from benchmarks import harness, loader
from isd_repro import checkpoints
from isd_repro.data.eval_loader import Frame, centred
from isd_repro.data.image_folder import open_folder
from isd_repro.evaluations.external import IMAGENET
from isd_repro.evaluations.features import features
from isd_repro.runtime.errors import ConfigError

PLAIN, OURS = "plain script", "evaluate"
_COMMAND = "from isd_repro.cli import main; main()"
_ROOT = Path(__file__).parent.parent
_CHECKED, _ALONE = 24, 4  # images of each split whose features are compared, and that are also computed alone
_SILENT = 1.0  # processor seconds within which progress moves


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """Files in both splits together, their size in pixels, and the side that the network sees."""

    images: int = 300
    width: int = 500
    height: int = 375
    side: int = 224


CPU = {
    "evaluate-2": Sizes(images=2),
    "evaluate-24": Sizes(images=24),
    "evaluate-300": Sizes(repetitions=3),
    "evaluate-12mp": Sizes(images=4, width=4000, height=3000, repetitions=3),
}
CUDA: dict[str, Sizes] = {}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, images=min(sizes.images, 6), width=60, height=40, side=32, repetitions=1)


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare, in a temporary folder.

    Raises:
        ConfigError: an odd number of images.
    """
    if sizes.images % 2:
        raise ConfigError(f"cannot share {sizes.images} images between train and val", "give an even number")
    with tempfile.TemporaryDirectory(prefix="isd-bench-") as name:
        folder = Path(name)
        images, ckpt, plain = folder / "images", folder / "resnet18.pth", folder / "plain.pt"
        _write_images(images, sizes)
        torch.save(models.resnet18().state_dict(), ckpt)
        script = [str(Path(__file__).parent / "plain_evaluate.py"), str(images), str(ckpt), str(sizes.side), str(plain)]
        asked = ["--image-size", str(sizes.side), "--workers", "1", "--no-cache", "--out", str(folder / "out.json")]
        for k in (1, 20):
            asked += ["--k", str(k)] if k <= sizes.images // 2 else []
        ours = ["-c", _COMMAND, "evaluate", "--ckpt", str(ckpt), "--data", str(images), *asked]
        works: dict[str, Callable[[], object]] = {PLAIN: lambda: _run(script, folder), OURS: lambda: _run(ours, folder)}

        def check(name: str) -> dict[str, tuple[float, float]]:
            if name == PLAIN:
                return {}
            if not plain.is_file():
                _run(script, folder)
            return _check(images, ckpt, sizes, torch.load(plain, weights_only=True))

        def floor() -> dict[str, float]:
            net, batch = models.resnet18().eval(), torch.zeros(min(8, sizes.images), 3, sizes.side, sizes.side)
            with torch.inference_mode():
                seconds = harness.seconds_of(lambda: net(batch), torch.device("cpu"), 2) / len(batch)
            return {"s of the forward passes": seconds * sizes.images}

        versions = {name: metadata.version(name) for name in ("torchvision", "pillow")}
        return harness.compare("evaluate", sizes, works, check=check, floor=floor, versions=versions, say=say)


def _run(arguments: list[str], folder: Path) -> harness.Seconds:
    """Processor seconds of a Python process, user and system."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), "ISD_STATE_ROOT": str(folder / "state")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return harness.Seconds(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


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


def _check(root: Path, ckpt: Path, sizes: Sizes, plain: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Images whose bits depend on the others, the largest cosine distance to the plain script, and the longest silence."""
    frame, device = Frame(sizes.side, 0.875, *IMAGENET), torch.device("cpu")
    encoders = checkpoints.load(ckpt).encoders
    changed, distance, moved = 0, 0.0, [time.process_time()]

    def move(_: int) -> None:
        moved.append(time.process_time())

    with open_folder(root, 3, workers=1, advance=move) as opened:
        for split, name in (("search", "train"), ("query", "val")):
            index = opened.prepared.split("search" if split == "search" else "query").index[:_CHECKED]

            def of(index: Tensor) -> Tensor:
                return features(encoders, centred(opened.reader, index, frame, device, move), len(index), device, move)["student"]

            whole = of(index)
            changed += sum(not torch.equal(of(index[at : at + 1])[0], whole[at]) for at in range(min(_ALONE, len(index))))
            distance = max(distance, float((1 - functional.cosine_similarity(whole, plain[name][:_CHECKED])).max()))
    return {
        "images whose bits depend on the others": (float(changed), 0.0),
        "cosine distance to the plain script": (distance, 1e-3),
        "s without progress": (max(after - before for before, after in pairwise(moved)), _SILENT),
    }
