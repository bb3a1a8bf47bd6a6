"""What one rank computes, through the real loop and the real batches, written to a file for comparison. Float64 on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isd_repro import methods
from isd_repro.config.params import BackboneConfig, Blur, Cosine, Data, Efficiency, Jitter, Numerics, Optim, StoreSettings, View
from isd_repro.data import eval_loader
from isd_repro.data.loader import Batches
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store, StoreInfo
from isd_repro.evaluations import features as evals
from isd_repro.evaluations import linear_head as linear
from isd_repro.evaluations.linear import Config as Linear
from isd_repro.interfaces import Batch, Setting
from isd_repro.nn import backbones
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.runtime import launcher, ranks
from isd_repro.runtime.ranks import joined
from isd_repro.train import checkpoint, loop
from isd_repro.train.checkpoint import RunProgress
from tests.conformance.problem import profile_options
from tests.data import trees

BATCH, STEPS, SIDE, IMAGES, CLASSES, HALF = 16, 3, 8, 19, 4, 2
ISD = [("isd", 1), ("isd", 2), ("isd", 4)]  # a method and BatchNorm groups
CASES = [*ISD, *((name, 2) for name in methods.names() if name != "isd")]
CPU = torch.device("cpu")
STRONG = View(
    crop_min=0.2,
    jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    grayscale=0.3,
    blur=Blur(sigma_min=0.1, sigma_max=1.0, p=0.5),
    solarise=0.2,
)
DATA = Data(subset="toy", image_size=SIDE, view_student=STRONG, view_teacher=STRONG, views_more=(STRONG,))
BACKBONE = BackboneConfig(arch="resnet-narrow", width=4)
OPTIM = Optim(epochs=STEPS, batch_size=BATCH, lr=0.03, schedule=Cosine(name="cosine"))  # an epoch is a step
FEATURES, BLOCK = 53, 8
LINEAR_BATCH = 7  # batches of 7, 7 and 5 images: on four ranks the last has rows that nobody keeps


def write_store(folder: Path) -> Store:
    """Images of many sizes, so that a batch's padding depends on who is in it."""
    draws = torch.Generator().manual_seed(0)
    folder.mkdir()
    shapes = [(3, 9 + 5 * image % 17, 10 + 7 * image % 13) for image in range(IMAGES)]
    images = [torch.randint(256, shape, generator=draws, dtype=torch.uint8).numpy() for shape in shapes]
    info = trees.packed(folder, images, StoreSettings())
    (folder / "info.json").write_text(info.model_dump_json(), "utf-8")
    return Store(folder, info)


def open_batches(folder: Path) -> Batches:
    store = Store(folder, StoreInfo.model_validate_json((folder / "info.json").read_text("utf-8")))
    index = torch.arange(IMAGES)
    return Batches(store, Split(index, index % CLASSES), DATA, BATCH, 0, CPU)


class Double:
    """Batches in float64."""

    def __init__(self, batches: Batches) -> None:
        self.steps_per_epoch = batches.steps_per_epoch
        self._batches = batches

    def at(self, step: int) -> Batch:
        batch = self._batches.at(step)
        return replace(batch, view_student=batch.view_student.double(), view_teacher=batch.view_teacher.double())


def build(name: str, groups: int) -> nn.Module:
    module = methods.load(name)
    options = profile_options(name)
    options = {**options, "bank_size": 2 * BATCH} if "bank_size" in options else options
    torch.manual_seed(7)
    config = module.Config.model_validate(options)
    frozen = lambda path, sha256: backbones.build(BACKBONE, SIDE).eval()  # noqa: E731
    setting = Setting(classes=CLASSES, images=IMAGES, batch_size=BATCH, steps=STEPS, frozen=frozen)
    method: nn.Module = module.Method(config, lambda: backbones.build(BACKBONE, SIDE), setting)
    set_bn_groups(method, groups)
    return method.double()


