"""A finished profile, and copies of it whose files are changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults import chain
from tests.fuzz import targets


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(chain.finished(), tmp_path_factory.mktemp("original") / "profile"))
    assert chain.call(folder, *chain.EVALUATE, "--no-cache", "--out", "external.json").code == 0
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> dict[str, targets.Target]:
    shutil.copytree(original, tmp_path / "profile")
    return targets.targets(tmp_path / "profile", tmp_path)
