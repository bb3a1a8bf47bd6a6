"""Within a log interval the host never waits for the device: views, step and loop, decided without a GPU.

Everything that a run keeps on its device lies on torch's `meta` device, whose tensors have shapes and no values: asking for a
value, or for a size that depends on one, raises an error there. What the host draws stays on the CPU. A copy from pageable
memory makes the host wait, too, so every copy has to go through `augment.to_device` or the loader's `Prefetch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isd_repro import methods
from isd_repro.config.params import Data, Efficiency, Numerics, StoreSettings
from isd_repro.data import augment
from isd_repro.data.loader import Batches
from isd_repro.data.manifests import Split
from isd_repro.data.store import Store as Images
from isd_repro.interfaces import Batch
from isd_repro.train import loop
from isd_repro.train.checkpoint import RunProgress
from tests.conformance import problem
from tests.conformance.problem import BATCH, CLASSES, OPTIM, SIDE, STEPS, STEPS_PER_EPOCH, Noise, build
from tests.conformance.test_cuda import STRONG
from tests.data import trees

META = torch.device("meta")
HOOKS = loop.Hooks(save=lambda _: None, epoch=lambda _: None, tick=lambda *_: None, stopped=lambda: False)


class Made(TorchFunctionMode):
    """Notes tensors of a list's values: on a CUDA device they are copied there, although no operator shows it on `meta`."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and out.device == META:
            self.found.append(func.__name__)
        return out


class Copies(TorchDispatchMode):
    """Notes the operators that bring values from the CPU to the device, but for those that are allowed to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.allowed = False
        self._made = Made(self.found)

    def __enter__(self) -> Copies:
        self._made.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def __exit__(self, *how: Any) -> None:
        super().__exit__(*how)  # type: ignore[no-untyped-call]
        self._made.__exit__(*how)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        met = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        from_cpu = any(each.device.type == "cpu" and each.dim() > 0 for each in met)
        if from_cpu and not self.allowed and any(each.device.type == "meta" for each in met):
            self.found.append(str(func))
        return out

    @contextmanager
    def allow(self) -> Iterator[None]:
        """Within the block copies are right."""
        self.allowed = True
        yield
        self.allowed = False


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    watch, to_device = Copies(), augment.to_device

    def allowed(values: Tensor, device: torch.device) -> Tensor:
        with watch.allow():
            return to_device(values, device)

    monkeypatch.setattr(augment, "to_device", allowed)
    return watch


@pytest.fixture
def batches(tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> Batches:
    """A run's own, with strong views of images of several sizes."""
    draws = torch.Generator().manual_seed(0)
    index = torch.arange(BATCH * STEPS_PER_EPOCH + 3)
    shapes = [(1, SIDE, SIDE + at % 4) for at in index.tolist()]
    pixels = [torch.randint(256, shape, generator=draws, dtype=torch.uint8).numpy() for shape in shapes]
    images = Images(tmp_path, trees.packed(tmp_path, pixels, StoreSettings(channels=1, resize="short-side", side=SIDE)))
    data = Data(subset="s", image_size=SIDE, mean=(0.4,), std=(0.2,), view_student=STRONG, view_teacher=STRONG)
    found = Batches(images, Split(index, index % CLASSES), data, BATCH, 0, META)
    reading = found._prefetch.at

    def pixels_at(step: int) -> tuple[Tensor, Tensor]:
        with copies.allow():
            return reading(step)

    monkeypatch.setattr(found._prefetch, "at", pixels_at)
    return found


class Enough(Exception):
    """Ends a training."""


class Given:
    """Two steps of one log interval, and no more: from the loader, or of nothing but shapes."""

    steps_per_epoch = 100

    def __init__(self, batches: Batches | None) -> None:
        self.batches = batches

    def at(self, step: int) -> Batch:
        if step == 2:
            raise Enough
        if self.batches is not None:
            return self.batches.at(step)
        one, other = (torch.empty(BATCH, 1, SIDE, SIDE, device=META) for _ in range(2))
        index, label, shuffle = (torch.empty(BATCH, dtype=torch.int64, device=META) for _ in range(3))
        return Batch(one, other, index, label, shuffle, step)


CASES = [
    *((name, "reference") for name in methods.names()),
    *((name, "fast") for name in filter(problem.has_fast_form, methods.names())),
]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_views_step_and_loop_wait_for_nothing(
    name: str, engine: str, batches: Batches, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views of one method stand for those of all."""
    numerics = Numerics.model_validate({"engine": engine})
    monkeypatch.setattr(problem, "NUMERICS", numerics)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    method = build(name, groups=2).to(device=META, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for teacher in getattr(method, "_teachers", ()):  # a frozen teacher follows the images at the first step, once
        teacher.to(device=META, memory_format=torch.channels_last)
    optimizer, every = loop.optimizer_of(method, OPTIM, numerics), Efficiency(log_every=100)
    source = Given(batches if (name, engine) == ("isd", "reference") else None)
    with pytest.raises(Enough), copies:
        loop.train(method, optimizer, source, OPTIM, numerics, every, RunProgress(), HOOKS)
    assert copies.found == []


@pytest.mark.parametrize(
    "wrong",
    [
        lambda values: float(values[0, 0]),
        lambda values: bool(torch.isfinite(values).all()),
        lambda values: values[values > 0],
        lambda values: values.nonzero(),
        lambda values: values.cpu(),
        lambda values: values[torch.tensor([0, 1])],
        lambda values: values * torch.tensor([0.1, 0.2], device=values.device),
    ],
)
def test_the_tests_before_and_after_would_notice(wrong: Callable[[Tensor], object], copies: Copies) -> None:
    with copies:
        try:
            wrong(torch.empty(2, 2, device=META))
        except (RuntimeError, NotImplementedError):
            return
    assert copies.found != []


class Reads(TorchDispatchMode):
    """Notes the steps at which a value is asked for, as `float` or `bool` of a tensor does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step, self.seen = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen.add(self.step)
        return func(*args, **(kwargs or {}))


class Watched(Noise):
    def __init__(self, watch: Reads) -> None:
        super().__init__()
        self.watch = watch

    def at(self, step: int) -> Batch:
        self.watch.step = 0
        batch = super().at(step)
        self.watch.step = step + 1
        return batch


@pytest.mark.parametrize("every", [2, 100])
def test_values_are_read_at_log_lines_and_at_the_ends_of_epochs(every: int) -> None:
    watch = Reads()
    method = build("isd")
    with watch:
        efficiency = Efficiency(log_every=every)
        loop.train(method, loop.optimizer_of(method, OPTIM), Watched(watch), OPTIM, Numerics(), efficiency, RunProgress(), HOOKS)
    assert watch.seen - {0} == {step for step in range(1, STEPS + 1) if step % every == 0 or step % STEPS_PER_EPOCH == 0}
