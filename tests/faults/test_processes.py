"""What a process asks of its surroundings: no network, no other program, no spinning thread, and streams that may be missing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isd_repro import provenance
from tests.faults import chain, world
from tests.faults.test_interruptions import assert_equal_runs

# --- network and programs -----------------------------------------------------------------------------------------------------

GUARD = """
import sys
seen = []
def watch(event, arguments):
    if event in {"os.system", "urllib.Request"} | {"socket." + name for name in "bind listen connect getaddrinfo sendto".split()}:
        raise SystemExit(f"{event} {arguments}")
    if event in {"subprocess.Popen", "os.exec", "os.posix_spawn"}:
        seen.append([str(word) for word in (arguments[1] or [])])
sys.addaudithook(watch)
"""
COMMANDS = """
from isd_repro import cli
for command in %r:
    sys.argv = ["isd-repro", *command]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
print("programs:", sorted({words[0].rsplit("/", 1)[-1] for words in seen}))
"""


def python(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def test_no_stage_opens_a_port_or_calls_anyone(done: Path) -> None:
    """Every stage and `evaluate` under an audit hook that ends the process at the first socket, which it would see.

    The only programs are git, for the commit in a record, and ldconfig, with which Python's ctypes looks for libraries.
    """
    commands = [*chain.STAGES.values(), ("show",), ("check", "params.yaml"), (*chain.EVALUATE, "--protocol", "all")]
    commands += [("checkpoint", "inspect", "runs/isd/encoder.safetensors")]
    ended = python(GUARD + COMMANDS % commands, done)
    assert ended.returncode == 0, ended.stderr
    programs = ast.literal_eval(ended.stdout.splitlines()[-1].removeprefix("programs: "))
    assert set(programs) <= {"git", "ldconfig"}, programs
    ended = python(GUARD + "import socket; socket.socket().bind(('127.0.0.1', 0))", done)
    assert (ended.returncode, "socket.bind" in ended.stderr) == (1, True)


def test_a_checkout_of_another_owner_is_told(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: git refuses to say the commit, and its own words say what to do."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    provenance._git.cache_clear()
    try:
        said = chain.call(done, "knn", "isd").err
    finally:
        provenance._git.cache_clear()
    assert "warning: records will not name a commit: fatal: detected dubious ownership" in said
    assert "git config --global --add safe.directory" in said


def test_a_file_names_the_commit_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/gpu.md says."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "isd_repro" / "provenance.py"))
    assert provenance._git.__wrapped__() == (None, None)
    (tmp_path / "COMMIT").write_text("0123abc\n", "utf-8")
    assert provenance._git.__wrapped__() == ("0123abc", None)


def test_dvc_tells_nobody() -> None:
    lines = [line.strip() for line in (world.ROOT / ".dvc" / "config").read_text("utf-8").splitlines()]
    assert lines[0] == "[core]"
    assert {"analytics = false", "check_update = false"} <= set(lines)


@pytest.mark.parametrize(("given", "spins"), [({}, False), ({"OMP_WAIT_POLICY": "active"}, True)])
def test_a_command_waits_passively_unless_told_otherwise(
    given: dict[str, str], spins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP's threads do not spin while they wait: beside another program that costs most of the speed."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    done = python(
        "from isd_repro.cli import main; main(lambda: __import__('torch'))", tmp_path, OMP_DISPLAY_ENV="verbose", **given
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("this torch has another OpenMP")
    assert (int(found[1]) > 0) is spins


# --- standard streams ---------------------------------------------------------------------------------------------------------

COMMAND = f"{sys.executable} -c 'from isd_repro.cli import main; main()'"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--version >&- 2>&- <&-", 0),
        ("--version > /dev/full", 1),
        ("check nothing.yaml 2> /dev/full", 3),
        ("check nothing.yaml >&- 2>&- <&-", 3),
    ],
)
def test_the_exit_code_stays(words: str, code: int, tmp_path: Path) -> None:
    """Only a result that cannot be written is a failure; what is said beside it is not."""
    done = subprocess.run(["sh", "-c", f"exec {COMMAND} {words}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    if "/dev/full" in words:
        assert ("No space left" in done.stderr) == ("--version" in words)


def test_characters_that_a_stream_does_not_have_are_shown_in_others(tmp_path: Path) -> None:
    (tmp_path / "Ünï漢.yaml").write_text(world.PARAMS, "utf-8")
    script = f"{COMMAND} check *.yaml && {COMMAND} check nothing漢.yaml"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "Ünï\\u6f22.yaml: ok\n".encode("latin-1") in done.stdout
    assert b"error: nothing\\u6f22.yaml" in done.stderr


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
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, cwd=tmp_path, text=True, check=False)
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
