"""How the bank's loss, the search and an epoch grow with their sizes: ours alone, one comparison of one variant for each size.

The loss and the search are those of the subjects `bank_loss` and `knn`. The epoch is a whole one of a narrow network: batches
from a packed store on the disk, both views, steps, and the check of every weight at its end.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks import bank_loss, harness, knn
from benchmarks.views import MEAN, STD, STRONG, WEAK
from isd_repro.config.params import BackboneConfig, Cosine, Data, Efficiency, Numerics, Optim
from isd_repro.config.params import Store as Packing
from isd_repro.data.loader import Batches
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store, StoreWriter
from isd_repro.interfaces import Setting
from isd_repro.methods import isd
from isd_repro.nn import backbones
from isd_repro.train import loop
from isd_repro.train.checkpoint import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {"bank": "rows of the bank", "images": "images"}  # what grows, by its name among the sizes


@dataclass(frozen=True)
class Epoch(harness.Sizes):
    """What an epoch is of; the bank holds as many rows as 16 batches."""

    images: int = 256
    batch: int = 64
    side: int = 32
    width: int = 16


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """The values of one size of a subject; `start` has all others."""

    start: harness.Sizes = harness.Sizes()  # noqa: RUF009 - frozen
    vary: str = "bank"
    values: tuple[int, ...] = ()


_LOSS = bank_loss.Sizes(repetitions=3, only=("attention",))
_SEARCH = knn.Sizes(dim=128, repetitions=3, only=(knn.ONE,))
CPU = {
    "loss-growth": Sizes(start=_LOSS, values=tuple(2**power for power in range(13, 21))),
    "knn-growth": Sizes(start=_SEARCH, values=tuple(2**power for power in range(14, 19))),
    "epoch-growth": Sizes(start=Epoch(repetitions=3), vary="images", values=(256, 512, 1024, 2048)),
}
CUDA: dict[str, Sizes] = {}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    if isinstance(sizes.start, bank_loss.Sizes):
        return replace(sizes, start=bank_loss.toy(sizes.start), values=(256, 512))
    if isinstance(sizes.start, knn.Sizes):
        return replace(sizes, start=knn.toy(sizes.start), values=(500, 1000))
    return replace(sizes, start=Epoch(batch=8, side=16, width=2, repetitions=2), values=(16, 32))


def measure(sizes: Sizes, say: harness.Say) -> list[harness.Comparison]:
    """One comparison for each value."""
    found = []
    for value in sizes.values:
        changes: dict[str, Any] = {sizes.vary: value}
        start = replace(sizes.start, **changes)
        subjects: dict[type, Any] = {bank_loss.Sizes: bank_loss.measure, knn.Sizes: knn.measure, Epoch: _epoch}
        found.append(subjects[type(start)](start, say))
    return found


def _epoch(sizes: Epoch, say: harness.Say) -> harness.Comparison:
    with tempfile.TemporaryDirectory(prefix="isd-bench-") as folder:
        return harness.compare("epoch", sizes, {"epoch": _training(Path(folder), sizes)}, say=say)


def _training(folder: Path, sizes: Epoch) -> Callable[[], object]:
    device, draws = harness.device_of(), torch.Generator().manual_seed(0)
    with StoreWriter(folder, Packing()) as writer:
        for _ in range(sizes.images):
            writer.append(torch.randint(256, (3, sizes.side, sizes.side), generator=draws, dtype=torch.uint8).numpy())
        store = Store(folder, writer.finish())
    index = torch.arange(sizes.images)
    data = Data(subset="bench", image_size=sizes.side, view_student=STRONG, view_teacher=WEAK, mean=MEAN, std=STD)
    options = isd.Config(tau_student=0.02, tau_teacher=0.02, momentum=0.99, bank_size=16 * sizes.batch)
    shape = BackboneConfig(arch="resnet-narrow", width=sizes.width)
    setting = Setting(classes=1, images=sizes.batch, batch_size=sizes.batch, steps=1)
    method: nn.Module = isd.Method(options, lambda: backbones.build(shape, sizes.side), setting).to(device)
    method = method.to(memory_format=torch.channels_last)
    optim = Optim(epochs=1, batch_size=sizes.batch, lr=0.01, schedule=Cosine(name="cosine"))
    optimizer = loop.optimizer_of(method, optim)
    hooks = loop.Hooks(save=lambda now: None, epoch=lambda row: None, tick=lambda step, loss: None, stopped=lambda: False)

    def work() -> None:
        batches = Batches(store, Split(index, index), data, sizes.batch, 0, device)
        loop.train(method, optimizer, batches, optim, Numerics(), Efficiency(log_every=10), Progress(), hooks)

    return work


def axis_of(found: Sequence[dict[str, Any]]) -> tuple[str, list[int]]:
    """Which size of these results grows, and its values."""
    name = next(key for key in SHOWN if len({each["sizes"].get(key) for each in found}) > 1)
    return name, [int(each["sizes"][name]) for each in found]


def svg(found: Sequence[dict[str, Any]]) -> str:
    """Seconds, and extra memory if measured, by size, as JSON has them; dashed: in proportion to the size."""
    from isd_repro.report import figures  # needs packages that measuring does not

    name, sizes = axis_of(found)
    variant = found[0]["baseline"]
    panels = {found[0]["clock"]: [each["seconds"][variant] for each in found]}
    if all(variant in each["memory_mib"] for each in found):
        panels["extra memory, MiB"] = [[max(each["memory_mib"][variant], harness.PAGE)] for each in found]

    def draw() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.8 * len(panels), 2.9), layout="constrained")
        for ax, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            middle = [statistics.median(each) for each in values]
            low = [m - min(each) for m, each in zip(middle, values, strict=True)]
            high = [max(each) - m for m, each in zip(middle, values, strict=True)]
            ax.errorbar(sizes, middle, yerr=(low, high), fmt="o-", ms=3.5, lw=1.3, color=figures.COLOURS["isd"])
            ax.plot(sizes, [middle[-1] * size / sizes[-1] for size in sizes], lw=1, ls="--", color=figures.UNTRAINED)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ticks = [10.0**power for power in range(*_decades(values))]
            ax.set_ylim(ticks[0], ticks[-1])
            ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            ax.set_xticks(sizes, [_short(size) for size in sizes])
            ax.set(title=title, xlabel=SHOWN[name])
        return figure

    return figures.svg(draw, f"{variant.capitalize()} by {SHOWN[name]}")


def _decades(values: Sequence[Sequence[float]]) -> tuple[int, int]:
    """Powers of ten around all values, the last one exclusive."""
    low = math.floor(math.log10(min(map(min, values))))
    return low, max(low + 1, math.ceil(math.log10(max(map(max, values))))) + 1


def _short(size: int) -> str:
    """1,048,576 as `1M`, 8,192 as `8k`, in powers of two; others in full."""
    for unit, suffix in ((2**20, "M"), (2**10, "k")):
        if size % unit == 0:
            return f"{size // unit}{suffix}"
    return f"{size:,}"
