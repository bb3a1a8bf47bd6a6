"""Prepared folders, made once and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data.prepare import prepare
from tests.faults import chain, world


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """params.yaml and the prepared subset, without any run."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "params.yaml").write_text(world.PARAMS, encoding="utf-8")
    params, layout = config.load(folder / "params.yaml")
    prepare("digits", params, layout, Console(quiet=True))
    return folder


@pytest.fixture(autouse=True)
def _state_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume state goes into the profile's own folder, even where the tests run inside a pipeline."""
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A profile of one's own."""
    return Path(shutil.copytree(prepared, tmp_path / "profile"))


@pytest.fixture(scope="session")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of three epochs, never disturbed."""
    copy = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("undisturbed") / "profile"))
    world.train(copy)
    return copy


@pytest.fixture(scope="session")
def undisturbed_long(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of as many epochs as processes are killed in."""
    copy = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("undisturbed") / "profile"))
    world.edit(copy, world.LONGER)
    world.train(copy)
    return copy


@pytest.fixture(scope="session")
def finished() -> Path:
    """Every stage run, in a folder that nobody changes."""
    return chain.finished()


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """Every stage run, in a folder of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "done"))


@pytest.fixture(scope="session")
def stopped(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile whose run ended after two of three epochs, with two checkpoints."""
    copy = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("stopped") / "profile"))
    world.stopped_at(copy, 3)
    return copy


@pytest.fixture
def state(stopped: Path, folder: Path) -> Path:
    """That run's state, in a profile of one's own."""
    shutil.copytree(stopped, folder, dirs_exist_ok=True)
    (state,) = world.states(folder)
    return state
