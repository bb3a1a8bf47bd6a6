"""Within a log interval the host never waits for a value of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isd_repro import methods
from isd_repro.config.params import Efficiency, Numerics
from isd_repro.interfaces import Batch
from isd_repro.train import loop
from isd_repro.train.checkpoint import Progress
from tests.conformance import problem
from tests.conformance.problem import OPTIM, STEPS, STEPS_PER_EPOCH, Noise, build

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}


class Watch(TorchDispatchMode):
    """Notes the steps at which a value is asked for, as `float` or `bool` of a tensor does, or a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step, self.waited = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS:
            self.waited.add(self.step)
        return func(*args, **(kwargs or {}))


class Watched(Noise):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.ready = [super(Watched, self).at(step) for step in range(STEPS)]

    def at(self, step: int) -> Batch:
        self.watch.step = step + 1
        return self.ready[step]


@pytest.mark.parametrize("every", [2, 100])
@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("engine", ["reference", "fast"])
def test_a_step_waits_for_nothing_between_two_log_lines(
    name: str, every: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numerics = Numerics.model_validate({"engine": engine})
    monkeypatch.setattr(problem, "NUMERICS", numerics)
    watch = Watch()
    method, source = build(name), Watched(watch)
    hooks = loop.Hooks(save=lambda _: None, epoch=lambda _: None, tick=lambda *_: None, stopped=lambda: False)
    optimizer = loop.optimizer_of(method, OPTIM)
    with watch:
        loop.train(method, optimizer, source, OPTIM, numerics, Efficiency(log_every=every), Progress(), hooks)
    assert watch.waited == {step for step in range(1, STEPS + 1) if step % every == 0 or step % STEPS_PER_EPOCH == 0}
