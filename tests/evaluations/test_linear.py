"""Both linear protocols against a slow oracle in float64; no query and no held-out image has a part in the clean one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from isd_repro.evaluations import linear_clean as clean
from isd_repro.evaluations import linear_head as linear
from isd_repro.evaluations.linear import Config as Linear
from isd_repro.evaluations.linear import check_protocol, for_checkpoint
from isd_repro.evaluations.linear_clean import CleanProbe, hold_out
from isd_repro.evaluations.linear_head import LinearTask
from isd_repro.records import Mask
from isd_repro.runtime.errors import ConfigError, DataError, UserError

CPU = torch.device("cpu")
CLASSES, TRAIN, QUERIES, DIM = 4, 50, 30, 6
Matrix = npt.NDArray[np.float64]
EVERY: Mask = np.ones(TRAIN, dtype=np.bool_)


def network(seed: int) -> nn.Sequential:
    """Its BatchNorm statistics and dropout make training mode visible."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM), nn.BatchNorm1d(DIM), nn.ReLU(), nn.Dropout(0.5))
        for _ in range(3):
            net(torch.randn(16, 3, 2, 2) + 0.5)
    return net


def forward(net: nn.Sequential, images: Tensor) -> Matrix:
    """The network above in eval mode, float64."""
    state = {key: value.double().numpy() for key, value in net.state_dict().items()}
    hidden = images.flatten(1).double().numpy() @ state["1.weight"].T + state["1.bias"]
    hidden = (hidden - state["2.running_mean"]) / np.sqrt(state["2.running_var"] + 1e-5) * state["2.weight"] + state["2.bias"]
    rectified: Matrix = np.maximum(hidden, 0)
    return rectified


def order(epoch: int) -> Sequence[Tensor]:
    """Which images each batch of an epoch shows."""
    return list(torch.randperm(TRAIN, generator=torch.Generator().manual_seed(100 + epoch)).split(16))


class World:
    """Images in classes, noisy copies of them as views, and the task that a stage would make of them."""

    def __init__(self, nets: Mapping[str, nn.Sequential]) -> None:
        draw = torch.Generator().manual_seed(0)
        centre = torch.randn(CLASSES, 3, 2, 2, generator=draw)
        self.label = torch.arange(TRAIN) % CLASSES
        self.train = centre[self.label] + 0.8 * torch.randn(TRAIN, 3, 2, 2, generator=draw)
        self.query_label = torch.arange(QUERIES) % CLASSES
        self.query = centre[self.query_label] + 0.8 * torch.randn(QUERIES, 3, 2, 2, generator=draw)
        self.epochs: list[int] = []
        self.task = LinearTask(
            search={name: torch.from_numpy(forward(net, self.train)).float() for name, net in nets.items()},
            query={name: torch.from_numpy(forward(net, self.query)).float() for name, net in nets.items()},
            query_label=self.query_label,
            classes=CLASSES,
            train_batches=self.batches,
        )

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.epochs.append(epoch)
        draw = torch.Generator().manual_seed(200 + epoch)
        for chosen in order(epoch):
            views = self.train[chosen] + 0.3 * torch.randn(len(chosen), 3, 2, 2, generator=draw)
            yield views, self.label[chosen]


def unit(rows: Matrix) -> Matrix:
    return np.stack([row / max(float(np.sqrt((row**2).sum())), 1e-12) for row in rows])


def standardised(net: nn.Sequential, world: World, taught: Mask, images: Tensor) -> Matrix:
    """Features of some images by the mean and variance of those that are taught."""
    known = unit(forward(net, world.train)[taught])
    mean = known.sum(axis=0) / len(known)
    var = ((known - mean) ** 2).sum(axis=0) / (len(known) - 1)
    scaled: Matrix = (unit(forward(net, images)) - mean) / np.sqrt(var + 1e-5)
    return scaled


