"""An evaluation once more, and whether it gives the predictions that a record stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isd_repro.config.params import Linear, Transfer
from isd_repro.evaluations import few_label, knn, linear
from isd_repro.evaluations import transfer as logistic
from isd_repro.evaluations.extract import Features, Images, features
from isd_repro.evaluations.linear import OnEpoch, Task, TrainBatches
from isd_repro.provenance import Machine, Provenance
from isd_repro.records import mean_per_class

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


@dataclass(frozen=True)
class Answers:
    """Predicted classes by "<encoder>/<metric>", int64, Q, and the choices behind them by their keys in a record's settings."""

    predictions: dict[str, Tensor]
    choices: dict[tuple[str, ...], Any] = field(default_factory=dict)


def heads(
    encoders: Mapping[str, nn.Module],
    replay: Replay,
    query_label: Tensor,
    classes: int,
    batches: TrainBatches,
    settings: Linear,
    device: torch.device,
    on_epoch: OnEpoch,
) -> Answers:
    """Train the linear heads anew."""
    task = Task(replay.search, replay.query, query_label, classes, batches)
    found = linear.train(encoders, task, settings, device, on_epoch)
    last = {f"{name}/linear-last": out.last for name, out in found.items()}
    best = {f"{name}/linear-best": out.best for name, out in found.items()}
    return Answers(last | best, {("best_epoch", name): out.best_epoch for name, out in found.items()})


def few_labels(
    encoders: Mapping[str, nn.Module],
    replay: Replay,
    at: Tensor,
    share: str,
    query_label: Tensor,
    classes: int,
    batches: TrainBatches,
    settings: Linear,
    device: torch.device,
    on_epoch: OnEpoch,
) -> Answers:
    """Train the heads of one share of labelled images anew; `at` is their positions in the search set, int64."""
    labelled = {name: rows[at] for name, rows in replay.search.items()}
    found = linear.train(encoders, Task(labelled, replay.query, query_label, classes, batches), settings, device, on_epoch)
    answers = {name: few_label.answers(out, query_label, share) for name, out in found.items()}
    predictions = {f"{name}/{metric}": rows for name, metrics in answers.items() for metric, rows in metrics.items()}
    return Answers(predictions, {("best_epoch", share, name): out.best_epoch for name, out in found.items()})


def transfer(
    encoders: Mapping[str, nn.Module],
    images: Images,
    label: Tensor,
    division: tuple[Tensor, Tensor, Tensor],
    classes: int,
    metric: str,
    settings: Transfer,
    device: torch.device,
    on_block: Callable[[int], object],
) -> Answers:
    """Choose and fit the classifiers of another data set anew.

    Args:
        encoders: backbones.
        images: views of all images of the set.
        label: their classes, int64, N.
        division: positions of train, validation and test images, int64.
        classes: number of classes.
        metric: what the choice maximises, `top1` or `mean-per-class`.
        settings: grid, iterations and tolerance.
        device: where features and classifiers are computed.
        on_block: told how many images were read.

    Raises:
        DataError: features that are not finite.
    """
    score = mean_per_class if metric == "mean-per-class" else _top1
    train, val, test = division
    predictions: dict[str, Tensor] = {}
    choices: dict[tuple[str, ...], Any] = {}
    for name, rows in features(encoders, images, len(label), device, on_block).items():
        learnt = (rows[train], label[train]), (rows[val], label[val])
        found = logistic.answer(*learnt, rows[test], classes, score, settings, device)
        predictions[f"{name}/transfer"] = found.predicted
        choices |= {("chosen", name, "c"): found.choice.c, ("chosen", name, "validation"): max(found.choice.validation)}
    return Answers(predictions, choices)


def _top1(predicted: Tensor, label: Tensor) -> float:
    return 100.0 * float((predicted == label).double().mean())


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
