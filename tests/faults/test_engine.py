"""Engine `fast` through the stage: its record says so and says what ran, and the reference's record says what it always said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isd_repro.nn import engine
from isd_repro.train import checkpoint
from tests.faults import world

CPU = f"cpu ({checkpoint.arithmetic()})"
FAST = ("precision: float32}", "precision: float32, engine: fast}")


def devices(folder: Path) -> list[str]:
    return [attempt.device for attempt in world.record(folder).attempts]


def test_the_record_names_engine_and_kernel(folder: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kernel that was left out, which is told, too."""
    world.edit(folder, FAST)
    monkeypatch.setattr(engine, "why_not_triton", lambda rows: "RuntimeError: no compiler")
    said = world.train(folder)
    words = "bank attention onednn on float32 (triton left out: RuntimeError: no compiler)"
    assert f"isd: warning: {words}; the run continues without it" in said
    assert (devices(folder), devices(undisturbed)) == ([f"{CPU}, {words}"], [CPU])
    fast, reference = world.record(folder), world.record(undisturbed)
    assert fast.config["numerics"] == {**reference.config["numerics"], "engine": "fast"}
    assert "engine" not in reference.config["numerics"]
    assert fast.fingerprint != reference.fingerprint
    losses = [(row["loss"], other["loss"]) for row, other in zip(fast.curve, reference.curve, strict=True)]
    assert all(abs(one - other) < 0.02 * other for one, other in losses), losses


@pytest.fixture
def stance() -> Iterator[None]:
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.mark.usefixtures("stance")
def test_the_record_names_the_compiler_or_why_there_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was compiled goes on in a process whose compiler fails, and both say so."""
    jitter = "jitter: {brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1, p: 0.8}}"
    world.edit(folder, FAST, ("view_student: {crop_min: 0.4, flip: 0.0}", f"view_student: {{crop_min: 0.4, flip: 0.0, {jitter}"))
    monkeypatch.setattr(engine, "compiler_of", lambda device, numerics: "aot_eager")
    world.stopped_at(folder, 3)
    monkeypatch.setattr(engine, "compiler_of", lambda device, numerics: "no-such")
    assert "isd: warning: not compiled by no-such (" in world.train(folder)
    first, second = devices(folder)
    assert first == f"{CPU}, bank attention onednn on float32, compiled by aot_eager"
    assert second.startswith(f"{CPU}, bank attention onednn on float32, not compiled by no-such (")
