"""One profile, made once and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from isd_repro import config
from isd_repro.stages.extract import extract
from isd_repro.stages.knn import knn
from isd_repro.stages.linear import linear
from isd_repro.stages.prepare import prepare
from isd_repro.stages.pretrain import pretrain
from isd_repro.stages.report import report
from tests.verify import world


@pytest.fixture(autouse=True)
def _state_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, encoders, features, records and the rendered report."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "params.yaml").write_text(world.PARAMS, encoding="utf-8")
    params, layout = config.load(folder / "params.yaml")
    console = Console(quiet=True)
    prepare("digits", params, layout, console)
    for run in params.runs:
        for stage in (pretrain, extract, knn):
            stage(run, params, layout, console)
    for run in params.linear_runs:
        linear(run, params, layout, console)
    report(params, layout, console)
    return folder


@pytest.fixture
def profile(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> world.Profile:
    """A profile of one's own."""
    shutil.copytree(whole, tmp_path / "profile")
    return world.Profile(tmp_path / "profile", capsys)


@pytest.fixture
def clean(profile: world.Profile) -> world.Profile:
    """As git has it: no image, no encoder, no features."""
    shutil.rmtree(profile.folder / "runs")
    shutil.rmtree(profile.folder / "data")
    return profile
