"""Nothing is built for a shell, nothing is run from a file, nothing listens, and nobody is told."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.faults import chain, world

PACKAGE = world.ROOT / "isd_repro"
FORBIDDEN = {  # what runs text as code or as commands, and what opens a door
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "os.spawn", "os.exec", "pty.spawn", "commands.getoutput",
    "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load", "joblib.load",
    "torch.hub.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "urllib.request.urlopen", "urllib.request.urlretrieve", "requests.get",
    "tempfile.mktemp", "extractall", "extract",
}  # fmt: skip
SHELL = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}
NETWORK = {
    "socketserver",
    "http.server",
    "urllib.request",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "telnetlib",
}


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a call's function; `?.c` where it hangs on a value."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return "?"


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            modules = [module] if module else [alias.name for alias in node.names]
            yield from (f"{node.lineno}: imports {one}" for one in modules if one in NETWORK)
        if not isinstance(node, ast.Call):
            continue
        name, keywords = name_of(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        value = {key: one.value for key, one in keywords.items() if isinstance(one, ast.Constant)}
        last = name.rsplit(".", 1)[-1]
        if name in FORBIDDEN or last == "extractall" or any(name.startswith(f"os.{one}") for one in ("exec", "spawn")):
            yield f"{node.lineno}: {name}"
        if name.startswith("socket.") and name != "socket.gethostname":
            yield f"{node.lineno}: {name}"
        if keywords.get("shell") is not None and value.get("shell") is not False:
            yield f"{node.lineno}: {name} with a shell"
        if name in SHELL and not (node.args and isinstance(node.args[0], ast.List | ast.Name)):
            yield f"{node.lineno}: {name} without a list of words"
        if name == "torch.load" and value.get("weights_only") is not True:
            yield f"{node.lineno}: torch.load without weights_only=True"
        if name == "np.load" and value.get("allow_pickle", False) is not False:
            yield f"{node.lineno}: np.load with pickles"
        if name == "YAML" and value.get("typ") not in {"rt", "safe"}:
            yield f"{node.lineno}: YAML that makes objects"


def test_no_line_runs_what_a_user_wrote() -> None:
    """`tracking/anonymous.py` asks the system under which names this machine must not be named; it opens no socket."""
    found = [
        f"{path.relative_to(PACKAGE)}:{offence.split(': ', 1)[1]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for offence in offences(path.read_text("utf-8"))
    ]
    assert found == ["tracking/anonymous.py:socket.getfqdn"]


@pytest.mark.parametrize(
    "line",
    [
        "os.system('x')", "eval(x)", "exec(x)", "subprocess.run(x, shell=True)", "subprocess.run(f'git {x}')", "pickle.load(f)",
        "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "YAML(typ='unsafe')", "YAML()",
        "archive.extractall(x)", "socket.create_server(x)", "from http.server import HTTPServer", "os.execvp(x, y)",
        "subprocess.run([x], shell=y)",
    ],
)  # fmt: skip
def test_such_lines_are_seen(line: str) -> None:
    assert list(offences(line))


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
    environment = {**os.environ, "PYTHONPATH": str(world.ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", GUARD % commands]
    ended = subprocess.run(start, cwd=done, env=environment, capture_output=True, text=True, check=False)
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
    environment = {**os.environ, "PYTHONPATH": str(world.ROOT), "OMP_NUM_THREADS": "1", "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}
    start = [sys.executable, "-m", "isd_repro", "knn", "isd"]
    ended = subprocess.run(start, cwd=done, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "warning: records will name no commit: fatal: detected dubious ownership" in ended.stderr
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
        *(f"isd-repro {stage} ${{item}}" for stage in ("linear", "few-label", "transfer", "trajectory")),
        "isd-repro report",
    }


@pytest.mark.parametrize("name", ["a;id", "$(id)", "-rf", "a b", "a\nb", "`id`", "a'b", "..", "a/b", "ä", "a" * 101, ""])
def test_no_name_is_a_command(name: str, done: Path) -> None:
    text = (done / "params.yaml").read_text("utf-8")
    quoted = '"' + name.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') + '"'
    (done / "params.yaml").write_text(text.replace("\n  isd:\n", f"\n  {quoted}:\n"), "utf-8")
    chain.refused(chain.call(done, "check", "params.yaml"), "params.yaml", code=3)
