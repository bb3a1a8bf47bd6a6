"""The clean protocol against a slow oracle in float64, and that nothing of the queries or the held-out images leaks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isd_repro.evaluations import linear_clean as clean
from isd_repro.evaluations import linear_head as linear
from isd_repro.evaluations.linear import Config as Linear
from isd_repro.evaluations.linear import check_protocol, for_checkpoint
from isd_repro.evaluations.linear_clean import CleanProbe, hold_out
from isd_repro.runtime.errors import DataError, UserError
from tests.evaluations import test_linear as known
from tests.evaluations.test_linear import Matrix, World

CPU = torch.device("cpu")
SETTINGS = Linear(epochs=4, lr=0.2, weight_decay=0.01, milestones=(2,), factor=0.2, seed=3, protocol="test")


def order(epoch: int) -> Sequence[Tensor]:
    """The world's own permutation."""
    draw = torch.Generator().manual_seed(100 + epoch)
    return list(torch.randperm(known.TRAIN, generator=draw).split(16))


def ride(
    world: World, nets: dict[str, nn.Sequential], settings: Linear = SETTINGS
) -> tuple[CleanProbe, dict[str, linear.HeadResult]]:
    probe = CleanProbe("student", world.task.search["student"], world.label, known.CLASSES, order, settings, CPU)
    return probe, linear.train(nets, world.task, settings, CPU, riders=[probe])


def unit_of(rows: Matrix) -> Matrix:
    lengths = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    scaled: Matrix = rows / np.maximum(lengths, 1e-12)
    return scaled


def oracle(net: nn.Sequential, world: World, settings: Linear, factor: float) -> list[tuple[Matrix, Matrix]]:
    """Weight and bias after every epoch, one image at a time; statistics and steps from the images not held out."""
    held = hold_out(world.label, settings.seed).tolist()
    taught = [at for at in range(known.TRAIN) if not held[at]]
    rows = unit_of(known.forward(net, world.train)[taught])
    mean, var = rows.mean(axis=0), rows.var(axis=0, ddof=1)
    start = linear.new_head(known.DIM, known.CLASSES, settings.seed)
    w, b = start.weight.detach().double().numpy().copy(), start.bias.detach().double().numpy().copy()
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    states = []
    for epoch in range(settings.epochs):
        lr = settings.lr * factor * settings.factor ** sum(epoch >= milestone for milestone in settings.milestones)
        for (images, label), chosen in zip(world.batches(epoch), order(epoch), strict=True):
            kept = [row for row, at in enumerate(chosen.tolist()) if not held[at]]
            gw, gb = settings.weight_decay * w, settings.weight_decay * b
            z = (unit_of(known.forward(net, images)) - mean) / np.sqrt(var + 1e-5)
            for row in kept:
                logits = w @ z[row] + b
                p = np.exp(logits - logits.max())
                p /= p.sum()
                p[int(label[row])] -= 1
                gw, gb = gw + np.outer(p, z[row]) / len(kept), gb + p / len(kept)
            vw, vb = settings.sgd_momentum * vw + gw, settings.sgd_momentum * vb + gb
            w, b = w - lr * vw, b - lr * vb
        states.append((w.copy(), b.copy()))
    return states


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_heads_choice_and_answers_equal_the_oracle(epochs: int) -> None:
    settings = SETTINGS.model_copy(update={"epochs": epochs})
    nets = {"student": known.network(1)}
    world = known.World(nets)
    probe, _ = ride(world, nets, settings)
    held = hold_out(world.label, settings.seed)
    rows = known.forward(nets["student"], world.train)
    unit = rows / np.maximum(np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1e-12)
    taught = unit[~held.numpy()]
    asked = known.forward(nets["student"], world.query)
    asked = asked / np.maximum(np.sqrt((asked**2).sum(axis=1, keepdims=True)), 1e-12)
    best: tuple[int, int, float] = (-1, 0, 0.0)
    grids = {factor: oracle(nets["student"], world, settings, factor) for factor in clean.FACTORS}
    for epoch in range(epochs):
        for factor in clean.FACTORS:
            w, b = grids[factor][epoch]
            z = (unit[held.numpy()] - taught.mean(axis=0)) / np.sqrt(taught.var(axis=0, ddof=1) + 1e-5)
            correct = int(((z @ w.T + b).argmax(axis=1) == world.label[held].numpy()).sum())
            best = (correct, epoch, factor) if correct > best[0] else best
    out = probe.outcome(world.task.query["student"])
    w, b = grids[best[2]][best[1]]
    assert (out.held_correct, out.epoch, out.lr) == (best[0], best[1] + 1, settings.lr * best[2])
    assert out.held == int(held.sum())
    assert np.abs(out.head.weight.detach().double().numpy() - w).max() < 2e-5
    assert np.abs(out.head.bias.detach().double().numpy() - b).max() < 2e-5
    logits = (asked - taught.mean(axis=0)) / np.sqrt(taught.var(axis=0, ddof=1) + 1e-5) @ w.T + b
    assert out.predicted.tolist() == logits.argmax(axis=1).tolist()
    assert [set(row) for row in out.among.tolist()] == [set(np.argsort(-row)[:5].tolist()) for row in logits]


