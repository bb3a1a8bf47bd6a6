"""How the bank's loss, the search and an epoch grow with their sizes: ours alone, one comparison of one arm for each size.

The bank's loss and the search are those of `bench loss` and `bench knn`. The epoch is a whole one of a narrow network: batches
from a packed store on the disk, both views, steps, and the look at every weight at its end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks import knn, loss, turns
from benchmarks.turns import Comparison
from benchmarks.views import MEAN, STD, STRONG, WEAK
from isd_repro.config.params import BackboneConfig, Cosine, Data, Efficiency, Numerics, Optim
from isd_repro.config.params import Store as Packing
from isd_repro.data.loader import Batches
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store, StoreWriter
from isd_repro.evaluations import knn as search_
from isd_repro.interfaces import Setting
from isd_repro.methods import isd
from isd_repro.nn import backbones
from isd_repro.train import loop
from isd_repro.train.checkpoint import Progress

BANKS = tuple(2**power for power in range(13, 21))  # rows of the loss's bank, 8,192 to 1,048,576
SETS = tuple(2**power for power in range(14, 19))  # labelled vectors of a search, 16,384 to 262,144
EPOCHS = (256, 512, 1024, 2048)  # images


@dataclass(frozen=True)
class Epoch:
    """What an epoch is of; the bank holds as many rows as 16 batches."""

    images: int
    repeats: int = 3
    batch: int = 64
    side: int = 32
    width: int = 16
    threads: int = 1


def of_loss(
    banks: tuple[int, ...] = BANKS, dim: int = 128, repeats: int = 3, say: turns.Say = lambda line: None
) -> list[Comparison]:
    """Seconds of the loss and its gradient grow with the bank; extra memory, taken in fresh processes, does not."""
    found = []
    for bank in banks:
        sizes = loss.Sizes(bank=bank, dim=dim, repeats=repeats)
        student, teacher, anchors = loss.inputs(sizes)
        work = loss.work_of(sizes, "attention", student, teacher, anchors)
        memory = {"attention": loss.peak_of(sizes, "attention")}
        found.append(_measured(sizes, "attention", work, memory, say))
    return found


def of_search(
    sets: tuple[int, ...] = SETS, dim: int = 128, repeats: int = 3, say: turns.Say = lambda line: None
) -> list[Comparison]:
    """Seconds of 1,000 exact searches for 20 neighbours, by the number of labelled vectors."""
    found = []
    for count in sets:
        sizes = knn.Sizes(bank=count, dim=dim, repeats=repeats)
        bank, label, query = knn.clustered(sizes)
        work = lambda known=(bank, label, query, sizes.k, knn.CPU): search_.nearest(*known)  # noqa: E731
        found.append(_measured(sizes, "search", work, {}, say))
    return found


def of_epoch(images: tuple[int, ...] = EPOCHS, repeats: int = 3, say: turns.Say = lambda line: None) -> list[Comparison]:
    """Seconds of an epoch of ISD, by the number of images."""
    found = []
    for count in images:
        sizes = Epoch(count, repeats)
        with tempfile.TemporaryDirectory(prefix="isd-bench-") as folder, turns.threads(sizes.threads), torch.random.fork_rng():
            torch.manual_seed(0)
            found.append(_measured(sizes, "epoch", _epoch(Path(folder), sizes), {}, say))
    return found


def _measured(
    sizes: loss.Sizes | knn.Sizes | Epoch, arm: str, work: Callable[[], object], memory: dict[str, float], say: turns.Say
) -> Comparison:
    with turns.threads(sizes.threads):
        return turns.compare("growth", sizes, {arm: work}, floor=dict, check={}, memory_mib=memory, say=say)


def _epoch(folder: Path, sizes: Epoch) -> Callable[[], object]:
    device = turns.device_of()
    draws = torch.Generator().manual_seed(0)
    with StoreWriter(folder, Packing()) as writer:
        for _ in range(sizes.images):
            writer.append(torch.randint(256, (3, sizes.side, sizes.side), generator=draws, dtype=torch.uint8).numpy())
        store = Store(folder, writer.finish())
    index = torch.arange(sizes.images)
    data = Data(subset="bench", image_size=sizes.side, view_student=STRONG, view_teacher=WEAK, mean=MEAN, std=STD)
    options = isd.Config(tau_student=0.02, tau_teacher=0.02, momentum=0.99, bank_size=16 * sizes.batch)
    shape = BackboneConfig(arch="resnet-narrow", width=sizes.width)
    method: nn.Module = isd.Method(options, lambda: backbones.build(shape, sizes.side), Setting(1, sizes.batch)).to(device)
    method = method.to(memory_format=torch.channels_last)
    optim = Optim(epochs=1, batch_size=sizes.batch, lr=0.01, schedule=Cosine(name="cosine"))
    optimizer = loop.optimizer_of(method, optim)
    hooks = loop.Hooks(save=lambda now: None, epoch=lambda row: None, tick=lambda step, loss: None, stopped=lambda: False)

    def work() -> None:
        batches = Batches(store, Split(index, index), data, sizes.batch, 0, device)
        loop.train(method, optimizer, batches, optim, Numerics(), Efficiency(log_every=10), Progress(), hooks)

    return work
