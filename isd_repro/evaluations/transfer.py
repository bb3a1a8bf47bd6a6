"""Transfer: logistic regression on frozen features, its one setting chosen on validation images (paper.md 4, Transfer).

Features become z as in the paper's linear protocol: L2-normalised, then standardised with statistics of the images learnt from.
Weights W and intercepts b minimise

    mean over images of cross-entropy(z W' + b, class) + |W|^2 / (2 C N)

which is sklearn's objective with the same C, and strictly convex in W: the solution is unique whatever the solver's path, so
neither rate nor start is a hyper-parameter. L-BFGS in float64 follows the grid of C from strong to weak regularisation, each
solution the start of the next. The C with the best validation images is taken, the strongest of equals; the classifier is then
fitted anew, from zero, on train and validation images together, and answers the test images once.  # DEV-19
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.config.params import Transfer
from isd_repro.evaluations.arithmetic import exact
from isd_repro.evaluations.extract import require_finite
from isd_repro.evaluations.linear import standardise
from isd_repro.runtime.errors import DataError

HISTORY = 10  # pairs that L-BFGS keeps

Score = Callable[[Tensor, Tensor], float]  # predicted, label -> percent


@dataclass(frozen=True)
class Fit:
    """A classifier.

    Attributes:
        weight: float64, C x D. bias: float64, C.
        iterations: of L-BFGS.
        gradient: largest entry of the objective's gradient at the end.
    """

    weight: Tensor
    bias: Tensor
    iterations: int
    gradient: float

    def predict(self, z: Tensor) -> Tensor:
        """Class of the largest logit of each row of z (Q x D, float64), int64, Q; the lowest of equals."""
        return torch.addmm(self.bias, z, self.weight.T).argmax(dim=1)


@dataclass(frozen=True)
class Choice:
    """What the validation images chose.

    Attributes:
        c: the value taken.
        validation: the score of each value of the grid, percent.
        unsolved: values of the grid whose gradient was still above the tolerance after the last iteration.
    """

    c: float
    validation: tuple[float, ...]
    unsolved: int


@dataclass(frozen=True)
class Answer:
    """Predicted class of every test image, int64 on the CPU, Q; the choice behind it, and the last fit's state."""

    predicted: Tensor
    choice: Choice
    iterations: int
    solved: bool


def grid(settings: Transfer) -> list[float]:
    """Values of C, ascending."""
    ends = torch.tensor([settings.c_min, settings.c_max], dtype=torch.float64).log10()
    values: list[float] = torch.logspace(float(ends[0]), float(ends[1]), settings.c_values, dtype=torch.float64).tolist()
    return values


def fit(z: Tensor, label: Tensor, classes: int, c: float, settings: Transfer, start: Fit | None = None) -> Fit:
    """Minimise the objective.

    Args:
        z: standardised features, float64, N x D.
        label: classes, int64, N, on the same device.
        classes: C.
        c: inverse strength of the regularisation.
        settings: when to stop.
        start: another solution to start from; zero without.
    """
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
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, score: Score, settings: Transfer, device: torch.device
) -> Choice:
    """Take the C whose classifier, learnt from `train`, scores best on `val`; both (features N x D, classes N)."""
    law = standardise(train[0])
    z, held = (law(features).to(device, torch.float64) for features in (train[0], val[0]))
    label = train[1].to(device)
    values, scores, unsolved = grid(settings), [], 0
    found: Fit | None = None
    for c in values:
        found = fit(z, label, classes, c, settings, found)
        unsolved += found.gradient > settings.tolerance
        scores.append(score(found.predict(held).cpu(), val[1]))
    return Choice(values[scores.index(max(scores))], tuple(scores), unsolved)


def answer(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test: Tensor,
    classes: int,
    score: Score,
    settings: Transfer,
    device: torch.device,
) -> Answer:
    """Choose, learn from both, and answer.

    Args:
        train: features N x D and their classes, int64, N; not normalised.
        val: the same of the validation images.
        test: features to classify, Q x D; their classes are asked of nobody.
        classes: number of classes.
        score: what the choice maximises.
        settings: grid, iterations and tolerance.
        device: where the solver runs.

    Raises:
        DataError: features that are not finite, or fewer than two images to learn from.
    """
    for name, features in (("train", train[0]), ("validation", val[0]), ("test", test)):
        require_finite(features, f"{name} features")
        if not len(features):
            raise DataError(f"transfer: no {name} images", "look at the set's folder")
    with exact(device):
        choice = choose(train, val, classes, score, settings, device)
        features, label = (torch.cat(parts) for parts in zip(train, val, strict=True))
        law = standardise(features)
        final = fit(law(features).to(device, torch.float64), label.to(device), classes, choice.c, settings)
        predicted = final.predict(law(test).to(device, torch.float64)).cpu()
    return Answer(predicted, choice, final.iterations, final.gradient <= settings.tolerance)