def test_the_papers_heads_do_not_notice_a_rider() -> None:
    nets = {"student": known.network(1)}
    alone = linear.train(nets, known.World(nets).task, SETTINGS, CPU)["student"]
    _, found = ride(known.World(nets), nets)
    assert torch.equal(found["student"].head.weight, alone.head.weight)
    assert torch.equal(found["student"].last, alone.last)
    assert found["student"].best_epoch == alone.best_epoch


def test_queries_have_no_part_in_the_choice() -> None:
    nets = {"student": known.network(1)}
    world = known.World(nets)
    first = ride(world, nets)[0].outcome(world.task.query["student"])
    other = known.World(nets)
    other.task.query["student"].copy_(torch.randn(other.task.query["student"].shape).abs())
    other.query_label.copy_(other.query_label.flip(0))
    again = ride(other, nets)[0].outcome(world.task.query["student"])
    assert (again.lr, again.epoch, again.held_correct) == (first.lr, first.epoch, first.held_correct)
    assert torch.equal(again.head.weight, first.head.weight)


def test_held_out_images_have_no_part_in_the_head_or_its_statistics() -> None:
    nets = {"student": known.network(1)}
    once = SETTINGS.model_copy(update={"epochs": 1})
    world = known.World(nets)
    probe, _ = ride(world, nets, once)
    other = known.World(nets)
    held = hold_out(world.label, once.seed)
    other.train[held] = 5 * torch.randn(int(held.sum()), 3, 2, 2, generator=torch.Generator().manual_seed(1))
    other.task.search["student"][held] = 3.0
    changed, _ = ride(other, nets, once)
    assert torch.equal(probe._transform.mean, changed._transform.mean)
    assert torch.equal(probe._transform.scale, changed._transform.scale)
    for one, two in zip(probe._heads, changed._heads, strict=True):
        # the same rows reach the head; a convolution in another batch may differ in the last bits
        assert torch.allclose(one.weight, two.weight, atol=1e-5)


def test_a_tenth_of_every_class_is_held_out() -> None:
    label = torch.cat([torch.zeros(30), torch.ones(14), torch.full((2,), 2)]).long()
    held = hold_out(label, seed=0)
    assert [int(held[label == cls].sum()) for cls in range(3)] == [3, 1, 1]
    assert torch.equal(held, hold_out(label, seed=0))
    assert not torch.equal(held, hold_out(label, seed=1))
    with pytest.raises(DataError, match="class number 3 has 1 labelled image"):
        hold_out(torch.cat([label, torch.tensor([3])]), seed=0)


def test_a_rate_that_diverges_is_left_and_all_of_them_are_an_error() -> None:
    probe = CleanProbe("student", torch.randn(20, 4), torch.arange(20) % 2, 2, lambda epoch: [torch.arange(20)], SETTINGS, CPU)
    probe.learn(torch.full((20, 4), torch.nan), torch.arange(20) % 2, 0, 0)
    probe.close_epoch(1)
    with pytest.raises(UserError, match="every learning rate of the grid diverged"):
        probe.outcome(torch.randn(3, 4))


def test_a_shortened_protocol_is_named_so() -> None:
    whole = for_checkpoint()
    assert whole == Linear(clean=True, top5=True) == for_checkpoint(epochs=40)
    check_protocol(whole)
    short = for_checkpoint(epochs=4)
    assert (short.epochs, short.milestones) == (4, (2, 3))
    assert "4 epochs" in short.protocol
    check_protocol(short)
