"""Engine `fast` through the stage: its record says so and says what ran, and the reference's record says what it always said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from isd_repro.nn import engine, products
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


@pytest.mark.skipif(not products.multiplies_bf16(), reason="this CPU does not multiply bf16")
def test_bf16_on_a_cpu_that_multiplies_it(folder: Path, undisturbed: Path) -> None:
    """Another run than in float32, near it, whose bank is float16; killed and resumed it is the same, bit for bit."""
    world.edit(folder, ("precision: float32}", "precision: bf16, engine: fast}"))
    world.train(folder)
    first, exact = world.record(folder), world.record(undisturbed)
    assert devices(folder) == [f"{CPU}, bank attention onednn on float16"]
    ours, theirs = first.curve[0]["loss"], exact.curve[0]["loss"]
    assert 0 < abs(ours - theirs) < 0.01 * theirs
    for path in world.outputs(folder).values():
        path.unlink()
    world.stopped_at(folder, 3)
    world.train(folder)
    assert (len(devices(folder)), world.record(folder).encoder_sha256) == (2, first.encoder_sha256)


def test_a_written_default_is_the_default(folder: Path, undisturbed: Path) -> None:
    world.edit(folder, ("precision: float32}", "precision: float32, engine: reference}"))
    world.train(folder)
    assert world.plain(world.record(folder).model_dump(mode="json")) == world.plain(
        world.record(undisturbed).model_dump(mode="json")
    )


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