def train(name: str, groups: int, batches: Batches, half: Path, start: RunProgress | None = None) -> dict[str, Any]:
    """All steps, or those after a checkpoint; on four ranks a checkpoint is left on the way."""
    method = build(name, groups)
    optimizer = loop.optimizer_of(method, OPTIM)
    progress = RunProgress()
    if start is not None:
        progress = checkpoint.load(half, "0", method, optimizer, CPU)

    def save(now: RunProgress) -> None:
        if ranks.rank() == 0 and now.step == HALF and start is None and ranks.world() == 4:
            checkpoint.save(half, "0", method, optimizer, now)

    nothing = lambda *_: None  # noqa: E731
    hooks = loop.Hooks(save=save, epoch=nothing, tick=nothing, stopped=lambda: False)
    mine = Double(batches.part(ranks.rank(), ranks.world()))
    loop.train(method, optimizer, mine, OPTIM, Numerics(bn_groups=groups), Efficiency(log_every=2), progress, hooks)
    return {"curve": progress.curve, "state": method.state_dict()}


def features() -> dict[str, torch.Tensor]:
    """Features of blocks that the ranks share; the last round has too few blocks for all of them."""
    vars(evals).update(BLOCK=BLOCK)
    torch.manual_seed(3)
    pictures = torch.randn(FEATURES, 3, SIDE, SIDE)
    encoders = {"student": backbones.build(BACKBONE, SIDE), "teacher": backbones.build(BACKBONE, SIDE)}
    return evals.features(encoders, pictures.__getitem__, FEATURES, CPU)


class Float64(nn.Module):
    """A backbone in float64, whatever it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, eval_loader: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.inner(eval_loader.double())
        return features


def linear_heads(store: Store) -> dict[str, Any]:
    """The linear protocol on batches that no number of ranks divides, in float64: heads, answers and rows; and its views."""
    torch.manual_seed(5)
    encoders = {name: Float64(backbones.build(BACKBONE, SIDE)).eval() for name in ("student", "teacher")}
    settings = Linear(epochs=3, batch_size=LINEAR_BATCH, lr=0.3, milestones=(2,), protocol="test")
    index = torch.arange(IMAGES)
    frame = eval_loader.Frame(SIDE, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    batches = eval_loader.augmented(eval_loader.StoreReader(store), Split(index, index % CLASSES), frame, settings, CPU)
    with torch.no_grad():
        known = {name: encoder(torch.randn(IMAGES, 3, SIDE, SIDE)) for name, encoder in encoders.items()}
        asked = {name: encoder(torch.randn(11, 3, SIDE, SIDE)) for name, encoder in encoders.items()}
    task = linear.LinearTask(known, asked, torch.arange(11) % CLASSES, CLASSES, batches)
    rows: list[dict[str, float]] = []
    found = linear.train(encoders, task, settings, CPU, lambda row: rows.append(dict(row)))
    heads = {f"{name}.{key}": value for name, out in found.items() for key, value in out.head.state_dict().items()}
    return {"heads": heads, "last": {name: out.last for name, out in found.items()}, "rows": rows, "views": list(batches(1))}


def main(_words: tuple[str, ...]) -> None:
    """Compute everything in the current folder, on two ranks of the methods ISD alone, and write it to `<world>-<rank>.pt`."""
    folder = Path.cwd()
    batches = open_batches(folder / "store")
    found: dict[str, Any] = {}
    with joined() if launcher.ranks() > 1 else nullcontext():
        assert torch.distributed.is_initialized() == (launcher.ranks() > 1)
        mine = batches.part(ranks.rank(), ranks.world())
        found["views"] = [vars(mine.at(step)) for step in range(4)]
        for name, groups in ISD if ranks.world() == 2 else CASES:
            half = folder / f"half-{name}-{groups}.pt"
            found[f"{name}-{groups}"] = train(name, groups, batches, half)
            if groups == 2 and ranks.world() != 4:
                found[f"{name}-resumed"] = train(name, groups, batches, half, RunProgress())
        found["features"] = features()
        found["linear"] = linear_heads(batches.store)
        torch.save(found, folder / f"{ranks.world()}-{ranks.rank()}.pt")
