"""One profile, made once and copied."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data.prepare import prepare
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.report.output import report
from isd_repro.train.pretrain import pretrain
from tests.verify import world


@pytest.fixture(autouse=True)
def _state_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, encoders, features, records and the rendered report."""
    return made(tmp_path_factory.mktemp("whole"), world.PARAMS)


@pytest.fixture(scope="session")
def whole_protocols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every protocol; the other data set lies below `target`."""
    folder = tmp_path_factory.mktemp("protocols")
    world.write_target(folder / "target")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISD_CIFAR10_ROOT", str(folder / "target"))
        return made(folder, world.PROTOCOLS)


def made(folder: Path, text: str) -> Path:
    """Every stage of every run that the parameters ask for."""
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    params, layout = config.load(folder / "params.yaml")
    console = Console(quiet=True)
    prepare("digits", params, layout, console)
    for run in params.runs:
        for stage in (pretrain, extract, partial(run_evaluation, "knn")):
            stage(run, params, layout, console)
    for kind in ("linear", "few_label", "transfer", "trajectory", "knn_dense"):
        for run in getattr(params, f"{kind}_runs"):
            run_evaluation(kind, run, params, layout, console)
    report(params, layout, console)
    return folder


@pytest.fixture
def profile(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> world.Profile:
    """A profile of one's own."""
    shutil.copytree(whole, tmp_path / "profile")
    return world.Profile(tmp_path / "profile", capsys)


@pytest.fixture
def protocols(
    whole_protocols: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> world.Profile:
    """A profile with every protocol, and the other data set where its environment variable says."""
    shutil.copytree(whole_protocols, tmp_path / "profile")
    monkeypatch.setenv("ISD_CIFAR10_ROOT", str(tmp_path / "profile" / "target"))
    return world.Profile(tmp_path / "profile", capsys)


@pytest.fixture
def clean(profile: world.Profile) -> world.Profile:
    """As git has it: no image, no encoder, no features."""
    shutil.rmtree(profile.folder / "runs")
    shutil.rmtree(profile.folder / "data")
    return profile
