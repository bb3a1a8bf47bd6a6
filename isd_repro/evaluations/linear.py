"""Evaluate runs with a linear probe on the frozen encoder.

The paper's linear protocol: one linear layer is trained by SGD on standardised features of augmented views and
scored on the queries after every epoch. As in the paper, the best epoch is chosen on the queries themselves. That number is
optimistic, so the number of the last epoch is reported as well.  # DEV-05
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from isd_repro.config.fields import Count, Frozen, Many, Natural, Positive, Unit, Words
from isd_repro.runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from isd_repro.data.manifests import Split
    from isd_repro.evaluations.linear_clean import CleanProbe
    from isd_repro.evaluations.linear_head import LinearTask, PaperHead, Rider
    from isd_repro.evaluations.subject import Outcome, Subject, Views

TITLE = "Linear"
NOTE = "The best linear epoch is chosen on the queries that it is scored on, so it is optimistic."
TRAINS = True  # `verify` repeats it only with --linear
IN_ALL = True
OPTIONS = {"--linear-epochs": "epochs", "--linear-seeds": "seeds"}
METRICS = r"linear-(last|best|clean)(-top5)?"
_TIMED = 32  # images whose forward pass sets the expected time
_EXTRA = ("seeds", "clean", "top5")  # keys that add numbers and change none


class Config(Frozen):
    """Keys of `evaluation.linear`: by default the paper's protocol; other settings need another `protocol` name."""

    epochs: Count = 40
    batch_size: Count = 256
    lr: Positive = 0.01
    sgd_momentum: Unit = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    milestones: Many[Count] = (15, 30)
    factor: Positive = 0.1
    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    flip: Unit = 0.5
    seed: Natural = 0
    protocol: Words = "paper"  # the name that tables print; `paper` only with the paper's values
    # Keys that the first records lack are left out of a record if they have their default.
    seeds: Annotated[Count, Field(exclude_if=lambda value: value == 1)] = 1  # heads on one pass, to see their range
    clean: Annotated[bool, Field(exclude_if=lambda value: not value)] = False  # also choose on images held out of training
    top5: Annotated[bool, Field(exclude_if=lambda value: not value)] = False  # top-5 accuracy, too


def protocol(evaluation: Any) -> str:
    """The protocol's name from the settings, as tables print it."""
    return str(evaluation.linear.protocol)


def columns(config: Config) -> list[str]:
    """Metrics in the order of their columns."""
    found = ["linear-last", "linear-best", *(["linear-clean"] if config.clean else [])]
    return [f"{metric}{end}" for metric in found for end in ("", *(["-top5"] if config.top5 else []))]


def head(metric: str) -> str:
    """A metric as the head of a column."""
    base = metric.removesuffix("-top5")
    words = {"linear-last": "linear, last epoch", "linear-best": "linear, best epoch", "linear-clean": "linear, clean"}
    return words[base] + (", top-5" if base != metric else "")


def evaluate(subject: Subject, config: Config) -> Outcome:
    """Train and score a linear head on every encoder; several ranks share the views and the forward passes."""
    from isd_repro.data import eval_loader
    from isd_repro.evaluations.linear_clean import FACTORS, SHARE, CleanProbe
    from isd_repro.evaluations.linear_head import PaperHead
    from isd_repro.evaluations.subject import Outcome

    split, label = subject.split("search"), subject.split("query").label
    further: dict[tuple[str, int], PaperHead] = {}
    clean: dict[str, CleanProbe] = {}

    def riders(task: LinearTask) -> list[Rider]:
        for name in subject.encoders:
            for seed in (seed for seed in range(config.seeds) if seed != config.seed and config.seeds > 1):
                other = config.model_copy(update={"seed": seed})
                further[name, seed] = PaperHead(name, f"{name} seed {seed}", task, other, subject.device)
            if config.clean:
                features, order = task.search[name], lambda epoch: eval_loader.order(len(split), config, epoch)
                clean[name] = CleanProbe(name, features, split.label, subject.classes, order, config, subject.device)
        return [*further.values(), *clean.values()]

    results = probe(subject, config, split, on_row=subject.on_row, riders=riders)
    predictions: dict[str, Tensor] = {}

    def add(name: str, metric: str, first: Tensor, among: Tensor) -> None:
        predictions[f"{name}/{metric}"] = first
        if config.top5:
            predictions[f"{name}/{metric}-top5"] = among_five(first, among, label)

    chosen: dict[str, Any] = {"best_epoch": {name: result.best_epoch for name, result in results.items()}}
    notes: list[str] = []
    for name, result in results.items():
        add(name, "linear-last", result.last, result.last5)
        add(name, "linear-best", result.best, result.best5)
        if config.clean:
            out = clean[name].outcome(subject.features["query"][name])
            add(name, "linear-clean", out.predicted, out.among)
            facts = {"lr": out.lr, "epoch": out.epoch, "held_correct": out.held_correct, "held": out.held}
            chosen.setdefault("chosen", {"share": SHARE, "factors": list(FACTORS)})[name] = facts
            how = f"chosen with {100.0 * out.held_correct / out.held:.1f} % of {out.held} held-out images"
            notes.append(f"{name} linear-clean: learning rate {out.lr:g} and epoch {out.epoch}, {how}")
    if further:
        every = {(name, config.seed): one for name, one in results.items()}
        chosen["correct_by_seed"], lines = _by_seed(every | further, label)
        notes += lines
    return Outcome(predictions, chosen, tuple(notes))


