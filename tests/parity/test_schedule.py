"""The learning rate of every epoch of every run in every profile, and the paper's rates as typed numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from isd_repro.config import reader as config
from isd_repro.config.params import Cosine, Optim, Step
from isd_repro.nn.temperature import TauSchedule, tau_at
from isd_repro.train.schedule import lr_at

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]


def rates(optim: Optim) -> list[float]:
    """Walk through the epochs: a drop acts after its epoch; half a cosine is a squared one of half the angle."""
    rate, found = optim.lr, []
    for epoch in range(1, optim.epochs + 1):
        if isinstance(optim.schedule, Step):
            found.append(rate)
            if epoch in optim.schedule.milestones:
                rate *= optim.schedule.factor
        else:
            found.append(optim.lr * math.cos(math.pi / 2 * (epoch - 1) / optim.epochs) ** 2)
    return found


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_every_epoch_of_every_run(path: Path) -> None:
    for name, run in config.load(path)[0].runs.items():
        found = [lr_at(epoch, run.optim) for epoch in range(1, run.optim.epochs + 1)]
        assert found == pytest.approx(rates(run.optim), rel=1e-9), name


def test_the_papers_step_schedule() -> None:
    """UMBCvision/ISD, train_isd.py: 0.01, times 0.2 after epochs 140 and 180."""
    optim = config.load(ROOT / "pipelines" / "imagenet" / "params.yaml")[0].runs["isd-r18"].optim
    want = [0.01] * 140 + [0.002] * 40 + [0.0004] * 20
    assert [lr_at(epoch, optim) for epoch in range(1, 201)] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("run", "lr"), [("isd-r50", 0.05), ("byol-r18", 0.05), ("byol-r50", 0.05), ("moco-r18", 0.03), ("moco-r50", 0.03)]
)
def test_the_papers_cosine(run: str, lr: float) -> None:
    """lr (1 + cos(pi (e - 1) / 200)) / 2 by hand: full at 1, 0.853553 at 51, half at 101, 0.146447 at 151, 6.1684e-5 at 200."""
    optim = config.load(ROOT / "pipelines" / "imagenet" / "params.yaml")[0].runs[run].optim
    shares = {1: 1.0, 51: 0.8535533906, 101: 0.5, 151: 0.1464466094, 200: 6.168375e-5}
    assert {epoch: lr_at(epoch, optim) / lr for epoch in shares} == pytest.approx(shares, rel=1e-6)


def test_a_milestone_acts_after_its_epoch_whatever_the_order() -> None:
    optim = Optim(epochs=6, batch_size=1, lr=8.0, schedule=Step(name="step", milestones=(4, 2), factor=0.5))
    assert [lr_at(epoch, optim) for epoch in range(1, 7)] == [8, 8, 4, 4, 2, 2]


def test_the_cosine_never_reaches_zero_and_falls_at_every_epoch() -> None:
    optim = Optim(epochs=7, batch_size=1, lr=1.0, schedule=Cosine(name="cosine"))
    found = [lr_at(epoch, optim) for epoch in range(1, 8)]
    assert found == sorted(set(found), reverse=True)
    assert found[-1] > 0


def test_warmup_rises_to_the_learning_rate_and_the_cosine_covers_the_rest() -> None:
    optim = Optim(epochs=6, batch_size=1, lr=1.0, schedule=Cosine(name="cosine"), warmup_epochs=2)
    after = [lr_at(epoch, optim.model_copy(update={"epochs": 4, "warmup_epochs": 0})) for epoch in range(1, 5)]
    assert [lr_at(epoch, optim) for epoch in range(1, 7)] == [0.5, 1.0, *after]
    with pytest.raises(ValueError, match="the warm-up must end before the training"):
        Optim(epochs=2, batch_size=1, lr=1.0, schedule=Cosine(name="cosine"), warmup_epochs=2)


def test_temperature_schedule_by_hand() -> None:
    """0.1 to 0.5 with a half period of 200 epochs of 3 steps: cos(pi / 200), then the middle, the end, and back."""
    schedule = TauSchedule(max=0.5, half_period=200)
    found = [tau_at(3 * (epoch - 1) + 2, 3, 0.1, schedule) for epoch in (1, 100, 200, 400)]
    assert found == pytest.approx([0.1 + 0.2 * (1 + math.cos(math.pi / 200)), 0.3, 0.1, 0.5], rel=1e-12)
    assert tau_at(7, 3, 0.2, None) == 0.2
