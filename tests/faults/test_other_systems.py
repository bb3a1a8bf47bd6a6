"""The package imports and evaluates without what Windows and macOS do not have: modules, functions and signals of Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

# Other packages ask for the system when they load, so they load before it is another one.
AS_ANOTHER_SYSTEM = """
import importlib, os, pkgutil, select, signal, sys
import filelock, jinja2, numpy, PIL.Image, pydantic, rich.progress, ruamel.yaml, safetensors.torch, scipy.stats
import torch.distributed.run, torchvision, typer.testing
absent = {"darwin": [], "win32": ["fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"]}[sys.argv[1]]
sys.modules |= dict.fromkeys(absent)
functions = ["pidfd_open", "posix_fallocate", "sched_getaffinity"]
if sys.argv[1] == "win32":
    functions += ["fork", "geteuid", "getloadavg", "getuid", "killpg", "statvfs", "uname"]
    members = signal.Signals.__members__
    for name in set(members) - {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}:
        delattr(signal, name)
    class Signals:
        __members__ = {name: one for name, one in members.items() if hasattr(signal, name)}
        __class_getitem__ = __members__.__getitem__
    signal.Signals = Signals
    opened = os.open
    def refuse(path, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *rest, **more)
    os.open = refuse
for name in functions:
    delattr(os, name)
sys.platform = sys.argv[1]
import isd_repro
for module in pkgutil.walk_packages(isd_repro.__path__, "isd_repro."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from isd_repro.cli import main
sys.argv = ["isd-repro", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_evaluate_runs_on_another_system(system: str, tmp_path: Path) -> None:
    """No test of the system itself: what it lacks is hidden, what it has of its own is not there."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("one", "two"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for at in range(3):
                Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{at}.png")
    torch.save(resnet18().state_dict(), tmp_path / "encoder.pth")
    words = ["evaluate", "--ckpt", "encoder.pth", "--data", "images", "--image-size", "32", "--k", "1", "--out", "record.json"]
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_SYSTEM, system, *words],
        cwd=tmp_path,
        env={**os.environ, "ISD_STATE_ROOT": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1-NN" in done.stdout
    assert (tmp_path / "record.json").is_file()
