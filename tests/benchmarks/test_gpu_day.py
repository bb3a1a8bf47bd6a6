"""The day on a GPU: a step that hangs or fails stops no other. `make rehearse` runs all of it at toy size."""

from __future__ import annotations

import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu_checks, gpu_day, harness, training_step
from isd_repro import methods


def test_a_step_that_hangs_is_killed_and_one_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(context: Any) -> None:
        context.say("before", ms=1.0)
        sys.stdout.write("words\n")
        time.sleep(60)

    def fails(context: Any) -> None:
        with context.attempt("one of two"):
            raise ZeroDivisionError("nothing")
        raise RuntimeError("no such kernel")

    def measure(sizes: harness.Sizes, say: harness.Say) -> harness.Comparison:
        return harness.compare("it", sizes, {"a": lambda: harness.Seconds(2), "b": lambda: harness.Seconds(1)})

    monkeypatch.setattr(gpu_day, "LEAST", 0.1)
    monkeypatch.setattr(gpu_checks, "CHECKS", {"environment": hangs, "smoke": fails})
    monkeypatch.setattr(cases, "cases", lambda toy: {"loss-d128": cases.Case(measure, harness.Sizes())})
    out, archive = tmp_path / "day", tmp_path / "back" / "day.tar.gz"
    day = gpu_day.Day(out, 60, toy=False, archive=archive)
    assert day.run([{"environment": 1.0, "smoke": 9.0}, {"loss-d128": 9.0}]) == 1
    ends = {"environment": "killed at its limit", "loss-d128": "ok", "smoke": "failed with 1"}
    assert {name: how for name, how, _ in day.ends} == ends
    text = "\n".join(gpu_day.summary(out, day.ends, 1.0))
    assert "FAILED smoke: one of two: ZeroDivisionError: nothing" in text
    assert "FAILED smoke: failed: RuntimeError: no such kernel" in text
    assert "loss-d128: b 1000 ms, x2.00" in text
    assert "environment: before: ms=1" in text
    assert "words" in (out / "log.txt").read_text("utf-8")
    with tarfile.open(archive) as packed:
        assert set(packed.getnames()) == {f"day/{path.name}" for path in out.iterdir()}
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_the_archive_has_what_was_found_when_a_later_step_is_cut_off(tmp_path: Path) -> None:
    day = gpu_day.Day(tmp_path / "day", 60, toy=True, archive=tmp_path / "day.tar.gz")
    gpu_day.append(day.out, {"step": "a", "name": "found", "ms": 1})
    day._ended("a", "ok", 1.0)
    with tarfile.open(tmp_path / "day.tar.gz") as packed:
        found = packed.extractfile("day/results.jsonl")
        assert found is not None
        assert b'"ms": 1' in found.read()


def test_the_speed_of_a_step_is_told_in_images_and_as_a_share_of_the_roofline() -> None:
    found = harness.Comparison("step", {}, {"a": (2.0, 2.0), "b": (1.0, 1.0)}, images=512, least={"a": 0.5})
    assert [found.speed(name) for name in "ab"] == [", 256 images/s, 25% of the roofline", ", 512 images/s"]
    assert found.as_json()["speed"]["b"] == "512 images/s"


def test_the_time_of_a_longer_training_follows_from_its_images(tmp_path: Path) -> None:
    for name, count in (("a", 9), ("b", 9), ("c", 4)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "train" / name / f"{number}.png").touch()
    profile = gpu_checks._profile(tmp_path, toy=True, epochs=3)
    assert profile["runs"]["isd"]["optim"]["epochs"] == 3
    assert gpu_checks._train_images(tmp_path, profile) == 9 + 9 + 8  # rare classes have 8 in a toy


def test_every_step_of_the_plan_exists() -> None:
    names = [name for group in gpu_day.PLAN for name in group]
    known = {name for subject in cases.SUBJECTS for name in subject.CUDA}
    assert set(names) == {*gpu_checks.CHECKS, *known} - {"tracking"}
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("left", "done"), [(1e9, [5, 25, 100]), (0.5 + 20 * 0.1, [5, 25]), (0.5 + 19 * 0.1, [5]), (-1.0, [])])
def test_a_longer_training_begins_only_where_the_time_will_do(
    left: float, done: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes half a second of other work, and an epoch of both runs a tenth."""
    now, said = [0.0], list[str]()

    @contextmanager
    def folder(context: Any) -> Iterator[tuple[Path, Path]]:
        yield tmp_path, tmp_path

    def told(context: Any, place: Path, prefix: str) -> list[float]:
        said.append(prefix)
        now[0] += 0.5
        monkeypatch.setattr(harness.Clock, "end", now[0] + left)
        return [20.0, 20.0]

    monkeypatch.setenv("GPU_DAY_IMAGES", "images.tar.gz")
    monkeypatch.setattr(gpu_checks, "_profile_folder", folder)
    monkeypatch.setattr(gpu_checks, "_caller", lambda *given: lambda *words: None)
    monkeypatch.setattr(gpu_checks, "_profile", lambda images, toy, epochs: {"epochs": epochs})
    monkeypatch.setattr(gpu_checks, "_train_images", lambda images, profile: 1)
    monkeypatch.setattr(gpu_checks, "_tell_scores", told)
    monkeypatch.setattr(gpu_checks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(harness.Clock, "end", left)
    gpu_checks.claim(gpu_checks.Context(lambda *words, **values: None, tmp_path, toy=False))
    assert said == [f"{epochs} epochs, " for epochs in done]


@pytest.mark.parametrize("name", methods.names())
def test_the_smoke_step_knows_values_for_every_method(name: str) -> None:
    sizes = replace(training_step.toy(training_step.Sizes()), method=name)
    assert training_step.build(sizes, torch.device("cpu"), training_step.HALF).training
