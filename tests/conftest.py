"""What every test needs: a home of its own, and no W&B unless the test asks for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _private_home() -> Iterator[None]:
    """Caches, settings and credentials of whoever runs the tests are neither read nor written."""
    with tempfile.TemporaryDirectory(prefix="isd-home-") as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("DVC_NO_ANALYTICS", "1")
        for name in [name for name in os.environ if name.startswith(("XDG_", "ISD_")) or name in {"WANDB_API_KEY", "WANDB_DIR"}]:
            patch.delenv(name)
        yield
