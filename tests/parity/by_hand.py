"""Training steps written out by hand in float64: forward passes, losses, teacher, bank and SGD, with no call of the package.

Only the differentiation is PyTorch's. Networks are dictionaries of tensors with the names of the state dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from isd_repro.interfaces import Batch

State = dict[str, Tensor]
EPS, BN_MOMENTUM = 1e-5, 0.1
# kinds whose projector has no BatchNorm and is followed by no predictor
MOCO_HEADS = ("moco", "moco-schedule", "isd-moco", "sce", "simclr")


class Backbone(nn.Module):
    """The network under test: convolution, BatchNorm, ReLU, mean; small, but every kind of state is there."""

    def __init__(self) -> None:
        super().__init__()
        self.features = 8
        self.conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.conv(images)).relu().mean((2, 3))
        return hidden


def frozen() -> Backbone:
    """An encoder as a file would give it: the same weights and running statistics at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = Backbone().double().requires_grad_(False)
        found(torch.randn(16, 2, 5, 4, dtype=torch.float64))
    return found.eval()


def batchnorm(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    """Rows x channels x positions; each contiguous part by itself, running values the average over parts."""
    outputs, means, variances = [], [], []
    for part in x.split(len(x) // groups):
        mean = part.mean((0, 2), keepdim=True)
        centred = part - mean
        variance = centred.square().mean((0, 2), keepdim=True)
        count = part.shape[0] * part.shape[2]
        normed = centred / (variance + EPS).sqrt()
        if f"{name}.weight" in state:
            normed = normed * state[f"{name}.weight"][:, None] + state[f"{name}.bias"][:, None]
        outputs.append(normed)
        means.append(mean.flatten().detach())
        variances.append(variance.flatten().detach() * count / (count - 1))
    for key, values in (("running_mean", means), ("running_var", variances)):
        fresh = sum(values) / groups
        state[f"{name}.{key}"] = (1 - BN_MOMENTUM) * state[f"{name}.{key}"] + BN_MOMENTUM * fresh
    state[f"{name}.num_batches_tracked"] = state[f"{name}.num_batches_tracked"] + 1
    return torch.cat(outputs)


def backbone(state: State, name: str, images: Tensor, groups: int) -> Tensor:
    """3 x 3 convolution as a sum over nine shifted images."""
    batch, _, height, width = images.shape
    padded = torch.zeros(batch, 2, height + 2, width + 2, dtype=images.dtype)
    padded[:, :, 1:-1, 1:-1] = images
    weight = state[f"{name}.conv.weight"]
    hidden = torch.zeros(batch, 8, height, width, dtype=images.dtype)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            hidden = hidden + torch.einsum("oc,bchw->bohw", weight[:, :, row, column], shifted)
    normed = batchnorm(state, f"{name}.norm", hidden.flatten(2), groups)
    return (normed * (normed > 0)).mean(2)


def mlp(state: State, name: str, x: Tensor, groups: int, norm: bool = True) -> Tensor:
    """Linear, BatchNorm where there is one, ReLU, Linear."""
    hidden = x @ state[f"{name}.0.weight"].T
    if f"{name}.0.bias" in state:
        hidden = hidden + state[f"{name}.0.bias"]
    if norm:
        hidden = batchnorm(state, f"{name}.1", hidden[:, :, None], groups)[:, :, 0]
    last = 3 if norm else 2
    return (hidden * (hidden > 0)) @ state[f"{name}.{last}.weight"].T + state[f"{name}.{last}.bias"]


def simsiam_projector(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    """Linear and BatchNorm three times, ReLU behind the first two."""
    for linear in (0, 3, 6):
        x = batchnorm(state, f"{name}.{linear + 1}", (x @ state[f"{name}.{linear}.weight"].T)[:, :, None], groups)[:, :, 0]
        x = x * (x > 0) if linear < 6 else x
    return x


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(1, keepdim=True).log()


@dataclass
class Hand:
    """A method's whole state and its optimiser's, moved by `step`."""

    state: State  # every tensor of the method, the bank's rows included
    kind: str  # the loss, or the loss and the heads it has
    options: dict[str, float]
    groups: int
    pointer: int = 0
    first_lr: float = 0.0
    velocity: State = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    def embed(self, who: str, images: Tensor) -> Tensor:
        """The student's or the teacher's embedding, before a predictor."""
        if self.kind == "supervised":
            return backbone(self.state, who, images, self.groups)
        hidden = backbone(self.state, f"{who}.backbone", images, self.groups)
        if self.kind == "isd-none":
            return hidden
        if self.kind == "compress":
            return hidden @ self.state[f"{who}.projector.weight"].T + self.state[f"{who}.projector.bias"]
        if self.kind == "simsiam":
            return simsiam_projector(self.state, f"{who}.projector", hidden, self.groups)
        return mlp(self.state, f"{who}.projector", hidden, self.groups, norm=self.kind not in MOCO_HEADS)

    def step(self, batch: Batch, lr: float, sgd_momentum: float, weight_decay: float) -> None:
        """Student, teacher's weights, shuffled teacher, old bank, enqueue, SGD: in this order."""
        self.first_lr = self.first_lr or lr
        weights = [name for name in self.state if self.trained(name)]
        for name in weights:
            self.state[name] = self.state[name].detach().requires_grad_()
        loss = self.loss(batch)
        gradients = torch.autograd.grad(loss, [self.state[name] for name in weights])
        self.losses.append(float(loss.detach()))
        for name, gradient in zip(weights, gradients, strict=True):
            slope = gradient + weight_decay * self.state[name].detach()
            self.velocity[name] = sgd_momentum * self.velocity[name] + slope if name in self.velocity else slope
            fixed = self.kind == "simsiam" and name.startswith("predictor.")
            self.state[name] = self.state[name].detach() - (self.first_lr if fixed else lr) * self.velocity[name]

    def trained(self, name: str) -> bool:
        return name.startswith(("student.", "predictor.", "classifier.")) and name.endswith(("weight", "bias"))

    def loss(self, batch: Batch) -> Tensor:
        if self.kind in ("simclr", "simsiam"):
            return self.symmetric_loss(batch)
        hidden = self.embed("student", batch.view_student)
        if self.kind == "supervised":
            logits = hidden @ self.state["classifier.weight"].T + self.state["classifier.bias"]
            return -log_softmax(logits)[torch.arange(len(logits)), batch.label].mean()
        alone = self.kind in MOCO_HEADS or self.kind == "compress"
        student = unit(hidden if alone else mlp(self.state, "predictor", hidden, self.groups))
        self.average()
        if self.kind == "compress":
            teacher = unit(frozen()(batch.view_student))
        else:
            teacher = self.taught(batch.view_teacher, batch.shuffle)
        if self.kind.startswith("byol"):
            distance = (2 - 2 * (student * teacher).sum(1)).mean()
            if self.kind == "byol":
                return distance
            other = unit(mlp(self.state, "predictor", self.embed("student", batch.view_teacher), self.groups))
            return distance + (2 - 2 * (other * self.taught(batch.view_student, batch.shuffle)).sum(1)).mean()
        old = self.state["bank.rows"].clone()
        before = self.state["last"][batch.index] if self.kind == "cmsf" else teacher
        for at, row in enumerate(teacher):
            self.state["bank.rows"][self.pointer] = row
            if self.kind == "cmsf":
                self.state["second.rows"][self.pointer] = before[at]
                self.state["last"][batch.index[at]] = row
            self.pointer = (self.pointer + 1) % len(old)
        if self.kind == "cmsf":
            return self.constrained(student, teacher, before)
        if self.kind == "msf":
            bank = self.state["bank.rows"]
            nearest = [
                sorted(range(len(bank)), key=lambda at: -float(k @ bank[at]))[: int(self.options["neighbours"])] for k in teacher
            ]
            return torch.stack([2 - 2 * q @ bank[at] for q, those in zip(student, nearest, strict=True) for at in those]).mean()
        logits = torch.cat([(student * teacher).sum(1)[:, None], student @ old.T], dim=1)
        if self.kind.startswith("moco"):
            return -log_softmax(logits / self.tau(batch.step))[:, 0].mean()
        if self.kind.startswith("sce"):
            spread = (teacher @ old.T / self.options["tau_teacher"]).exp()
            soft = (1 - self.options["lam"]) * spread / spread.sum(1, keepdim=True)
            target = torch.cat([torch.full((len(soft), 1), self.options["lam"], dtype=soft.dtype), soft], dim=1)
            return -(target * log_softmax(logits / self.options["tau_student"])).sum(1).mean()
        tau_student, tau_teacher = (self.options.get(key, self.options.get("tau", 0.0)) for key in ("tau_student", "tau_teacher"))
        log_student = log_softmax(student @ old.T / tau_student)
        log_teacher = log_softmax(teacher @ old.T / tau_teacher)
        return (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()

    def constrained(self, student: Tensor, teacher: Tensor, before: Tensor) -> Tensor:
        bank, second, terms = self.state["bank.rows"], self.state["second.rows"], []
        for q, k, then in zip(student, teacher, before, strict=True):
            order = sorted(range(len(bank)), key=lambda at: -float(k @ bank[at]))
            related = sorted(range(len(bank)), key=lambda at: -float(then @ second[at]))[: int(self.options["candidates"])]
            for chosen in (order, [at for at in order if at in related]):
                terms += [2 - 2 * q @ bank[at] for at in chosen[: int(self.options["neighbours"])]]
        return torch.stack(terms).mean()

    def symmetric_loss(self, batch: Batch) -> Tensor:
        one, other = self.embed("student", batch.view_student), self.embed("student", batch.view_teacher)
        if self.kind == "simsiam":
            first, second = (unit(mlp(self.state, "predictor", each, self.groups)) for each in (one, other))
            return -((first * unit(other).detach()).sum(1) + (second * unit(one).detach()).sum(1)).mean() / 2
        rows = torch.cat([unit(one), unit(other)])
        terms, half = [], len(one)
        for at, row in enumerate(rows):
            powers = [(row @ each / self.options["tau"]).exp() for place, each in enumerate(rows) if place != at]
            terms.append(torch.stack(powers).sum().log() - row @ rows[(at + half) % len(rows)] / self.options["tau"])
        return torch.stack(terms).mean()

    def tau(self, step: int) -> float:
        """An epoch is a step here; the schedule goes from 0.9 to 0.2 in two epochs."""
        low = self.options["tau"]
        return low + (0.9 - low) * (1 + math.cos(math.pi * (step + 1) / 2)) / 2 if self.kind == "moco-schedule" else low

    @torch.no_grad()
    def average(self) -> None:
        share: Callable[[str], Tensor] = lambda name: self.state[name.replace("teacher.", "student.", 1)].detach()  # noqa: E731
        for name in self.state:
            if name.startswith("teacher.") and name.endswith(("weight", "bias")):
                self.state[name] = self.options["momentum"] * self.state[name] + (1 - self.options["momentum"]) * share(name)

    @torch.no_grad()
    def taught(self, view: Tensor, shuffle: Tensor) -> Tensor:
        shuffled = unit(self.embed("teacher", torch.stack([view[at] for at in shuffle.tolist()])))
        rows: list[Tensor] = [torch.empty(0)] * len(shuffled)
        for position, at in enumerate(shuffle.tolist()):
            rows[at] = shuffled[position]
        return torch.stack(rows)
