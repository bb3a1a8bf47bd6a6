"""Evaluate runs by transfer: linear classifiers on their features of other data sets.

This is logistic regression on frozen features; its only hyper-parameter, C, is chosen on validation images (the paper's Table 2).

Features are transformed to z as in the paper's linear protocol: L2-normalised, then standardised with statistics of the training
images. Weights W and intercepts b minimise

    mean over images of cross-entropy(z W' + b, class) + |W|^2 / (2 C N)

which is sklearn's objective with the same C. It is strictly convex in W, so the solution is unique and neither a learning rate
nor the initialisation is a hyper-parameter. L-BFGS in float64 follows the grid of C from strong to weak regularisation and starts
from the previous solution each time. The C with the best validation score is chosen, among equals the smallest; the classifier is
then fitted from zero on train and validation images together, and classifies the test images once.  # DEV-19
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import Field

from isd_repro.config.fields import Count, Distinct, Frozen, Natural, Positive
from isd_repro.data import transfer_sets
from isd_repro.data.transfer_sets import TransferImages, TransferName
from isd_repro.provenance import describe
from isd_repro.records import Labels, TargetEvaluation, mean_per_class, pack_labels, score_groups
from isd_repro.runtime.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from isd_repro.evaluations.subject import Subject, Targets

TITLE = "Transfer"
METRIC = "transfer"
TRAINS = True  # `verify` repeats it only with --linear
METRICS = r"transfer(-[a-z0-9-]+)?"
OWN_TABLE = True
PROTOCOL = "logistic regression on L2-normalised, standardised features; C chosen on validation images, retrained with them"
HISTORY = 10  # pairs that L-BFGS keeps

Score = Callable[[Labels, Labels], float]  # predicted, label -> percent


class Config(Frozen):
    """Logistic regression on the frozen features of other data sets (DEV-19)."""

    sets: Distinct[TransferName] = ()  # rows of data/transfer_sets.py
    c_min: Positive = 1e-5  # C is sklearn's: the summed loss counts C times, half the squared weights once
    c_max: Positive = 1e6
    c_values: Annotated[int, Field(ge=2, le=10_000)] = 45  # logarithmically spaced, both ends included
    iterations: Count = 1000  # of L-BFGS at most, for each C
    tolerance: Positive = 1e-5  # largest entry of the mean loss's gradient that counts as none
    seed: Natural = 0  # of the draw of validation images, if a set has none


def protocol(evaluation: Any) -> str:
    """The protocol as tables print it; it does not depend on the settings."""
    return PROTOCOL


def columns(config: Config) -> list[str]:
    """One metric, which the tables show once for each data set."""
    return [METRIC] if config.sets else []


def evaluate(subject: Subject, config: Config) -> Targets:
    """Score every encoder on every target set.

    Raises:
        ConfigError: the settings name no target set.
        DataError: a target set is missing or damaged.
    """
    from isd_repro.evaluations.subject import Targets

    if not config.sets:
        raise ConfigError("evaluation.transfer.sets is empty", "name the target data sets; docs/transfer.md lists them")
    for key in config.sets:  # all of them, before the first is worked on
        transfer_sets.root_of(key)
    stated = config.model_dump(mode="json")
    part = {"transfer": stated, "encoder": subject.sha256, "profile": subject.profile, "run": subject.name}
    found = []
    for key in config.sets:
        one = subject.part(part, key, TargetEvaluation, lambda key=key: on_target(subject, config, key))  # type: ignore[misc]
        for line in _lines(one):
            subject.progress.say(line)
        found.append(one)
    return Targets(tuple(found))


@dataclass(frozen=True)
class Fit:
    """A classifier."""

    weight: Tensor  # float64, C x D. bias: float64, C
    bias: Tensor
    iterations: int  # of L-BFGS
    gradient: float  # largest entry of the objective's gradient at the end

    def predict(self, z: Tensor) -> Tensor:
        """Class of the largest logit of each row of z (Q x D, float64), int64, Q; the lowest of equals."""
        import torch

        return torch.addmm(self.bias, z, self.weight.T).argmax(dim=1)


@dataclass(frozen=True)
class Choice:
    """The choice of C on the validation images."""

    c: float  # the value taken
    validation: tuple[float, ...]  # the score of each value of the grid, percent
    unsolved: int  # values of the grid whose gradient was still above the tolerance after the last iteration


@dataclass(frozen=True)
class Answer:
    """Predicted class of every test image, int64 on the CPU, Q; the choice of C; the last fit's iterations and convergence."""

    predicted: Tensor
    choice: Choice
    iterations: int
    solved: bool


