"""Steps of LARS and AdamW against the same steps written out in Python floats."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from isd_repro.config.params import Cosine, Optim
from isd_repro.train import loop

MATRIX, VECTOR = [[0.5, -1.5], [2.0, 0.25]], [0.7, -0.2]
GRADIENTS = [
    ([[0.1, 0.3], [-0.2, 0.05]], [0.4, -0.6]),
    ([[-0.3, 0.2], [0.1, 0.6]], [0.2, 0.1]),
    ([[0.2, 0.1], [0.4, -0.5]], [-0.3, 0.5]),
]
RATES, MOMENTUM, DECAY = (0.4, 0.2, 0.1), 0.8, 0.03


def lars(weight: list[float], gradients: list[list[float]], decay: float, *, adapts: bool) -> list[float]:
    speed = [0.0] * len(weight)
    for gradient, lr in zip(gradients, RATES, strict=True):
        update = [g + decay * w for g, w in zip(gradient, weight, strict=True)]
        ratio = 0.001 * math.hypot(*weight) / math.hypot(*update) if adapts else 1.0
        speed = [MOMENTUM * v + ratio * u for v, u in zip(speed, update, strict=True)]
        weight = [w - lr * v for w, v in zip(weight, speed, strict=True)]
    return weight


def adamw(weight: list[float], gradients: list[list[float]], decay: float, *, adapts: bool) -> list[float]:
    first, second = [0.0] * len(weight), [0.0] * len(weight)
    for step, (gradient, lr) in enumerate(zip(gradients, RATES, strict=True), start=1):
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradient, strict=True)]
        second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradient, strict=True)]
        moved = [(m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8) for m, v in zip(first, second, strict=True)]
        weight = [(1 - lr * decay) * w - lr * u for w, u in zip(weight, moved, strict=True)]
    return weight


def exact(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def optim(name: Literal["sgd", "lars", "adamw"], **more: Any) -> Optim:
    return Optim(name=name, epochs=3, batch_size=2, lr=RATES[0], weight_decay=DECAY, schedule=Cosine(name="cosine"), **more)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize(("name", "by_hand"), [("lars", lars), ("adamw", adamw)])
def test_three_steps_are_those_of_the_hand(name: Literal["lars", "adamw"], by_hand: Any, excluded: bool) -> None:
    layer = nn.Linear(2, 2).double()
    layer.weight.data, layer.bias.data = exact(MATRIX), exact(VECTOR)
    more = {"sgd_momentum": MOMENTUM} if name == "lars" else {}
    optimizer = loop.optimizer_of(layer, optim(name, exclude_norm_and_bias=excluded, **more))
    for (matrix, vector), lr in zip(GRADIENTS, RATES, strict=True):
        loop._set_lr(optimizer, lr)
        layer.weight.grad, layer.bias.grad = exact(matrix), exact(vector)
        optimizer.step()
    flat = [[value for row in matrix for value in row] for matrix, _ in GRADIENTS]
    want = by_hand([value for row in MATRIX for value in row], flat, DECAY, adapts=True)
    assert layer.weight.flatten().tolist() == pytest.approx(want, rel=1e-12)
    want = by_hand(VECTOR, [vector for _, vector in GRADIENTS], 0.0 if excluded else DECAY, adapts=False)
    assert layer.bias.tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("weight", "gradient"), [(torch.zeros(2, 2), torch.ones(2, 2)), (torch.ones(2, 2), torch.zeros(2, 2))])
def test_without_a_norm_lars_takes_sgds_step(weight: Tensor, gradient: Tensor) -> None:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data, layer.weight.grad = weight.clone(), gradient
    loop.optimizer_of(layer, optim("lars").model_copy(update={"weight_decay": 0.0})).step()
    torch.testing.assert_close(layer.weight.data, weight - RATES[0] * gradient)


def test_the_optimizer_is_said_only_where_it_is_not_sgd() -> None:
    """So the fingerprints of runs from before there was a choice stay what they are."""
    assert "name" not in optim("sgd").model_dump()
    assert optim("lars").model_dump()["name"] == "lars"
    with pytest.raises(ValueError, match="sgd_momentum: adamw does not read it"):
        optim("adamw", sgd_momentum=0.5)
