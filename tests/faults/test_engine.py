"""Engine `fast` through the stage: the record says what ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isd_repro.nn import engine
from isd_repro.train import checkpoint
from tests.faults import world


def test_the_record_names_kernel_and_compiler_or_why_there_is_none(folder: Path, undisturbed: Path) -> None:
    """A run that was compiled goes on in a process whose compiler fails, and both say so."""
    jitter = "jitter: {brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1, p: 0.8}}"
    change = ("view_student: {crop_min: 0.4, flip: 0.0}", f"view_student: {{crop_min: 0.4, flip: 0.0, {jitter}")
    world.edit(folder, ("precision: float32}", "precision: float32, engine: fast}"), change)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "compiler_of", lambda device, numerics: "aot_eager")
            world.stopped_at(folder, 3)
            patch.setattr(engine, "compiler_of", lambda device, numerics: "no-such")
            assert "isd: warning: not compiled by no-such (" in world.train(folder)
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
    first, second = (attempt.device for attempt in world.record(folder).attempts)
    fast = f"cpu ({checkpoint.arithmetic()}), bank attention onednn on float32"
    assert first == f"{fast}, compiled by aot_eager"
    assert second.startswith(f"{fast}, not compiled by no-such (")
    numerics = [world.record(place).config["numerics"] for place in (folder, undisturbed)]
    assert numerics[0] == {**numerics[1], "engine": "fast"}
    assert "engine" not in numerics[1]
