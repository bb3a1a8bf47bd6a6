"""All linear heads of an evaluation on one pass of the backbone: the paper's protocol, further seeds of it, and the clean one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isd_repro.config.params import Linear
from isd_repro.evaluations import linear
from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.clean import FACTORS, SHARE, CleanProbe, Order
from isd_repro.evaluations.linear import OnEpoch, Task, TrainBatches
from isd_repro.records import Score

_METRICS = ("linear-best", "linear-last", "linear-clean")
_TIMED = 32  # images whose forward pass sets the expected time


@dataclass(frozen=True)
class Asked:
    """Features by encoder, labels, and views of the labelled images; `order` says which images each batch of views shows."""

    search: Mapping[str, Tensor]
    search_label: Tensor
    query: Mapping[str, Tensor]
    query_label: Tensor
    classes: int
    batches: TrainBatches
    order: Order


@dataclass
class Answer:
    """What the heads reached.

    Attributes:
        predictions: class of every query by (encoder, metric), int64, Q.
        among: classes of its largest logits, by the same, int64, Q x min(5, C).
        facts: choices that were made, for the record.
        notes: the same in words.
    """

    predictions: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    among: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def shortened(epochs: int | None) -> Linear:
    """The paper's protocol, or that of fewer or more epochs with its milestones moved in proportion, named so."""
    paper = Linear()
    if epochs is None or epochs == paper.epochs:
        return paper
    milestones = sorted({max(1, round(milestone * epochs / paper.epochs)) for milestone in paper.milestones})
    return Linear(epochs=epochs, milestones=tuple(milestones), protocol=f"paper's, with {epochs} epochs for {paper.epochs}")


def pace(encoders: Mapping[str, nn.Module], batches: TrainBatches, device: torch.device) -> float:
    """Seconds that one image of the linear protocol takes, from one batch of views and the forward passes of some of them."""
    started = time.perf_counter()
    images, _ = next(iter(batches(0)))
    viewed = (time.perf_counter() - started) / len(images)
    some = images[:_TIMED].to(device, torch.float32)
    with exact(device), torch.inference_mode():
        for encoder in encoders.values():
            encoder.to(device).eval()(some[:1])
        started = time.perf_counter()
        for encoder in encoders.values():
            encoder(some).cpu()
    return viewed + (time.perf_counter() - started) / len(some)


def run(
    encoders: Mapping[str, nn.Module], asked: Asked, settings: Linear, seeds: int, device: torch.device, on_epoch: OnEpoch
) -> Answer:
    """Train every head and ask each the queries.

    Args:
        encoders: backbones, as for `linear.train`.
        asked: what is learnt from and asked.
        settings: the paper's protocol; its numbers are those of its own seed whatever else rides along.
        seeds: heads of that protocol for each encoder, from seeds 0 to seeds - 1.
        device: where all run.
        on_epoch: as for `linear.train`.
    """
    task = Task(asked.search, asked.query, asked.query_label, asked.classes, asked.batches)
    others = {
        (name, seed): linear.rider(name, f"{name} seed {seed}", task, settings.model_copy(update={"seed": seed}), device)
        for name in encoders
        for seed in range(seeds)
        if seed != settings.seed
    }
    clean = {
        name: CleanProbe(name, asked.search[name], asked.search_label, asked.classes, asked.order, settings, device)
        for name in encoders
    }
    found = linear.train(encoders, task, settings, device, on_epoch, [*others.values(), *clean.values()])
    answer = Answer(facts={"best_epoch": {name: out.best_epoch for name, out in found.items()}})
    for name, out in found.items():
        answer.predictions |= {(name, "linear-last"): out.last, (name, "linear-best"): out.best}
        answer.among |= {(name, "linear-last"): out.last5, (name, "linear-best"): out.best5}
    _add_clean(answer, clean, asked)
    if others:
        outcomes = {
            **{(name, settings.seed): out for name, out in found.items()},
            **{key: p.outcome() for key, p in others.items()},
        }
        _add_seeds(answer, outcomes, asked.query_label)
    return answer


def _add_clean(answer: Answer, clean: Mapping[str, CleanProbe], asked: Asked) -> None:
    chosen: dict[str, Any] = {"share": SHARE, "factors": list(FACTORS), "chosen": {}}
    for name, probe in clean.items():
        out = probe.outcome(asked.query[name])
        answer.predictions[name, "linear-clean"], answer.among[name, "linear-clean"] = out.predicted, out.among
        chosen["chosen"][name] = {"lr": out.lr, "epoch": out.epoch, "held_correct": out.held_correct, "held": out.held}
        share = 100.0 * out.held_correct / out.held
        answer.notes.append(
            f"{name} linear-clean: rate {out.lr:g} and epoch {out.epoch}, chosen with {share:.1f} % of {out.held} held-out images"
        )
    answer.facts["clean"] = chosen


def _add_seeds(answer: Answer, outcomes: Mapping[tuple[str, int], linear.Outcome], label: Tensor) -> None:
    """Correct queries of every seed, and their spread in words."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for (name, seed), out in sorted(outcomes.items()):
        for metric, predicted in (("linear-last", out.last), ("linear-best", out.best)):
            rows.setdefault(name, {}).setdefault(metric, {})[str(seed)] = int((predicted == label).sum())
    answer.facts["seeds"] = rows
    for name, metrics in rows.items():
        for metric, by_seed in metrics.items():
            shares = [100.0 * correct / max(len(label), 1) for correct in by_seed.values()]
            mean = sum(shares) / len(shares)
            answer.notes.append(
                f"{name} {metric} of {len(shares)} seeds: mean {mean:.2f} %, {min(shares):.2f} to {max(shares):.2f}"
            )


def ordered(scores: Iterable[Score]) -> list[Score]:
    """Scores by encoder, then best, last and clean, each with its top-5."""
    place = {metric: at for at, metric in enumerate(f"{base}{end}" for base in _METRICS for end in ("", "-top5"))}
    return sorted(scores, key=lambda score: (score.encoder, place[score.metric]))


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