def oracle(
    net: nn.Sequential, world: World, settings: Linear, rates: Sequence[float], taught: Mask = EVERY
) -> list[tuple[Matrix, Matrix, float]]:
    """Weight, bias and mean loss of every epoch; only the images that are taught take part."""
    start = linear.new_head(DIM, CLASSES, settings.seed)
    values = {"w": start.weight.detach().double().numpy().copy(), "b": start.bias.detach().double().numpy().copy()}
    speed = {key: np.zeros_like(value) for key, value in values.items()}
    found = []
    for epoch, lr in enumerate(rates):
        total = 0.0
        for (images, label), chosen in zip(world.batches(epoch), order(epoch), strict=True):
            kept = taught[chosen.numpy()]
            z = standardised(net, world, taught, images)[kept]
            logits = z @ values["w"].T + values["b"]
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            p = odds / odds.sum(axis=1, keepdims=True)
            hot = np.eye(CLASSES)[label.numpy()[kept]]
            total -= float(np.log((p * hot).sum(axis=1)).sum())
            error = (p - hot) / kept.sum()
            gradient = {"w": error.T @ z, "b": error.sum(axis=0)}
            for key, value in values.items():
                speed[key] = settings.sgd_momentum * speed[key] + gradient[key] + settings.weight_decay * value
                values[key] = value - lr * speed[key]
        found.append((values["w"], values["b"], total / TRAIN))
    return found


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_weights_losses_and_predictions_equal_the_oracle(epochs: int) -> None:
    settings = Linear(epochs=epochs, lr=0.3, weight_decay=0.01, milestones=(1, 4), factor=0.2, seed=3, protocol="test")
    nets = {"student": network(1), "teacher": network(2)}
    world = World(nets)
    rows: list[Mapping[str, float]] = []
    found = linear.train(nets, world.task, settings, CPU, rows.append)
    assert world.epochs == list(range(epochs))  # both heads ride one pass over the views
    rates = [0.3, 0.06, 0.06, 0.06, 0.012][:epochs]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    for name, net in nets.items():
        epochs_of = oracle(net, world, settings, rates)
        asked = standardised(net, world, EVERY, world.query)
        predictions = [(asked @ weight.T + bias).argmax(axis=1) for weight, bias, _ in epochs_of]
        weight, bias, _ = epochs_of[-1]
        out = found[name]
        assert np.abs(out.head.weight.detach().double().numpy() - weight).max() < 1e-5
        assert np.abs(out.head.bias.detach().double().numpy() - bias).max() < 1e-5
        assert [row[f"{name}/loss"] for row in rows] == pytest.approx([loss for *_, loss in epochs_of], abs=1e-5)
        top1 = [100 * float((guess == world.query_label.numpy()).mean()) for guess in predictions]
        assert [row[f"{name}/top1"] for row in rows] == pytest.approx(top1, abs=1e-9)
        assert out.best_epoch == int(np.argmax(top1)) + 1
        assert out.last.tolist() == predictions[-1].tolist()
        assert out.best.tolist() == predictions[int(np.argmax(top1))].tolist()


def test_best_is_the_first_of_equal_epochs_and_last_stays_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {"student": network(1)}
    world = World(nets)
    bias = [[0, 9, 0, 0], [9, 0, 0, 0], [0, 0, 9, 0]]  # every epoch predicts one class only
    world.query_label[:] = torch.tensor([0, 1] * 10 + [2] * 4 + [3] * 6)
    turn = iter(bias)
    close = linear.PaperHead.close_epoch

    def forced(probe: linear.PaperHead, epoch: int) -> dict[str, float]:
        with torch.no_grad():
            probe.head.weight.zero_()
            probe.head.bias.copy_(torch.tensor(next(turn)))
        return close(probe, epoch)

    monkeypatch.setattr(linear.PaperHead, "close_epoch", forced)
    out = linear.train(nets, world.task, Linear(epochs=3, protocol="test"), CPU)["student"]
    assert out.best_epoch == 1
    assert out.best.tolist() == [1] * QUERIES
    assert out.last.tolist() == [2] * QUERIES


def test_learning_rate_of_every_epoch_of_the_paper() -> None:
    rates = [linear.rate(Linear(), epoch) for epoch in range(40)]
    assert rates[:15] == [0.01] * 15
    assert rates[15:30] == pytest.approx([0.001] * 15, rel=1e-12)
    assert rates[30:] == pytest.approx([0.0001] * 10, rel=1e-12)


def test_statistics_are_those_of_the_normalised_features() -> None:
    law = linear.standardise(torch.tensor([[3.0, 4.0], [8.0, 6.0], [0.0, 2.0]]))
    mean = torch.tensor([(0.6 + 0.8 + 0.0) / 3, (0.8 + 0.6 + 1.0) / 3])
    unit = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    var = (unit - mean).square().sum(dim=0) / 2
    assert torch.allclose(law.mean, mean, atol=1e-6)
    assert torch.allclose(law.scale, (var + 1e-5).sqrt(), atol=1e-6)
    z = law(torch.tensor([[30.0, 40.0]]))
    assert torch.allclose(z[0], (torch.tensor([0.6, 0.8]) - mean) / (var + 1e-5).sqrt(), atol=1e-5)
    with pytest.raises(DataError, match="at least 2 labelled images, found 1"):
        linear.standardise(torch.ones(1, 2))


def test_head_starts_as_nn_linear_does() -> None:
    before = torch.get_rng_state()
    head = linear.new_head(37, 5, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        default = nn.Linear(37, 5)
    assert torch.equal(head.weight, default.weight)
    assert torch.equal(head.bias, default.bias)


def test_backbone_bytes_are_unchanged_and_heads_do_not_know_each_other() -> None:
    nets = {"student": network(1).train(), "teacher": network(2).train()}

    def hashes() -> dict[str, str]:
        return {
            name: hashlib.sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values())).hexdigest()
            for name, net in nets.items()
        }

    before = hashes()
    settings = Linear(epochs=2, protocol="test")
    both = linear.train(nets, World(nets).task, settings, CPU)
    assert hashes() == before
    assert all(parameter.grad is None for net in nets.values() for parameter in net.parameters())
    alone = linear.train({"teacher": nets["teacher"]}, World(nets).task, settings, CPU)
    assert torch.equal(both["teacher"].head.weight, alone["teacher"].head.weight)
    assert not torch.equal(both["teacher"].head.weight, both["student"].head.weight)
    other = linear.train(nets, World(nets).task, settings.model_copy(update={"seed": 1}), CPU)
    assert not torch.equal(both["teacher"].head.weight, other["teacher"].head.weight)


