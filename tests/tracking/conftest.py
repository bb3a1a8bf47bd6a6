"""A profile whose stages have run, and a W&B client that is real and forgets everything afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from isd_repro.tracking import history, session
from tests.faults import chain
from tests.tracking import server
from tests.tracking.server import Server


@pytest.fixture
def wandb_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B with generous waits, and nothing left of it afterwards: it remembers server and key for the life of a process."""
    from wandb.sdk.artifacts.artifact_instance_cache import artifact_instance_cache_by_client_id
    from wandb.util import get_core_path

    for name in ("MODE", "SILENT", "ERROR_REPORTING", "DATA_DIR", "CACHE_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that it is put back afterwards, whatever W&B's start makes of it
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setattr(session, "INIT_TIMEOUT", 60.0)  # seconds; a loaded machine needs more than 3 for a run on the disk
    monkeypatch.setattr(session, "FINISH_TIMEOUT", 60.0)
    # the program that `wandb leet` starts, without the seconds that its interpreter takes for each file
    monkeypatch.setattr(history, "READER", (get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"))
    session._say_unknown.cache_clear()
    yield
    session.release()
    for artifact in list(artifact_instance_cache_by_client_id.values()):  # they leave their folders to the garbage collector
        if artifact._tmp_dir is not None:
            artifact._tmp_dir.cleanup()


@pytest.fixture
def online(wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that W&B is told to use, with a key."""
    with server.running() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", server.KEY)
        yield running


@pytest.fixture(scope="session")
def finished() -> Path:
    """A profile whose run is finished, made with W&B off; nobody changes it."""
    return chain.finished()


@pytest.fixture
def profile(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one's own, with resume state inside it."""
    copy = Path(shutil.copytree(finished, tmp_path / "profile"))
    monkeypatch.setenv("DVC_ROOT", str(copy))
    return copy
