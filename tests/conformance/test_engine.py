"""The engines: what `fast` changes and by how much, what it leaves alone, and the levers that need no switch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isd_repro import methods
from isd_repro.config import fingerprint
from isd_repro.nn import ema, engine
from isd_repro.params import Efficiency, Numerics
from isd_repro.protocols import Batch
from tests.conformance import problem
from tests.conformance.problem import Noise, build, losses, train

FAST, REFERENCE = Numerics(engine="fast"), Numerics()
BANKED = ("isd", "moco")


def built(name: str, numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(problem, "NUMERICS", numerics)
    return build(name)


# --- what a run says ----------------------------------------------------------------------------------------------------


def test_the_default_is_in_no_config_and_fast_is() -> None:
    before = {"seed": 0, "bn_groups": 1, "precision": "float32"}
    assert REFERENCE.model_dump(mode="json") == before
    assert Numerics.model_validate(before) == Numerics(engine="reference") == REFERENCE
    assert FAST.model_dump(mode="json") == {**before, "engine": "fast"}
    assert Numerics.model_validate(FAST.model_dump(mode="json")) == FAST
    assert fingerprint(FAST.model_dump(mode="json")) != fingerprint(before)


def test_what_fast_chose_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.kernels_of(built("isd", FAST, monkeypatch), FAST) == ", bank attention chunked on float32"
    assert engine.kernels_of(built("byol", FAST, monkeypatch), FAST) == ""
    assert engine.kernels_of(built("isd", REFERENCE, monkeypatch), REFERENCE) == ""
    assert engine.setting_of(Numerics(engine="fast", precision="bf16"))["bank_dtype"] == torch.float16
    assert engine.setting_of(Numerics(precision="bf16"))["bank_dtype"] == torch.float32


# --- fast beside reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.names())
def test_fast_is_the_same_training_but_for_roundings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps in float64: to 1e-9. In float32, where BatchNorm over eight images amplifies last bits, the first steps."""
    found: dict[str, list[float]] = {}
    for numerics in (REFERENCE, FAST):
        method = built(name, numerics, monkeypatch).double()
        batches = [batch64(step) for step in range(problem.STEPS)]
        found[numerics.engine] = problem.steps(method, batches, problem.optimizer_of(method))
        found[f"{numerics.engine}, float32"] = losses(built(name, numerics, monkeypatch), 0, 4)
    assert found["fast"] == pytest.approx(found["reference"], rel=1e-9)
    assert found["fast, float32"] == pytest.approx(found["reference, float32"], rel=2e-4)
    assert (found["fast"] == found["reference"]) == (name not in BANKED)  # so that the engine is really another


def batch64(step: int) -> Batch:
    batch = Noise().at(step)
    return Batch(batch.view_student.double(), batch.view_teacher.double(), batch.index, batch.label, batch.shuffle)


def test_a_float16_bank_trains_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bf16 itself needs CUDA; the bank that goes with it does not."""
    half = Numerics(engine="fast", precision="bf16")
    for name in BANKED:
        method, plain = built(name, half, monkeypatch), built(name, REFERENCE, monkeypatch)
        assert method.get_buffer("bank.rows").dtype == torch.float16
        assert losses(method, 0, 2) == pytest.approx(losses(plain, 0, 2), rel=5e-3)
        torch.save(method.state_dict(), tmp_path / "state")
        other = built(name, half, monkeypatch)
        other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert torch.equal(other.get_buffer("bank.rows"), method.get_buffer("bank.rows"))
        assert losses(other, 2, 4) == losses(method, 2, 4)


# --- levers without a switch --------------------------------------------------------------------------------------------


def test_the_teachers_average_is_in_place_and_equal_to_one_tensor_at_a_time() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 7)), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 7))
    want = [ours.lerp(theirs, 1 - 0.99) for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True)]
    places = [parameter.data_ptr() for parameter in teacher.parameters()]
    ema.update(teacher, student, 0.99)
    assert all(torch.equal(ours, one.detach()) for ours, one in zip(teacher.parameters(), want, strict=True))
    assert [parameter.data_ptr() for parameter in teacher.parameters()] == places


@pytest.mark.parametrize("name", methods.names())
def test_the_teachers_forward_records_no_graph(name: str) -> None:
    method = build(name)
    teachers = [module for key, module in method.named_children() if key == "teacher"]
    recorded: list[bool] = []
    for teacher in teachers:
        teacher.register_forward_hook(lambda module, args, out: recorded.append(out.requires_grad or torch.is_grad_enabled()))
    losses(method, 0, 1)
    assert recorded == [False] * len(teachers)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a tensor read as a number, or a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += str(function) in {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}
        return function(*args, **(kwargs or {}))


class Ready:
    """Batches that were made before."""

    steps_per_epoch = problem.STEPS_PER_EPOCH

    def __init__(self) -> None:
        self.made = [Noise().at(step) for step in range(problem.STEPS)]

    def at(self, step: int) -> Batch:
        return self.made[step]


@pytest.mark.parametrize("numerics", [REFERENCE, FAST], ids=["reference", "fast"])
@pytest.mark.parametrize("name", methods.names())
def test_the_loop_reads_no_number_between_two_log_lines(name: str, numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> None:
    """With log lines at epochs' ends alone, an epoch of four steps reads as often as an epoch of one."""
    ready = Ready()
    monkeypatch.setattr(problem, "Noise", lambda seed: ready)
    counts = {}
    for steps, epochs in ((4, 3), (1, 3)):
        monkeypatch.setattr(ready, "steps_per_epoch", steps)
        monkeypatch.setattr(problem, "OPTIM", problem.OPTIM.model_copy(update={"epochs": epochs}))
        with Reads() as reads:
            train(built(name, numerics, monkeypatch), efficiency=Efficiency(log_every=1000, checkpoint_every=1000))
        counts[steps] = reads.count
    assert counts[4] == counts[1] > 0
    monkeypatch.setattr(ready, "steps_per_epoch", 4)
    with Reads() as reads:
        train(built(name, numerics, monkeypatch), efficiency=Efficiency(log_every=1, checkpoint_every=1000))
    assert reads.count > counts[4]
