"""Engine `fast` through the stage: its record says so and says what ran, and the reference's record says what it always said."""

from __future__ import annotations

from pathlib import Path

from isd_repro import artifacts
from isd_repro.artifacts import PretrainRecord
from tests.faults import world


def record_of(folder: Path) -> PretrainRecord:
    return artifacts.read_record(world.outputs(folder)["record"], PretrainRecord)


def test_the_record_names_engine_and_kernel(folder: Path, undisturbed: Path) -> None:
    world.edit(folder, ("precision: float32}", "precision: float32, engine: fast}"))
    world.train(folder)
    fast, reference = record_of(folder), record_of(undisturbed)
    assert fast.config["numerics"] == {**reference.config["numerics"], "engine": "fast"}
    assert "engine" not in reference.config["numerics"]
    assert fast.fingerprint != reference.fingerprint
    assert [attempt.device for attempt in fast.attempts] == ["cpu, bank attention chunked on float32"]
    assert [attempt.device for attempt in reference.attempts] == ["cpu"]
    losses = [(row["loss"], other["loss"]) for row, other in zip(fast.curve, reference.curve, strict=True)]
    assert all(abs(one - other) < 0.02 * other for one, other in losses), losses


def test_a_written_default_is_the_default(folder: Path, undisturbed: Path) -> None:
    world.edit(folder, ("precision: float32}", "precision: float32, engine: reference}"))
    world.train(folder)
    assert world.plain(record_of(folder).model_dump(mode="json")) == world.plain(record_of(undisturbed).model_dump(mode="json"))
