"""Standard streams that are missing, full, or read by nobody: no file is harmed, no run is stopped, and the exit code stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import world
from tests.faults.test_interruptions import assert_equal_runs

COMMAND = f"{sys.executable} -c 'from isd_repro.cli import main; main()'"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--version >&-", 0),
        ("--version >&- 2>&- <&-", 0),
        ("--version > /dev/full", 1),
        ("check nothing.yaml 2>&-", 3),
        ("check nothing.yaml 2> /dev/full", 3),
        ("check nothing.yaml >&- 2>&- <&-", 3),
    ],
)
def test_the_exit_code_stays(words: str, code: int, tmp_path: Path) -> None:
    """Only a result that cannot be written is a failure; what is said beside it is not."""
    done = subprocess.run(["sh", "-c", f"exec {COMMAND} {words}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    if "/dev/full" in words and code:
        assert ("No space left" in done.stderr) == ("--version" in words)


def test_characters_that_a_stream_does_not_have_are_shown_in_others(tmp_path: Path) -> None:
    (tmp_path / "Ünï漢\N{MINUS SIGN}1.yaml").write_text(world.PARAMS, "utf-8")
    script = f"{COMMAND} check *.yaml && {COMMAND} paper check && {COMMAND} check nothing\N{MINUS SIGN}漢.yaml"
    environment = {**os.environ, "PYTHONIOENCODING": "gbk"}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 3, done.stderr
    assert b"-1.yaml: ok\n" in done.stdout
    assert b"error: nothing-" in done.stderr


def test_a_failure_is_told_though_nobody_reads_the_result(tmp_path: Path) -> None:
    """As `verify | grep -q`: the reader goes at the first line, and a verdict that comes later still decides."""
    script = (
        "from isd_repro import cli\nfrom isd_repro.runtime import errors\n"
        "def app():\n    print('x' * 1_000_000)\n    raise errors.DataError('edited', 'look')\n"
        "cli.app = app\ncli.main()\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=gone, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (4, "error: edited\nhint: look\n")


def test_no_file_takes_the_place_of_a_missing_stream(tmp_path: Path) -> None:
    """Otherwise a library's warning would be written into it."""
    script = (
        "import os\nfrom isd_repro.runtime import streams\nstreams.careful()\n"
        "with open('checkpoint', 'wb', buffering=0) as file:\n"
        "    file.write(b'weights')\n    os.write(1, b'a remark')\n    os.write(2, b'a warning')\n"
    )
    command = f'{sys.executable} -c "$SCRIPT" >&- 2>&-'
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env={**os.environ, "SCRIPT": script}, check=True)
    assert (tmp_path / "checkpoint").read_bytes() == b"weights"


def test_a_run_goes_on_when_its_log_cannot_be_written(folder: Path, undisturbed: Path) -> None:
    """As `2>&1 | tee log`, where `tee` dies after the first epoch."""
    with world.process(folder) as running:
        assert world.wait_for_epochs(running, 1)
        assert running.stderr is not None
        running.stderr.close()
        assert running.wait() == 0
    assert_equal_runs(folder, undisturbed)
