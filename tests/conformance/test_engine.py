"""The engines: what `fast` changes and by how much, what it leaves alone, and the levers that need no switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isd_repro import methods
from isd_repro.config.params import Efficiency, Numerics
from isd_repro.config.reader import fingerprint
from isd_repro.data import augment
from isd_repro.nn import ema, engine
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import DataError
from isd_repro.train import checkpoint
from isd_repro.train.checkpoint import RunProgress
from tests.conformance import problem
from tests.conformance.problem import Noise, build, losses

FAST, REFERENCE = Numerics(engine="fast"), Numerics()
CPU = torch.device("cpu")


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
    assert engine.kernels_of(built("isd", FAST, monkeypatch), FAST) == ", bank attention onednn on float32"
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
        batches = [Noise(dtype=torch.float64).at(step) for step in range(problem.STEPS)]
        found[numerics.engine] = problem.steps(method, batches, problem.optimizer_of(method))
        found[f"{numerics.engine}, float32"] = losses(built(name, numerics, monkeypatch), 0, 4)
    assert found["fast"] == pytest.approx(found["reference"], rel=1e-9)
    assert found["fast, float32"] == pytest.approx(found["reference, float32"], rel=2e-4)
    assert (found["fast"] == found["reference"]) == (not problem.has_fast_form(name))  # so that the engine is really another


def test_a_float16_bank_trains_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The bank that goes with bf16, under float32 networks."""
    half = Numerics(engine="fast", precision="bf16")
    for name in filter(problem.has_fast_form, methods.names()):
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


# --- torch.compile --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes the rule name a backend on the CPU, too, where engine `fast` is asked for."""

    def use(backend: str) -> None:
        monkeypatch.setattr(engine, "compiler_of", lambda device, numerics: backend if numerics.engine == "fast" else "")

    yield use
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def compiled(name: str, monkeypatch: pytest.MonkeyPatch, numerics: Numerics = FAST) -> tuple[nn.Module, str]:
    """A method and what its record would say."""
    method = built(name, numerics, monkeypatch)
    words = engine.compile_(dict(method.encoders), lambda: Noise().at(0).view_student, CPU, numerics)  # type: ignore[arg-type]
    return method, words


def test_the_rule_of_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.compiler_of(torch.device("cuda"), FAST) == "inductor"
    assert engine.compiler_of(torch.device("cuda"), REFERENCE) == engine.compiler_of(CPU, FAST) == ""
    assert engine.changes_of(augment.CHANGES, CPU, FAST) is augment.CHANGES
    monkeypatch.setattr(ranks, "world", lambda: 2)
    assert engine.compiler_of(torch.device("cuda"), FAST) == ""


@pytest.fixture
def graphs(compiler: Callable[[str], None]) -> list[int]:
    """Filled with one entry for every graph that is compiled."""
    found: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        found.append(len(graph.graph.nodes))
        return graph.forward

    compiler(counting)  # type: ignore[arg-type]
    return found


def test_the_encoders_really_run_through_the_compiler(graphs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial compiles what training uses; no step, log line or end of an epoch adds a graph, and with it memory."""
    method, _ = compiled("isd", monkeypatch)
    assert len(graphs) >= 2  # the student's and the teacher's
    before = len(graphs)
    problem.train(method, efficiency=Efficiency(log_every=3))
    assert len(graphs) == before


def test_compiled_colours_are_the_colours(graphs: list[int]) -> None:
    """Compiled once for any number of images, and once for a single image, which the compiler takes for a constant."""
    draws, changes = torch.Generator().manual_seed(0), engine.changes_of(augment.CHANGES, CPU, FAST)
    assert len(changes) == len(augment.CHANGES) == 4
    for change, plain in zip(changes, augment.CHANGES, strict=True):
        before = len(graphs)
        for count in (5, 1, 2, 3, 8):
            images, strength = torch.rand(count, 3, 6, 6, generator=draws), 0.5 * torch.rand(count, 1, 1, 1, generator=draws)
            torch.testing.assert_close(change(images, strength), plain(images, strength), rtol=1e-6, atol=1e-6)
        assert 1 <= len(graphs) - before <= 2


def test_compiled_encoders_train_as_eager_ones_and_are_resumed_by_them(
    compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trial leaves weights, statistics and gradients as they were; names of tensors stay."""
    compiler("aot_eager")
    eager, path = built("isd", FAST, monkeypatch), tmp_path / "checkpoint.pt"
    method, words = compiled("isd", monkeypatch)
    assert words == ", compiled by aot_eager"
    problem.assert_equal_states(method, eager)
    assert all(parameter.grad is None for parameter in method.parameters())
    optimizer = problem.optimizer_of(method)
    found = losses(method, 0, 2, optimizer)
    checkpoint.save(path, "0", method, optimizer, RunProgress(step=2))
    optimizer = problem.optimizer_of(eager)
    assert checkpoint.load(path, "0", eager, optimizer, CPU).step == 2
    problem.assert_equal_states(eager, method)
    found += losses(eager, 2, 5, optimizer)
    assert found == pytest.approx(losses(built("isd", FAST, monkeypatch), 0, 5), rel=1e-5)


def failing(graph: object, inputs: object) -> object:
    raise OSError("no compiler for C on this machine\nand more")


def test_a_compiler_that_fails_leaves_an_eager_run(compiler: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit that of a run that was never compiled; the next run of the process tries again."""
    want = losses(built("isd", FAST, monkeypatch), 0, 3)
    compiler(failing)
    method, words = compiled("isd", monkeypatch)
    assert words.startswith(", not compiled by ")
    assert "no compiler for C on this machine" in words
    assert "\n" not in words
    assert losses(method, 0, 3) == want
    compiler("eager")
    assert compiled("isd", monkeypatch)[1] == ", compiled by eager"


def test_what_is_wrong_with_the_images_is_no_failure_of_the_compiler(
    compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def views() -> Tensor:
        raise DataError("a pack is damaged")

    compiler("eager")
    with pytest.raises(DataError, match="a pack is damaged"):
        engine.compile_(dict(built("isd", FAST, monkeypatch).encoders), views, CPU, FAST)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("name", methods.names())
def test_compiled_on_cuda_is_eager_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By inductor, as a run does; float32, first steps."""
    cuda = torch.device("cuda")
    batches = [Noise(device="cuda").at(step) for step in range(4)]
    eager, method = (built(name, FAST, monkeypatch).to(cuda) for _ in range(2))
    words = engine.compile_(dict(method.encoders), lambda: batches[0].view_student, cuda, FAST)  # type: ignore[arg-type]
    assert words == ", compiled by inductor"
    want = problem.steps(eager, batches, problem.optimizer_of(eager))
    assert problem.steps(method, batches, problem.optimizer_of(method)) == pytest.approx(want, rel=2e-4)
    images, strength = torch.rand(7, 3, 32, 32, device=cuda), 0.5 * torch.rand(7, 1, 1, 1, device=cuda)
    for change, plain in zip(engine.changes_of(augment.CHANGES, cuda, FAST), augment.CHANGES, strict=True):
        torch.testing.assert_close(change(images, strength), plain(images, strength), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
