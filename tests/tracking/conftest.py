"""A profile whose stages have run, and a W&B client that is real and forgets everything afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data.prepare import prepare
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.tracking import session
from isd_repro.train.pretrain import pretrain
from tests.faults import world
from tests.tracking import server
from tests.tracking.server import Server

knn = partial(run_evaluation, "knn")
linear = partial(run_evaluation, "linear")

EXTRA = """\
evaluation:
  knn: {k: [1, 3]}
  linear: {protocol: short, epochs: 3, batch_size: 10}
linear_runs: [isd]
"""


@pytest.fixture
def wandb_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B with short waits, and nothing left of it afterwards: it remembers server and key for the life of a process."""
    from wandb.sdk.artifacts.artifact_instance_cache import artifact_instance_cache_by_client_id

    for name in ("MODE", "SILENT", "ERROR_REPORTING", "DATA_DIR", "CACHE_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that it is put back afterwards, whatever W&B's start makes of it
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setattr(session, "INIT_TIMEOUT", 3.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 5.0)
    session._say_unknown.cache_clear()
    yield
    session.release()
    for artifact in list(artifact_instance_cache_by_client_id.values()):  # they leave their folders to the garbage collector
        if artifact._tmp_dir is not None:
            artifact._tmp_dir.cleanup()


@pytest.fixture
def online(wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that W&B is told to use, with a key; generous waits, because nothing is wrong with it."""
    monkeypatch.setattr(session, "INIT_TIMEOUT", 60.0)
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 60.0)
    with server.running() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", server.KEY)
        yield running


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile whose run is finished, made with W&B off."""
    folder = tmp_path_factory.mktemp("finished") / "profile"
    folder.mkdir()
    (folder / "params.yaml").write_text(world.PARAMS.replace("subsets:\n", EXTRA + "subsets:\n", 1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        params, layout = config.load(folder / "params.yaml")
        quiet = Console(quiet=True)
        prepare("digits", params, layout, quiet)
        for stage in (pretrain, extract, knn, linear):
            stage("isd", params, layout, quiet)
    return folder


@pytest.fixture
def profile(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, with resume state inside it."""
    copy = tmp_path / "profile"
    shutil.copytree(finished, copy)
    monkeypatch.setenv("DVC_ROOT", str(copy))
    return copy
