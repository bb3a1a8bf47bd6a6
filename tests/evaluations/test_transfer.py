"""Logistic regression and the choice of its C, against Newton's method written from the equations and against scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from isd_repro.evaluations import transfer
from isd_repro.evaluations.transfer import Config as Transfer
from isd_repro.records import Labels, mean_per_class
from isd_repro.runtime.errors import DataError

CPU = torch.device("cpu")
SHARP = Transfer(tolerance=1e-7)
Matrix = npt.NDArray[np.float64]


def points(seed: int, count: int, classes: int = 3, dim: int = 4, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overlapping clouds, raw features as an encoder gives them, and their classes."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    label = torch.randint(classes, (count,), generator=draw)
    label[:classes] = torch.arange(classes)
    return centre[label] + noise * torch.randn(count, dim, generator=draw) + 1.0, label


def top1(predicted: Labels, label: Labels) -> float:
    return 100.0 * float((predicted == label).mean())


def newton(z: Matrix, label: Matrix, classes: int, c: float) -> tuple[Matrix, Matrix]:
    """Newton's method with the last class's intercept held at 0; gradient and Hessian from the equations, image by image."""
    count, dim = z.shape
    wide = dim + 1
    x = np.hstack([z, np.ones((count, 1))])
    theta = np.zeros((classes, wide))
    ridge = np.diag(np.tile(np.r_[np.ones(dim), 0.0], classes)) / (c * count)
    free = np.r_[np.arange(classes * wide - 1)]
    for _ in range(60):
        gradient = ridge @ theta.ravel()
        hessian = ridge.copy()
        for row, cls in zip(x, label.astype(int), strict=True):
            odds = np.exp(theta @ row - (theta @ row).max())
            p = odds / odds.sum()
            gradient += np.kron(p - np.eye(classes)[cls], row) / count
            hessian += np.kron(np.diag(p) - np.outer(p, p), np.outer(row, row)) / count
        step = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        theta.ravel()[free] -= step
        if np.abs(step).max() < 1e-13:
            break
    return theta[:, :dim], theta[:, dim]


def distance(c: float, count: int) -> float:
    """How far from the minimum the weights can be: the objective curves by 1 / (C N) at least, the gradient is 1e-7 at most."""
    return max(1e-9, 4 * 1e-7 * c * count)


@pytest.mark.parametrize("c", [1e-3, 0.1, 1.0])
def test_a_fit_is_the_minimum(c: float) -> None:
    raw, label = points(0, 40)
    z = raw.double()
    found = transfer.fit(z, label, 3, c, SHARP)
    weight, bias = newton(z.numpy(), label.double().numpy(), 3, c)
    assert found.gradient <= 1e-7
    assert np.abs(found.weight.numpy() - weight).max() < distance(c, 40)
    moved = found.bias.numpy() - found.bias.numpy()[-1]  # intercepts are free up to a constant
    assert np.abs(moved - bias).max() < 10 * distance(c, 40)
    other, _ = newton(z.numpy(), label.double().numpy(), 3, 1.01 * c)
    assert np.abs(other - weight).max() > 10 * distance(c, 40), "a hundredth of C shows"


@pytest.mark.parametrize(("c", "classes"), [(0.01, 3), (1.0, 5), (10.0, 5)])
def test_a_fit_is_sklearns_with_the_same_c(c: float, classes: int) -> None:
    raw, label = points(1, 120, classes, 6)
    z = raw.double()
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=100_000).fit(z.numpy(), label.numpy())
    found = transfer.fit(z, label, classes, c, SHARP)
    assert np.abs(found.weight.numpy() - theirs.coef_).max() < distance(c, 120)
    assert found.predict(z).tolist() == theirs.predict(z.numpy()).tolist()


def test_the_start_changes_no_solution_and_too_few_iterations_are_told() -> None:
    raw, label = points(2, 60)
    z = raw.double()
    cold = transfer.fit(z, label, 3, 1.0, SHARP)
    warm = transfer.fit(z, label, 3, 1.0, SHARP, transfer.fit(z, label, 3, 0.01, SHARP))
    assert torch.allclose(cold.weight, warm.weight, rtol=0, atol=2 * distance(1.0, 60))
    short = transfer.fit(z, label, 3, 1.0, SHARP.model_copy(update={"iterations": 2}))
    assert short.iterations == 2
    assert short.gradient > 1e-6
    assert torch.equal(transfer.fit(z, label, 3, 1.0, SHARP).weight, cold.weight)


def test_the_grid_is_logarithmic_with_both_ends() -> None:
    values = transfer.grid(Transfer())
    assert len(values) == 45
    assert values[0] == pytest.approx(1e-5, rel=1e-12)
    assert values[-1] == pytest.approx(1e6, rel=1e-12)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert ratios == pytest.approx([10**0.25] * 44, rel=1e-9)


def unit(rows: Matrix) -> Matrix:
    return np.stack([row / max(float(np.sqrt((row**2).sum())), 1e-12) for row in rows])


def standardised(train: Matrix, other: Matrix) -> tuple[Matrix, Matrix]:
    known = unit(train)
    mean, var = known.mean(axis=0), known.var(axis=0, ddof=1)
    return (known - mean) / np.sqrt(var + 1e-5), (unit(other) - mean) / np.sqrt(var + 1e-5)


def test_choice_and_answer_equal_the_whole_protocol_done_with_sklearn() -> None:
    """Every C fitted on train and scored on validation images; the best one fitted anew on both, statistics included."""
    settings = Transfer(c_min=1e-3, c_max=1e3, c_values=7, tolerance=1e-6)
    train, val, test = points(3, 60, noise=1.6), points(4, 50, noise=1.6), points(5, 80, noise=1.6)
    found = transfer.answer(train, val, test[0], 3, top1, settings, CPU)

    scores = []
    z, held = standardised(train[0].double().numpy(), val[0].double().numpy())
    for c in np.logspace(-3, 3, 7):
        model = LogisticRegression(C=c, tol=1e-10, max_iter=100_000).fit(z, train[1].numpy())
        scores.append(100.0 * float((model.predict(held) == val[1].numpy()).mean()))
    assert found.choice.validation == pytest.approx(scores, abs=1e-9)
    assert len(set(scores)) > 2, "a flat grid would choose nothing"
    best = int(np.argmax(scores))
    assert found.choice.c == pytest.approx(np.logspace(-3, 3, 7)[best], rel=1e-12)
    assert 0 < best < 6
    assert found.choice.unsolved == 0
    assert found.solved

    both = torch.cat([train[0], val[0]]).double().numpy()
    z, asked = standardised(both, test[0].double().numpy())
    model = LogisticRegression(C=found.choice.c, tol=1e-10, max_iter=100_000).fit(z, torch.cat([train[1], val[1]]).numpy())
    assert found.predicted.tolist() == model.predict(asked).tolist()
    alone = LogisticRegression(C=found.choice.c, tol=1e-10, max_iter=100_000)
    z, asked = standardised(train[0].double().numpy(), test[0].double().numpy())
    assert found.predicted.tolist() != alone.fit(z, train[1].numpy()).predict(asked).tolist(), "validation images taught, too"


def test_the_strongest_penalty_of_equals_is_taken() -> None:
    draw = torch.Generator().manual_seed(0)
    label = torch.arange(40) % 2
    rows = torch.where(label[:, None] == 0, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    rows = rows + 0.01 * torch.rand(40, 2, generator=draw)
    settings = Transfer(c_min=1e-2, c_max=1e2, c_values=5)
    found = transfer.choose((rows[:30], label[:30]), (rows[30:], label[30:]), 2, top1, settings, CPU)
    assert found.validation == (100.0,) * 5
    assert found.c == pytest.approx(1e-2)


def test_the_metric_decides_the_choice() -> None:
    """A constant score keeps the first value; the same images scored from the back keep the last."""
    train, val = points(3, 60, noise=1.6), points(4, 50, noise=1.6)
    settings = Transfer(c_min=1e-3, c_max=1e3, c_values=4)
    turns = iter([1.0, 2.0, 3.0, 4.0])
    assert transfer.choose(train, val, 3, lambda a, b: 50.0, settings, CPU).c == pytest.approx(1e-3)
    assert transfer.choose(train, val, 3, lambda a, b: next(turns), settings, CPU).c == pytest.approx(1e3)


def test_mean_per_class_by_hand() -> None:
    """Class 0: 3 of 4; class 1: 1 of 2; class 3: 0 of 1; class 2 has no query and does not count."""
    label, predicted = np.array([0, 0, 0, 0, 1, 1, 3]), np.array([0, 0, 0, 1, 1, 2, 0])
    assert mean_per_class(predicted, label) == pytest.approx(100 * (0.75 + 0.5 + 0.0) / 3)
    assert top1(predicted, label) == pytest.approx(100 * 4 / 7)
    assert mean_per_class(label, label) == 100.0


def test_odd_features_are_named() -> None:
    train, val, test = points(3, 20), points(4, 20), points(5, 20)
    bad = test[0].clone()
    bad[3, 1] = torch.nan
    with pytest.raises(DataError, match="test features: 1 of 20 rows are not finite"):
        transfer.answer(train, val, bad, 3, top1, Transfer(), CPU)
    with pytest.raises(DataError, match="no validation images"):
        transfer.answer(train, (val[0][:0], val[1][:0]), test[0], 3, top1, Transfer(), CPU)
