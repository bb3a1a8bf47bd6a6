"""What every method has to keep under both engines: each file in isd_repro/methods is tested, the next one too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isd_repro import methods
from isd_repro.config.params import Efficiency, Numerics
from isd_repro.interfaces import Batch
from isd_repro.tensor_files import load_tensors, save_tensors
from isd_repro.train import checkpoint, loop, schedule
from tests.conformance import problem
from tests.conformance.problem import (
    BATCH,
    EPOCHS,
    STEPS_PER_EPOCH,
    Noise,
    assert_equal_states,
    build,
    losses,
    optimizer_of,
    profile_options,
    train,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "NUMERICS", Numerics(engine=getattr(request, "param", "reference")))


NAMES = problem.names()
CASES = [*(("reference", name) for name in NAMES), *(("fast", name) for name in NAMES if problem.has_fast_form(name))]
each_method = pytest.mark.parametrize(("engine", "name"), CASES, indirect=["engine"])


def loss_of(method: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = method(batch).loss
    return loss


def encoders_of(method: nn.Module) -> dict[str, nn.Module]:
    return dict(method.encoders)  # type: ignore[arg-type]


def has_teacher(method: nn.Module) -> bool:
    return "teacher" in encoders_of(method)


def is_symmetric(method: nn.Module) -> bool:
    return bool(getattr(method, "symmetric", False))


def test_a_method_without_a_run_is_no_silent_gap() -> None:
    with pytest.raises(AssertionError, match="add a run with method vicreg to a params"):
        profile_options("vicreg")


def test_isd_says_its_dim_only_where_it_is_given() -> None:
    """So the fingerprints of runs from before there was the key stay what they are."""
    given = {"tau_student": 0.1, "tau_teacher": 0.1, "momentum": 0.9, "bank_size": 16, "heads": "mlp"}
    config_of = methods.load("isd").Config.model_validate
    assert config_of(given).model_dump() == {**given, "bank_init": "unit"}
    assert config_of({**given, "dim": 6}).model_dump() == {**given, "bank_init": "unit", "dim": 6}
    with pytest.raises(ValueError, match="heads none compares the pooled features themselves"):
        config_of({**given, "heads": "none", "dim": 6})


@pytest.mark.parametrize(("heads", "dim"), [("none", 32), ("mlp", 8), ("moco", 32)])
def test_without_dim_isds_embedding_has_the_width_of_its_heads(heads: str, dim: int) -> None:
    method = build("isd", options={**profile_options("isd"), "heads": heads, "dim": None})
    assert method.bank.rows.shape == (2 * BATCH, dim)  # type: ignore[union-attr]


# --- seeds --------------------------------------------------------------------------------------------------------------


@each_method
def test_equal_seeds_give_equal_losses_and_others_do_not(name: str) -> None:
    first = losses(build(name, seed=3), 0, 5)
    torch.manual_seed(999)  # the global generator has no part in a step
    assert losses(build(name, seed=3), 0, 5) == first
    assert all(one != other for one, other in zip(losses(build(name, seed=4), 0, 5), first, strict=True))
    assert all(one != other for one, other in zip(losses(build(name, seed=3), 0, 5, seed=1), first, strict=True))


@each_method
def test_a_step_draws_nothing_from_the_global_generator(name: str) -> None:
    method = build(name)
    state = torch.get_rng_state()
    losses(method, 0, 2)
    assert torch.equal(torch.get_rng_state(), state)


# --- gradients ----------------------------------------------------------------------------------------------------------


@each_method
def test_gradients_reach_the_whole_student_and_no_teacher(name: str) -> None:
    method = build(name)
    optimizer = optimizer_of(method)
    losses(method, 0, 2, optimizer)
    batch = Noise().at(2)
    batch = replace(batch, view_student=batch.view_student.requires_grad_(), view_teacher=batch.view_teacher.requires_grad_())
    optimizer.zero_grad(set_to_none=True)
    loss_of(method, batch).backward()
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key, parameter in method.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), key
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key} takes no part in the loss"
            assert bool(parameter.grad.isfinite().all()), key
            if parameter.dim() > 1:
                assert float(parameter.grad.abs().max()) > 0, key
        else:
            assert parameter.grad is None, key
    student = encoders_of(method)["student"]
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert batch.view_student.grad is not None
    assert float(batch.view_student.grad.abs().amax((1, 2, 3)).min()) > 0
    if has_teacher(method):
        teacher = encoders_of(method)["teacher"]
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (batch.view_teacher.grad is not None and bool(batch.view_teacher.grad.any())) == is_symmetric(method)


@each_method
def test_the_second_view_matters_exactly_where_something_looks_at_it(name: str) -> None:
    method, other = build(name), build(name)
    batch = Noise().at(0)
    changed = replace(batch, view_teacher=batch.view_teacher.flip(3))
    looks = has_teacher(method) or is_symmetric(method)
    assert (loss_of(method, batch).item() != loss_of(other, changed).item()) == looks


@each_method
def test_labels_are_read_by_methods_that_say_so_alone(name: str) -> None:
    """Over three steps: a bank could keep labels for later."""
    found = []
    for turn in (0, 1):
        method = build(name)
        batches = [replace(batch, label=batch.label.roll(turn)) for batch in map(Noise().at, range(3))]
        found.append([loss_of(method, batch).item() for batch in batches])
    assert (found[0] != found[1]) == getattr(build(name), "needs_labels", False)


# --- state --------------------------------------------------------------------------------------------------------------


@each_method
def test_a_step_moves_every_part_of_the_state(name: str) -> None:
    """A tensor that never changes would make the tests of resuming blind to it."""
    method = build(name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    losses(method, 0, 3)
    still = [key for key, value in method.state_dict().items() if torch.equal(value, before[key])]
    assert still == []


@each_method
def test_a_resumed_run_is_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    problem.assert_resumes_exactly(name, tmp_path / "checkpoint.pt")


@each_method
def test_logging_and_saving_change_nothing(name: str, tmp_path: Path) -> None:
    plain = build(name)
    undisturbed = train(plain, efficiency=Efficiency(log_every=1000, checkpoint_every=1000))
    busy = build(name)
    optimizer = optimizer_of(busy)
    saved: list[int] = []

    def save(now: checkpoint.RunProgress) -> None:
        saved.append(now.step)
        checkpoint.save(tmp_path / "checkpoint.pt", "0123", busy, optimizer, now)

    found = train(busy, optimizer, efficiency=Efficiency(log_every=1, checkpoint_every=1), save=save)
    assert saved == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    assert found.curve == undisturbed.curve
    assert_equal_states(plain, busy)


# --- shuffle-BN ---------------------------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("groups", [1, 2])
def test_the_shuffle_matters_with_several_batchnorm_groups_alone(name: str, groups: int) -> None:
    found = []
    for order in (torch.arange(BATCH), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])):
        method = build(name, groups=groups).double()
        batches = [replace(batch, shuffle=order) for batch in map(Noise(dtype=torch.float64).at, range(3))]
        found.append([loss_of(method, batch).item() for batch in batches])
    apart = max(abs(one - other) for one, other in zip(*found, strict=True))
    if groups == 2 and has_teacher(build(name)):
        assert apart > 1e-6
    else:
        assert apart < 1e-10


@each_method
def test_a_teacher_sees_its_view_in_the_drawn_order(name: str) -> None:
    """What enters the teacher's backbone is the view, permuted by the batch's shuffle and by nothing else."""
    method = build(name)
    if not has_teacher(method):
        return
    seen: list[Tensor] = []
    teacher = encoders_of(method)["teacher"]
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = Noise().at(0)
    method(batch)
    assert torch.equal(seen[0], batch.view_teacher[batch.shuffle])
    assert [torch.equal(each, batch.view_student[batch.shuffle]) for each in seen[1:]] == [True] * is_symmetric(method)


@each_method
def test_the_average_is_updated_once_in_a_step(name: str) -> None:
    """However often the teacher is asked. All methods call the EMA factor `momentum`."""
    method = build(name)
    if not has_teacher(method):
        return
    losses(method, 0, 1)  # so that student and teacher differ
    encoders = encoders_of(method)
    pairs = zip(encoders["teacher"].parameters(), encoders["student"].parameters(), strict=True)
    momentum: float = method.config.momentum  # type: ignore[assignment,union-attr]
    want = [ours.detach().lerp(theirs.detach(), 1 - momentum) for ours, theirs in pairs]
    loss_of(method, Noise().at(1))
    for ours, expected in zip(encoders["teacher"].parameters(), want, strict=True):
        torch.testing.assert_close(ours.detach(), expected)


# --- optimizer ----------------------------------------------------------------------------------------------------------


@each_method
def test_fixed_modules_keep_their_learning_rate(name: str) -> None:
    method = build(name)
    optimizer = optimizer_of(method)
    train(method, optimizer)
    fixed = {id(weight) for module in getattr(method, "fixed_lr", ()) for weight in module.parameters()}
    found = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    last = schedule.lr_at(EPOCHS, problem.OPTIM)
    assert last < problem.OPTIM.lr
    assert found == {key: problem.OPTIM.lr if key in fixed else last for key in found}
    assert fixed <= found.keys()


@pytest.mark.parametrize("chosen", ["lars", "adamw"])
def test_a_run_resumes_exactly_under_every_optimizer(chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "OPTIM", problem.OPTIM.model_copy(update={"name": chosen}))
    problem.assert_resumes_exactly("isd", tmp_path / "checkpoint.pt")


def test_norms_and_biases_are_excluded_from_weight_decay_where_asked() -> None:
    method = build("isd")
    optim = problem.OPTIM.model_copy(update={"exclude_norm_and_bias": True})
    groups = loop.optimizer_of(method, optim).param_groups
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    trained = [weight for weight in method.parameters() if weight.requires_grad]
    assert decays == {id(weight): optim.weight_decay if weight.dim() > 1 else 0.0 for weight in trained}
    assert [group["weight_decay"] for group in optimizer_of(method).param_groups] == [problem.OPTIM.weight_decay]


# --- what is exported ---------------------------------------------------------------------------------------------------


@each_method
def test_encoders_are_backbones_without_heads(name: str) -> None:
    method = build(name)
    encoders = encoders_of(method)
    assert list(encoders) in (["student"], ["student", "teacher"])
    parts = {id(part) for part in method.modules()}
    for which, encoder in encoders.items():
        assert id(encoder) in parts, which
        features = encoder(torch.zeros(3, 1, 8, 8))
        assert features.shape == (3, encoder.features), which
    names = [list(encoder.state_dict()) for encoder in encoders.values()]
    assert all(found == names[0] for found in names)
    assert "conv1.weight" in names[0]
    assert not any(key.startswith(("projector", "predictor", "classifier", "fc")) for key in names[0])


@each_method
def test_channels_last_changes_neither_the_state_nor_what_is_exported(name: str, tmp_path: Path) -> None:
    plain, last = build(name), build(name)
    last = last.to(memory_format=torch.channels_last)
    assert_equal_states(plain, last)
    train(last)
    for which, encoder in encoders_of(last).items():
        path = tmp_path / which
        save_tensors(path, "encoder", encoder.state_dict(), {})
        tensors, _ = load_tensors(path, "encoder")
        assert tensors.keys() == encoder.state_dict().keys()
        assert all(torch.equal(tensors[key], value) for key, value in encoder.state_dict().items())
    other = build(name)
    other.load_state_dict(last.state_dict())
    assert_equal_states(other, last)
    close = [one == pytest.approx(two, rel=1e-4) for one, two in zip(losses(other, 0, 2), losses(last, 0, 2), strict=True)]
    assert all(close)