def grid(settings: Config) -> list[float]:
    """Values of C, ascending."""
    import torch

    ends = torch.tensor([settings.c_min, settings.c_max], dtype=torch.float64).log10()
    values: list[float] = torch.logspace(float(ends[0]), float(ends[1]), settings.c_values, dtype=torch.float64).tolist()
    return values


def fit(z: Tensor, label: Tensor, classes: int, c: float, settings: Config, start: Fit | None = None) -> Fit:
    """Minimise the objective.

    Args:
        z: standardised features, float64, N x D.
        label: classes, int64, N, on the same device.
        classes: C.
        c: inverse strength of the regularisation.
        settings: when to stop.
        start: a solution to start from; None starts from zero.
    """
    import torch
    from torch.nn import functional

    weight = z.new_zeros(classes, z.shape[1]) if start is None else start.weight.clone()
    bias = z.new_zeros(classes) if start is None else start.bias.clone()
    decay = 1.0 / (c * len(z))

    def objective() -> Tensor:
        """The value; gradients are written from the equation, p the softmax and y one-hot: (p - y)' z / N + W / (C N)."""
        log_p = functional.log_softmax(torch.addmm(bias, z, weight.T), dim=1)
        error = log_p.exp()
        error[torch.arange(len(z), device=z.device), label] -= 1.0
        error /= len(z)
        weight.grad = torch.addmm(weight, error.T, z, beta=decay)
        bias.grad = error.sum(dim=0)
        return functional.nll_loss(log_p, label) + 0.5 * decay * weight.square().sum()

    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=settings.iterations,
        max_eval=4 * settings.iterations,
        tolerance_grad=settings.tolerance,
        tolerance_change=0.0,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
    )
    with torch.no_grad():
        solver.step(objective)
        objective()
        gradient = max(float(part.grad.abs().max()) for part in (weight, bias) if part.grad is not None)
    return Fit(weight, bias, int(solver.state[weight].get("n_iter", 0)), gradient)


def choose(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, score: Score, settings: Config, device: torch.device
) -> Choice:
    """Choose the C whose classifier, trained on `train`, scores best on `val`; both are (features N x D, classes N)."""
    import torch

    from isd_repro.evaluations.linear_head import standardise

    standardised = standardise(train[0])
    z, held = (standardised(features).to(device, torch.float64) for features in (train[0], val[0]))
    label = train[1].to(device)
    values, scores, unsolved = grid(settings), [], 0
    found: Fit | None = None
    for c in values:
        found = fit(z, label, classes, c, settings, found)
        unsolved += found.gradient > settings.tolerance
        scores.append(score(found.predict(held).cpu().numpy(), val[1].numpy()))
    return Choice(values[scores.index(max(scores))], tuple(scores), unsolved)


def answer(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: Tensor,
    classes: int,
    score: Score,
    settings: Config,
    device: torch.device,
) -> Answer:
    """Choose C, train on train and validation images, and classify the test images.

    Args:
        train: features N x D, not normalised, and their classes, int64, N.
        val: the same for the validation images.
        test: features to classify, Q x D.
        classes: number of classes.
        score: the score that the choice of C maximises.
        settings: grid, iterations and tolerance.
        device: where the solver runs.

    Raises:
        DataError: features are not finite, or there are too few images.
    """
    import torch

    from isd_repro.evaluations.arithmetic import exact
    from isd_repro.evaluations.features import require_finite
    from isd_repro.evaluations.linear_head import standardise

    for name, rows in (("train", train[0]), ("validation", val[0]), ("test", test)):
        require_finite(rows, f"{name} features")
        if not len(rows):
            raise DataError(f"transfer: no {name} images", "check the folder of the data set")
    with exact(device):
        choice = choose(train, val, classes, score, settings, device)
        learnt, label = (torch.cat(parts) for parts in zip(train, val, strict=True))
        standardised = standardise(learnt)
        final = fit(standardised(learnt).to(device, torch.float64), label.to(device), classes, choice.c, settings)
        predicted = final.predict(standardised(test).to(device, torch.float64)).cpu()
    return Answer(predicted, choice, final.iterations, final.gradient <= settings.tolerance)


