"""OpenMP's threads do not spin while they wait: beside another program that costs most of the speed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("given", "spins"), [(None, False), ("passive", False), ("active", True)])
def test_a_command_waits_passively_unless_told_otherwise(given: str | None, spins: bool) -> None:
    """As GNU's OpenMP tells it when torch loads it, for a command that imports torch."""
    variables = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    variables |= {"OMP_DISPLAY_ENV": "verbose"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    code = "from isd_repro.cli import main; main(lambda: __import__('torch'))"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("this torch has another OpenMP")
    assert (int(found[1]) > 0) is spins
