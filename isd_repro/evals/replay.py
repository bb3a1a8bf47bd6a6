"""An evaluation once more, and whether it gives the predictions that a record stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isd_repro.artifacts import Machine, Provenance
from isd_repro.evals import knn, linear
from isd_repro.evals.extract import Features, Images, features
from isd_repro.evals.linear import OnEpoch, Task, TrainBatches
from isd_repro.params import Linear

TOLERATED = 0.005  # share of queries that may be answered otherwise under another arithmetic; docs/verify.md says why


@dataclass(frozen=True)
class Replay:
    """What an encoder gives now.

    Attributes:
        search, query: float32 features by encoder, N x D and Q x D.
        predictions: class of every query by "<encoder>/<metric>", int64, Q.
    """

    search: dict[str, Tensor]
    query: dict[str, Tensor]
    predictions: dict[str, Tensor]


def neighbours(
    encoders: Mapping[str, nn.Module],
    views: Mapping[str, tuple[Images, int]],
    search_label: Tensor,
    ks: Sequence[int],
    device: torch.device,
    on_block: Callable[[int], object] = lambda images: None,
) -> Replay:
    """Extract the features anew and search them; `views` has `search` and `query`, arguments otherwise as for `features`.

    Raises:
        ConfigError: a k above the number of search images.
        DataError: features that are not finite.
    """
    found = {split: features(encoders, images, count, device, on_block) for split, (images, count) in views.items()}
    predictions = {}
    for name, search in found["search"].items():
        for k, predicted in knn.predict(search, search_label, found["query"][name], ks, device).items():
            predictions[f"{name}/{k}-NN"] = predicted
    return Replay(found["search"], found["query"], predictions)


def heads(
    encoders: Mapping[str, nn.Module],
    replay: Replay,
    query_label: Tensor,
    classes: int,
    batches: TrainBatches,
    settings: Linear,
    device: torch.device,
    on_epoch: OnEpoch,
) -> dict[str, Tensor]:
    """Train the linear heads anew: predictions by "<encoder>/<metric>", int64, Q."""
    task = Task(replay.search, replay.query, query_label, classes, batches)
    found = linear.train(encoders, task, settings, device, on_epoch)
    last = {f"{name}/linear-last": out.last for name, out in found.items()}
    return last | {f"{name}/linear-best": out.best for name, out in found.items()}


def farthest(replay: Replay, stored: Features) -> float | None:
    """Largest absolute difference from stored features; 0 where all bits are equal, None where their forms differ."""
    worst = 0.0
    for now, then in ((replay.search, stored.search), (replay.query, stored.query)):
        if now.keys() != then.keys() or any(now[name].shape != then[name].shape for name in now):
            return None
        for name, rows in now.items():
            if not rows.equal(then[name]):
                worst = max(
                    worst, *(float((a - b).abs().max()) for a, b in zip(rows.split(1024), then[name].split(1024), strict=True))
                )
    return worst


def same_arithmetic(ours: Machine, versions: Mapping[str, str], recorded: Provenance) -> bool:
    """Whether bits can be expected to be equal: the same processor, device and torch."""
    theirs = recorded.machine
    return (ours.cpu, ours.gpu, ours.system) == (theirs.cpu, theirs.gpu, theirs.system) and (
        versions["torch"] == recorded.versions.get("torch")
    )
