"""What every test needs: a home and a terminal of its own, one thread, and no W&B unless the test asks for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch loads, and for every process that a test starts: one thread, which does not spin while it waits, and this package.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", PYTHONPATH=str(Path(__file__).parents[1]))

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option has to be declared here to be known whatever is collected."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing with them")
    parser.addoption("--params", help="test the methods outside the package that this params.yaml names, by tests/conformance")


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected: which methods there are is then known."""
    if params := config.getoption("--params"):
        from tests.conformance import problem

        problem.PARAMS.append(Path(params).resolve())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and bit-equal runs need a fixed number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _private_home() -> Iterator[None]:
    """Caches, settings and credentials of whoever runs the tests are neither read nor written."""
    with tempfile.TemporaryDirectory(prefix="isd-home-") as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DVC_NO_ANALYTICS", "1")
        patch.setenv("TERM", "xterm-256color")  # of a dumb terminal Rich takes no width
        unwanted = {"WANDB_API_KEY", "WANDB_DIR", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"}
        for name in [name for name in os.environ if name.startswith(("XDG_", "ISD_")) or name in unwanted]:
            patch.delenv(name)
        yield