def test_a_loss_that_is_not_finite_stops_the_head() -> None:
    nets = {"student": network(1)}
    world = World(nets)
    world.train[7] = torch.nan
    with pytest.raises(UserError, match=r"'student': loss nan in epoch 1"):
        linear.train(nets, world.task, Linear(epochs=1, protocol="test"), CPU)


def test_only_the_papers_values_may_call_themselves_paper() -> None:
    check_protocol(Linear(seed=4))
    check_protocol(Linear(epochs=10, flip=0.0, protocol="short"))
    with pytest.raises(ConfigError, match=r"epochs 10 \(paper 40\), flip 0.0 \(paper 0.5\)"):
        check_protocol(Linear(epochs=10, flip=0.0))


# --- the clean protocol -------------------------------------------------------------------------------------------------

SETTINGS = Linear(epochs=4, lr=0.2, weight_decay=0.01, milestones=(2,), factor=0.2, seed=3, protocol="test")


def ride(
    world: World, nets: dict[str, nn.Sequential], settings: Linear = SETTINGS
) -> tuple[CleanProbe, dict[str, linear.PaperHead]]:
    probe = CleanProbe("student", world.task.search["student"], world.label, CLASSES, order, settings, CPU)
    return probe, linear.train(nets, world.task, settings, CPU, riders=[probe])


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_heads_choice_and_answers_equal_the_oracle(epochs: int) -> None:
    settings = SETTINGS.model_copy(update={"epochs": epochs})
    nets = {"student": network(1)}
    net, world = nets["student"], World(nets)
    probe, _ = ride(world, nets, settings)
    held = hold_out(world.label, settings.seed).numpy()
    held_z, asked = (standardised(net, world, ~held, images) for images in (world.train[held], world.query))
    rates = [settings.lr * settings.factor ** sum(epoch >= at for at in settings.milestones) for epoch in range(epochs)]
    grids = {factor: oracle(net, world, settings, [factor * rate for rate in rates], ~held) for factor in clean.FACTORS}
    best: tuple[int, int, float] = (-1, 0, 0.0)
    for epoch in range(epochs):
        for factor in clean.FACTORS:
            w, b, _ = grids[factor][epoch]
            correct = int(((held_z @ w.T + b).argmax(axis=1) == world.label.numpy()[held]).sum())
            best = (correct, epoch, factor) if correct > best[0] else best
    out = probe.outcome(world.task.query["student"])
    w, b, _ = grids[best[2]][best[1]]
    assert (out.held_correct, out.epoch, out.lr) == (best[0], best[1] + 1, settings.lr * best[2])
    assert out.held == int(held.sum())
    assert np.abs(out.head.weight.detach().double().numpy() - w).max() < 2e-5
    assert np.abs(out.head.bias.detach().double().numpy() - b).max() < 2e-5
    logits = asked @ w.T + b
    assert out.predicted.tolist() == logits.argmax(axis=1).tolist()
    assert [set(row) for row in out.among.tolist()] == [set(np.argsort(-row)[:5].tolist()) for row in logits]


def test_the_papers_heads_do_not_notice_a_rider() -> None:
    nets = {"student": network(1)}
    alone = linear.train(nets, World(nets).task, SETTINGS, CPU)["student"]
    _, found = ride(World(nets), nets)
    assert torch.equal(found["student"].head.weight, alone.head.weight)
    assert torch.equal(found["student"].last, alone.last)
    assert found["student"].best_epoch == alone.best_epoch


def test_queries_have_no_part_in_the_choice() -> None:
    nets = {"student": network(1)}
    world = World(nets)
    first = ride(world, nets)[0].outcome(world.task.query["student"])
    other = World(nets)
    other.task.query["student"].copy_(torch.randn(other.task.query["student"].shape).abs())
    other.query_label.copy_(other.query_label.flip(0))
    again = ride(other, nets)[0].outcome(world.task.query["student"])
    assert (again.lr, again.epoch, again.held_correct) == (first.lr, first.epoch, first.held_correct)
    assert torch.equal(again.head.weight, first.head.weight)


def test_held_out_images_have_no_part_in_the_head_or_its_statistics() -> None:
    nets = {"student": network(1)}
    once = SETTINGS.model_copy(update={"epochs": 1})
    world = World(nets)
    probe, _ = ride(world, nets, once)
    other = World(nets)
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
