"""Nothing is built for a shell, nothing is run from a file, nothing listens, and nobody is told."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.faults import chain, world

PACKAGE = world.ROOT / "isd_repro"


def test_pickles_are_read_as_weights_alone() -> None:
    """Ruff's security rules forbid the rest: shells, `eval`, `exec`, `pickle`, unsafe YAML, archives unpacked as a whole."""
    calls = [
        (path, node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for path, node in calls:
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords], f"{path}:{node.lineno}"


GUARD = """
import sys
seen = []
def watch(event, arguments):
    if event in {"socket.bind", "socket.listen"}:
        raise SystemExit(f"{event} {arguments}")
    if event in {"socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "os.system"}:
        raise SystemExit(f"{event} {arguments}")
    if event in {"subprocess.Popen", "os.exec", "os.posix_spawn"}:
        seen.append([str(word) for word in (arguments[1] or [])])
sys.addaudithook(watch)
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


def test_no_stage_opens_a_port_or_calls_anyone(done: Path) -> None:
    """Every stage and `evaluate` under an audit hook that ends the process at the first socket.

    The only programs are git, for the commit in a record, and ldconfig, with which Python's ctypes looks for libraries.
    """
    evaluate = ("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--protocol", "all")
    commands = [*chain.STAGES.values(), ("show",), ("check", "params.yaml"), (*evaluate, "--k", "1", "--linear-epochs", "1")]
    commands += [("checkpoint", "inspect", "runs/isd/encoder.safetensors")]
    start = [sys.executable, "-c", GUARD % commands]
    ended = subprocess.run(start, cwd=done, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    programs = ast.literal_eval(ended.stdout.splitlines()[-1].removeprefix("programs: "))
    assert set(programs) <= {"git", "ldconfig"}, programs


def test_the_guard_sees_a_port(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    code = GUARD.split("from isd_repro")[0] + "import socket; socket.socket().bind(('127.0.0.1', 0))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "socket.bind" in ended.stderr


def test_a_checkout_of_another_owner_is_told(done: Path) -> None:
    """As in a container: git refuses to say the commit, and its own words say what to do."""
    environment = {**os.environ, "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    start = [sys.executable, "-m", "isd_repro", "knn", "isd"]
    ended = subprocess.run(start, cwd=done, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "warning: records will not name a commit: fatal: detected dubious ownership" in ended.stderr
    assert "git config --global --add safe.directory" in ended.stderr


def test_dvc_tells_nobody() -> None:
    lines = [line.strip() for line in (world.ROOT / ".dvc" / "config").read_text("utf-8").splitlines()]
    assert lines[0] == "[core]"
    assert "analytics = false" in lines
    assert "check_update = false" in lines


def test_commands_of_the_pipeline_hold_no_text_of_users() -> None:
    """DVC hands `cmd` to a shell: what it fills in are names of runs and subsets, whose pattern allows nothing that one obeys."""
    stages = YAML(typ="safe").load((world.ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
    filled = {str(body.get("do", body)["cmd"]) for body in stages.values()}
    assert filled == {f"isd-repro {stage} ${{key}}" for stage in ("prepare", "pretrain", "extract", "knn")} | {
        *(f"isd-repro {stage} ${{item}}" for stage in ("linear", "knn-dense", "few-label", "transfer", "trajectory")),
        "isd-repro report",
    }


@pytest.mark.parametrize("name", ["a;id", "$(id)", "-rf", "a b", "a\nb", "`id`", "a'b", "..", "a/b", "ä", "a" * 101, ""])
def test_no_name_is_a_command(name: str, done: Path) -> None:
    text = (done / "params.yaml").read_text("utf-8")
    quoted = '"' + name.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') + '"'
    (done / "params.yaml").write_text(text.replace("\n  isd:\n", f"\n  {quoted}:\n"), "utf-8")
    chain.refused(chain.call(done, "check", "params.yaml"), "params.yaml", code=3)
