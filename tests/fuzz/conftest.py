"""A finished profile, and copies of it whose files are changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import chain, world
from tests.fuzz import targets


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "profile"
    folder.mkdir()
    (folder / "params.yaml").write_text(world.PARAMS, encoding="utf-8")
    assert chain.call(folder, "prepare", "digits").code == 0
    chain.complete(folder)
    ask = ("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--k", "1", "--no-cache")
    assert chain.call(folder, *ask, "--out", "external.json").code == 0
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> dict[str, targets.Target]:
    shutil.copytree(original, tmp_path / "profile")
    return targets.targets(tmp_path / "profile", tmp_path)