def absent(key: TransferName) -> str:
    """A message that says why a target set cannot be opened; "" if it can."""
    try:
        transfer_sets.open_set(key)
    except UserError as error:
        return error.message
    return ""


def facts(record: TargetEvaluation, config: Config) -> list[tuple[str, object, object]]:
    """Facts about a target set as (key, the record's value, the value in this project's table of sets)."""
    spec = transfer_sets.SETS.get(cast("TransferName", record.manifest.subset))
    if spec is None:
        return []  # a set that the settings do not name, which is reported elsewhere
    stated, rule = record.manifest, record.manifest.rule
    return [
        ("manifest.dataset", stated.dataset, spec.title),
        ("metric", record.metric, spec.metric),
        ("manifest.rule.source", rule.get("source"), f"torchvision.datasets.{spec.reader}"),
        ("manifest.rule.seed", rule.get("seed"), config.seed),
    ]


def on_target(subject: Subject, settings: Config, key: TransferName) -> TargetEvaluation:
    """Evaluate all encoders on one target set; every image is read only once."""
    from isd_repro.evaluations.features import features

    started = time.monotonic()
    opened = transfer_sets.open_set(key)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        images = TransferImages(opened, subject.frame, subject.channels, pool)
        with subject.progress.task(f"{subject.name} {key}: images") as bar:
            bar.begin(len(images))
            found = features(subject.encoders, images, len(images), subject.device, bar.advance)
    division = transfer_sets.divide(key, opened.part, images.label, settings.seed)
    label = images.label[division.test].numpy()
    everything = {"all": label >= 0}
    predictions: dict[str, Labels] = {}
    chosen: dict[str, Any] = {}
    for encoder, rows in found.items():
        result = answer(
            (rows[division.train], images.label[division.train]),
            (rows[division.val], images.label[division.val]),
            rows[division.test],
            len(opened.classes),
            mean_per_class if opened.spec.metric == "mean-per-class" else _top1,
            settings,
            subject.device,
        )
        predictions[f"{encoder}/{METRIC}"] = result.predicted.numpy()
        chosen[encoder] = _facts(result)
    return TargetEvaluation(
        kind="transfer",
        profile=subject.profile,
        run=subject.name,
        protocol=PROTOCOL,
        settings={"chosen": chosen},
        manifest=transfer_sets.identity(key, images, opened, division, settings.seed),
        encoder_sha256=subject.sha256,
        features_sha256=_digest(found),
        scores=tuple(s for key, rows in predictions.items() for s in score_groups(key, rows, label, everything)),
        labels=pack_labels(label),
        predictions={key: pack_labels(predicted) for key, predicted in predictions.items()},
        provenance=describe(time.monotonic() - started),
        metric=opened.spec.metric,
        mean_per_class={key: mean_per_class(predicted, label) for key, predicted in predictions.items()},
    )


def _facts(answer: Answer) -> dict[str, Any]:
    """A choice in the form of the record; `edge` means that the best C is at an end of the grid, which may be too narrow."""
    scores = answer.choice.validation
    return {
        "c": answer.choice.c,
        "edge": scores.index(max(scores)) in (0, len(scores) - 1),
        "validation": max(scores),
        "unsolved": answer.choice.unsolved,
        "iterations": answer.iterations,
        "solved": answer.solved,
    }


def _digest(found: Mapping[str, Tensor]) -> str:
    """The sha256 over the features of all images under every encoder."""
    hasher = hashlib.sha256()
    for encoder, rows in sorted(found.items()):
        hasher.update(f"{encoder}\n".encode() + rows.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _lines(one: TargetEvaluation) -> list[str]:
    """One line of text for each encoder: both accuracies and the chosen C."""
    lines = []
    for score in one.scores:
        chosen = one.settings["chosen"][score.encoder]
        other = one.mean_per_class[f"{score.encoder}/{score.metric}"]
        how = f"C {chosen['c']:.3g} with {chosen['validation']:.1f} % of validation images"
        what = f"top-1 {score.top1:.1f} %, mean per class {other:.1f} % (n={score.n})"
        lines.append(f"{one.run} {score.encoder} {one.manifest.subset} {what}; {how}")
    return lines


def _top1(predicted: Labels, label: Labels) -> float:
    return 100.0 * float((predicted == label).mean())
