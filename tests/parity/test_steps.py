"""Three optimiser steps of every method, against the same steps written out by hand."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from isd_repro import methods
from isd_repro.config.params import Efficiency, Numerics, Optim, Step
from isd_repro.interfaces import Batch, Setting
from isd_repro.nn import engine
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.train import loop
from isd_repro.train.checkpoint import RunProgress
from tests.parity.by_hand import Backbone, Hand, frozen

BATCH, CLASSES, STEPS = 8, 3, 3
# Two epochs' drop, and values far from 0 and 1, so that a wrong order or a missing term is far above 1e-10.
OPTIM = Optim(
    epochs=STEPS,
    batch_size=BATCH,
    lr=0.4,
    sgd_momentum=0.8,
    weight_decay=0.03,
    schedule=Step(name="step", milestones=(1, 2), factor=0.5),
)
RATES = (0.4, 0.2, 0.1)
ISD = {"name": "isd", "tau_student": 0.3, "tau_teacher": 0.1, "momentum": 0.6, "bank_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "isd-none": {**ISD, "heads": "none", "bank_init": "reference"},
    "isd-mlp": {**ISD, "heads": "mlp", "bank_init": "unit"},
    "isd-moco": {**ISD, "heads": "moco", "bank_init": "unit", "dim": 5},
    "isd-mlp-5": {**ISD, "heads": "mlp", "bank_init": "unit", "dim": 5},
    "moco": {"name": "moco", "tau": 0.2, "momentum": 0.6, "bank_size": 16, "dim": 5},
    "moco-isd": {"name": "moco", "tau": 0.2, "momentum": 0.6, "bank_size": 16, "heads": "isd"},
    "moco-mlp": {"name": "moco", "tau": 0.2, "momentum": 0.6, "bank_size": 16, "heads": "mlp", "dim": 5},
    "moco-schedule": {
        "name": "moco",
        "tau": 0.2,
        "momentum": 0.6,
        "bank_size": 16,
        "dim": 5,
        "tau_schedule": {"max": 0.9, "half_period": 2},
    },
    "byol": {"name": "byol", "momentum": 0.6},
    "byol-symmetric": {"name": "byol", "momentum": 0.6, "symmetric": True},
    "sce": {"name": "sce", "lam": 0.3, "tau_student": 0.3, "tau_teacher": 0.1, "momentum": 0.6, "bank_size": 16, "dim": 5},
    "sce-mlp": {
        "name": "sce",
        "lam": 0.3,
        "tau_student": 0.3,
        "tau_teacher": 0.1,
        "momentum": 0.6,
        "bank_size": 16,
        "dim": 5,
        "heads": "mlp",
    },
    "msf": {"name": "msf", "neighbours": 3, "momentum": 0.6, "bank_size": 16},
    "cmsf": {"name": "cmsf", "neighbours": 2, "candidates": 4, "momentum": 0.6, "bank_size": 16},
    "compress": {"name": "compress", "teacher": "", "sha256": 64 * "0", "tau": 0.3, "bank_size": 16},
    "simclr": {"name": "simclr", "tau": 0.3, "dim": 5},
    "simsiam": {"name": "simsiam"},
    "supervised": {"name": "supervised"},
}


class Fixed:
    """Batches of noise in float64, one an epoch."""

    steps_per_epoch = 1

    def at(self, step: int) -> Batch:
        draws = torch.Generator().manual_seed(100 + step)
        views = [torch.randn(BATCH, 2, 5, 4, generator=draws, dtype=torch.float64) for _ in range(2)]
        label = torch.randint(CLASSES, (BATCH,), generator=draws)
        return Batch(views[0], views[1], torch.arange(BATCH), label, torch.randperm(BATCH, generator=draws), step)


def build(kind: str, groups: int, numerics: Numerics) -> nn.Module:
    options = dict(METHODS[kind])
    module = methods.load(options.pop("name"))
    other: Any = lambda path, sha256: frozen()  # noqa: E731
    arithmetic = engine.setting_of(numerics)
    setting = Setting(classes=CLASSES, images=BATCH, batch_size=BATCH, steps=STEPS, frozen=other, **arithmetic)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        method: nn.Module = module.Method(module.Config.model_validate(options), Backbone, setting)
        for parameter in method.parameters():  # BatchNorm's 1 and 0 would hide a forgotten weight or bias
            if parameter.requires_grad and parameter.dim() == 1:
                nn.init.normal_(parameter, 0.5, 0.4)
    set_bn_groups(method, groups)
    return method.double()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("chosen", ["reference", "fast"])
def test_three_steps_are_those_of_the_hand(chosen: Literal["reference", "fast"], kind: str, groups: int) -> None:
    numerics = Numerics(bn_groups=groups, engine=chosen)
    method = build(kind, groups, numerics)
    state = {name: value.clone() for name, value in method.state_dict().items() if not name.endswith("_extra_state")}
    start = {name: value.clone() for name, value in state.items()}
    options = {key: value for key, value in METHODS[kind].items() if type(value) in (int, float)}
    hand = Hand(state, kind, options, groups)
    batches, progress = Fixed(), RunProgress()
    for step, lr in enumerate(RATES):
        hand.step(batches.at(step), lr, OPTIM.sgd_momentum, OPTIM.weight_decay)

    optimizer = loop.optimizer_of(method, OPTIM, numerics)
    assert optimizer is not None
    hooks = loop.Hooks(save=lambda now: None, epoch=lambda row: None, tick=lambda step, loss: None, stopped=lambda: False)
    loop.train(method, optimizer, batches, OPTIM, numerics, Efficiency(log_every=1), progress, hooks)

    close = 1e-6 if kind == "supervised" else 1e-10  # `supervised` takes its loss in float32, whatever the network is in
    assert [row["loss"] for row in progress.curve] == pytest.approx(hand.losses, rel=close, abs=1e-12)
    found = {name: value for name, value in method.state_dict().items() if not name.endswith("_extra_state")}
    assert found.keys() == hand.state.keys()
    for name, want in hand.state.items():
        gap = float((found[name] - want.detach()).abs().max())
        assert gap < close, f"{name} is {gap} away"
        assert not torch.equal(found[name], start[name]), f"{name} never moved"
    if "bank.rows" in found:
        assert int(method.state_dict()["bank._extra_state"]) == hand.pointer == STEPS * BATCH % 16