def probe(
    subject: Subject,
    config: Config,
    split: Split,
    rows: Tensor | None = None,
    *,
    title: str = "linear",
    on_row: Callable[[Mapping[str, float]], None] = lambda row: None,
    riders: Callable[[LinearTask], Sequence[Rider]] = lambda task: (),
) -> dict[str, PaperHead]:
    """Print a time estimate, then train the heads on a labelled split; the trained heads by encoder.

    Args:
        subject: what is evaluated.
        config: the protocol.
        split: the labelled images.
        rows: positions of the labelled images in the search split, int64; None means the whole split.
        title: of the progress bar.
        on_row: called with the losses and scores of every epoch.
        riders: makes further heads that are trained in the same pass.
    """
    from isd_repro.evaluations import linear_head
    from isd_repro.evaluations.linear_head import LinearTask

    check_protocol(config)
    views = subject.augmented(split, config)
    seconds = pace(subject.encoders, views, subject.device) * config.epochs * len(split)
    subject.progress.say(f"{subject.name} {title}: {config.epochs} epochs of {len(split)} images, about {duration(seconds)}")
    search, query = subject.features["search"], subject.features["query"]
    task = LinearTask(
        search={name: values if rows is None else values[rows] for name, values in search.items()},
        query=query,
        query_label=subject.split("query").label,
        classes=subject.classes,
        train_batches=views,
    )
    with subject.progress.task(f"{subject.name} {title}: epochs") as bar:
        bar.begin(config.epochs)

        def on_epoch(row: Mapping[str, float]) -> None:
            bar.advance()
            on_row(row)

        return linear_head.train(subject.encoders, task, config, subject.device, on_epoch, riders(task))


def check_protocol(settings: Config) -> None:
    """Raise `ConfigError` if the protocol is named `paper` but the settings differ from the paper's; the seed may differ."""
    paper = Config(seed=settings.seed).model_dump(exclude=set(_EXTRA))
    given = settings.model_dump(exclude=set(_EXTRA))
    other = [f"{key} {given[key]} (paper {paper[key]})" for key in paper if given[key] != paper[key]]
    if settings.protocol == paper["protocol"] and other:
        raise ConfigError(
            f"evaluation.linear.protocol: 'paper' with values that are not the paper's: {', '.join(other)}",
            "give the changed protocol another name, which tables will print",
        )


def for_checkpoint(epochs: int = 40, seeds: int = 1) -> Config:
    """The paper's protocol with all of its metrics; with other epochs the milestones are scaled, and the name says so."""
    config = Config(epochs=epochs, seeds=seeds, clean=True, top5=True)
    if epochs == Config().epochs:
        return config
    milestones = sorted({max(1, round(milestone * epochs / Config().epochs)) for milestone in config.milestones})
    name = f"paper's, with {epochs} epochs for {Config().epochs}"
    return config.model_copy(update={"milestones": tuple(milestones), "protocol": name})


def among_five(first: Tensor, among: Tensor, label: Tensor) -> Tensor:
    """A top-5 prediction as one class per query, int64, Q: the label if it is among the guesses (Q x 5), else the first guess.

    In this form top-5 accuracy can be recomputed from one stored class per query, as top-1 accuracy can.
    """
    import torch

    return torch.where((among == label[:, None]).any(dim=1), label, first)


def pace(encoders: Mapping[str, nn.Module], views: Views, device: torch.device) -> float:
    """Estimated seconds per image of the protocol, measured on one batch of views and the forward passes of some of them."""
    import torch

    from isd_repro.evaluations.arithmetic import exact

    started = time.perf_counter()
    batch, label = next(iter(views(0)))
    viewed = (time.perf_counter() - started) / len(label)
    some = batch[:_TIMED].to(device, torch.float32)
    with exact(device), torch.inference_mode():
        for encoder in encoders.values():
            encoder.to(device).eval()(some[:1])
        started = time.perf_counter()
        for encoder in encoders.values():
            encoder(some).cpu()
    return viewed + (time.perf_counter() - started) / len(some)


def duration(seconds: float) -> str:
    """A duration as text, such as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _by_seed(results: Mapping[tuple[str, int], PaperHead], label: Tensor) -> tuple[dict[str, Any], list[str]]:
    """Number of correct queries of every seed, by encoder and metric, and lines that state their mean and range."""
    correct: dict[str, dict[str, dict[str, int]]] = {}
    for (name, seed), out in sorted(results.items()):
        for metric, predicted in (("linear-last", out.last), ("linear-best", out.best)):
            correct.setdefault(name, {}).setdefault(metric, {})[str(seed)] = int((predicted == label).sum())
    lines = []
    for name, metrics in correct.items():
        for metric, by_seed in metrics.items():
            shares = [100.0 * count / max(len(label), 1) for count in by_seed.values()]
            mean = sum(shares) / len(shares)
            lines.append(f"{name} {metric} of {len(shares)} seeds: mean {mean:.2f} %, {min(shares):.2f} to {max(shares):.2f}")
    return correct, lines
