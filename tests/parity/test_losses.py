"""The losses and their gradients against sums written out in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from isd_repro.methods.byol import byol_loss
from isd_repro.methods.cmsf import cmsf_loss
from isd_repro.methods.compress import compress_loss
from isd_repro.methods.isd import isd_loss
from isd_repro.methods.moco import moco_loss
from isd_repro.methods.msf import msf_loss
from isd_repro.methods.sce import attended_sce_loss, sce_loss
from isd_repro.methods.simclr import simclr_loss
from isd_repro.methods.simsiam import simsiam_loss
from tests.parity import oracles

SHAPES = [(1, 7, 3), (4, 13, 5), (5, 1, 2), (3, 31, 8)]  # B, K, D
TAUS = [(0.005, 0.005), (0.02, 0.02), (0.1, 0.01), (0.005, 1.0), (1.0, 0.005), (1.0, 1.0)]


def unit_rows(rows: int, features: int, seed: int) -> Tensor:
    draws = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draws / draws.square().sum(1, keepdim=True).sqrt()


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    batch, bank, features = shape
    return unit_rows(batch, features, 1), unit_rows(batch, features, 2), unit_rows(bank, features, 3)


def gradient_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    return torch.autograd.grad(loss(point), point)[0]


def central_differences(loss: Callable[[Tensor], float], at: Tensor, step: float) -> Tensor:
    slope = torch.zeros_like(at)
    for position in range(at.numel()):
        ahead, behind = at.clone(), at.clone()
        ahead.view(-1)[position] += step
        behind.view(-1)[position] -= step
        slope.view(-1)[position] = (loss(ahead) - loss(behind)) / (2 * step)
    return slope


@pytest.mark.parametrize("taus", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_isd_loss_and_gradient_are_the_papers(shape: tuple[int, int, int], taus: tuple[float, float]) -> None:
    student, teacher, bank = inputs(shape)
    rows = student.tolist(), teacher.tolist(), bank.tolist()
    want = oracles.isd_loss(*rows, *taus)
    assert float(isd_loss(student, teacher, bank, *taus)) == pytest.approx(want, rel=1e-11, abs=1e-13)
    gradient = gradient_of(lambda q: isd_loss(q, teacher, bank, *taus), student)
    expected = torch.tensor(oracles.isd_gradient(*rows, *taus), dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("taus", [(0.1, 0.02), (1.0, 0.3)])
def test_isd_gradient_is_the_slope_of_the_oracle(taus: tuple[float, float]) -> None:
    """The analytic formula above is itself held to differences of the loss."""
    student, teacher, bank = inputs((3, 11, 4))
    gradient = gradient_of(lambda q: isd_loss(q, teacher, bank, *taus), student)
    slope = central_differences(lambda q: oracles.isd_loss(q.tolist(), teacher.tolist(), bank.tolist(), *taus), student, 1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(lambda q: isd_loss(q, teacher, bank, *taus), student.requires_grad_())


def test_isd_loss_of_two_anchors_by_hand() -> None:
    """Logits (1, 0)/tau_s and (0, 1)/tau_t: a case small enough for a pocket calculator."""
    bank = torch.eye(2, dtype=torch.float64)
    student, teacher = bank[:1], bank[1:]
    p_s, p_t = 1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-4.0))  # tau 0.5 and 0.25
    want = p_t * math.log(p_t / (1 - p_s)) + (1 - p_t) * math.log((1 - p_t) / p_s)
    assert float(isd_loss(student, teacher, bank, 0.5, 0.25)) == pytest.approx(want, rel=1e-13)
    assert float(isd_loss(student, student, bank, 0.3, 0.3)) == 0.0


def test_isd_loss_in_float32_at_the_papers_temperatures() -> None:
    """Logits reach 1 / 0.01 here; float32 keeps about 1e-5 of them."""
    student, teacher, bank = inputs((8, 500, 16))
    for taus in ((0.02, 0.02), (0.1, 0.01)):
        want = oracles.isd_loss(student.tolist(), teacher.tolist(), bank.tolist(), *taus)
        assert float(isd_loss(student.float(), teacher.float(), bank.float(), *taus)) == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize("tau", [0.005, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_moco_loss_and_gradient_are_the_papers(shape: tuple[int, int, int], tau: float) -> None:
    student, teacher, bank = inputs(shape)
    rows = student.tolist(), teacher.tolist(), bank.tolist()
    loss = float(moco_loss(student, teacher, bank, tau))
    assert loss == pytest.approx(oracles.moco_loss(*rows, tau), rel=1e-11, abs=1e-13)
    gradient = gradient_of(lambda q: moco_loss(q, teacher, bank, tau), student)
    expected = torch.tensor(oracles.moco_gradient(*rows, tau), dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-11)

    logits = torch.stack([(student * teacher).sum(1), *(student @ row for row in bank)], dim=1) / tau
    positive = torch.zeros(len(student), dtype=torch.int64)
    assert loss == pytest.approx(float(F.cross_entropy(logits, positive)), rel=1e-11, abs=1e-13)


def test_moco_gradient_is_the_slope_of_the_oracle() -> None:
    student, teacher, bank = inputs((3, 11, 4))
    gradient = gradient_of(lambda q: moco_loss(q, teacher, bank, 0.2), student)
    slope = central_differences(lambda q: oracles.moco_loss(q.tolist(), teacher.tolist(), bank.tolist(), 0.2), student, 1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 6])
def test_byol_loss_and_gradient_are_the_papers(batch: int) -> None:
    student, teacher, _ = inputs((batch, 1, 5))
    assert float(byol_loss(student, teacher)) == pytest.approx(oracles.byol_loss(student.tolist(), teacher.tolist()), rel=1e-12)
    gradient = gradient_of(lambda q: byol_loss(q, teacher), student)
    torch.testing.assert_close(gradient, 2 * (student - teacher) / batch, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("taus", [(0.1, 0.05), (1.0, 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sce_loss_and_gradient_are_the_papers(shape: tuple[int, int, int], taus: tuple[float, float], lam: float) -> None:
    student, teacher, bank = inputs(shape)
    want = oracles.sce_loss(student.tolist(), teacher.tolist(), bank.tolist(), lam, *taus)
    slope = central_differences(
        lambda q: oracles.sce_loss(q.tolist(), teacher.tolist(), bank.tolist(), lam, *taus), student, 1e-5
    )
    for loss in (sce_loss, attended_sce_loss):
        assert float(loss(student, teacher, bank, lam, *taus)) == pytest.approx(want, rel=1e-11, abs=1e-13)
        gradient = gradient_of(lambda q, loss=loss: loss(q, teacher, bank, lam, *taus), student)  # type: ignore[misc]
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)


def test_sce_is_mocos_loss_at_one_end() -> None:
    student, teacher, bank = inputs((4, 13, 5))
    assert float(sce_loss(student, teacher, bank, 1.0, 0.2, 0.05)) == pytest.approx(float(moco_loss(student, teacher, bank, 0.2)))


@pytest.mark.parametrize("neighbours", [1, 3])
def test_msf_loss_and_gradient_are_the_papers(neighbours: int) -> None:
    student, teacher, bank = inputs((4, 13, 5))
    rows = student.tolist(), teacher.tolist(), bank.tolist()
    assert float(msf_loss(student, teacher, bank, neighbours)) == pytest.approx(oracles.msf_loss(*rows, neighbours), rel=1e-12)
    gradient = gradient_of(lambda q: msf_loss(q, teacher, bank, neighbours), student)
    # on the unit sphere |q - x|^2 is 2 - 2 q . x, whose gradient is -2 x
    nearest = (teacher @ bank.T).topk(neighbours).indices
    torch.testing.assert_close(gradient, -2 * bank[nearest].mean(1) / 4, rtol=1e-12, atol=1e-13)


def test_msf_with_the_image_itself_alone_is_byol() -> None:
    student, teacher, _ = inputs((4, 1, 5))
    assert float(msf_loss(student, teacher, teacher, 1)) == pytest.approx(float(byol_loss(student, teacher)), rel=1e-12)


@pytest.mark.parametrize(("neighbours", "candidates"), [(1, 1), (2, 2), (2, 5), (3, 13)])
def test_cmsf_loss_and_gradient_are_the_papers(neighbours: int, candidates: int) -> None:
    student, teacher, bank = inputs((4, 13, 5))
    before, second = unit_rows(4, 5, 10), unit_rows(13, 5, 11)
    found: Callable[[Tensor], Tensor] = lambda q: cmsf_loss(q, teacher, before, (bank, second), neighbours, candidates)  # noqa: E731
    rows = student.tolist(), teacher.tolist(), before.tolist(), bank.tolist(), second.tolist()
    assert float(found(student)) == pytest.approx(oracles.cmsf_loss(*rows, neighbours, candidates), rel=1e-12)
    unconstrained = float(msf_loss(student, teacher, bank, neighbours))
    if candidates == 13:  # all rows are candidates
        assert float(found(student)) == pytest.approx(unconstrained, rel=1e-12)
    else:
        assert abs(float(found(student)) - unconstrained) > 1e-3
    # on the unit sphere the loss is 2 - 2 q . (mean of the rows), and the oracle is linear in them
    slope = central_differences(
        lambda q: oracles.cmsf_loss(q.tolist(), *rows[1:], neighbours, candidates) - float(q.square().sum()) / 4, student, 1e-5
    )
    torch.testing.assert_close(gradient_of(found, student), slope, rtol=1e-7, atol=1e-8)


def test_compress_loss_is_isds_with_one_temperature() -> None:
    student, teacher, bank = inputs((4, 13, 5))
    rows = student.tolist(), teacher.tolist(), bank.tolist()
    for tau in (0.04, 1.0):
        loss = float(compress_loss(student, teacher, bank, tau))
        assert loss == pytest.approx(oracles.isd_loss(*rows, tau, tau), rel=1e-11)
        gradient = gradient_of(lambda q, tau=tau: compress_loss(q, teacher, bank, tau), student)  # type: ignore[misc]
        expected = torch.tensor(oracles.isd_gradient(*rows, tau, tau), dtype=torch.float64)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("batch", [2, 5])
def test_simclr_loss_and_gradient_are_the_papers(batch: int, tau: float) -> None:
    one, other, _ = inputs((batch, 1, 4))
    assert float(simclr_loss(one, other, tau)) == pytest.approx(oracles.simclr_loss(one.tolist(), other.tolist(), tau), rel=1e-11)
    gradient = gradient_of(lambda z: simclr_loss(z, other, tau), one)
    slope = central_differences(lambda z: oracles.simclr_loss(z.tolist(), other.tolist(), tau), one, 1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-8)


def test_simsiam_loss_and_gradient_are_the_papers() -> None:
    prediction, projection, _ = inputs((6, 1, 5))
    want = -sum(oracles.dot(p, z) for p, z in zip(prediction.tolist(), projection.tolist(), strict=True)) / 6
    assert float(simsiam_loss(prediction, projection)) == pytest.approx(want, rel=1e-12)
    held = projection.clone().requires_grad_()
    simsiam_loss(prediction, held)
    torch.testing.assert_close(gradient_of(lambda p: simsiam_loss(p, held), prediction), -projection / 6)
