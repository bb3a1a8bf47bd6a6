"""A method outside the package: one file, named by its path from isd_repro/methods."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isd_repro import methods
from isd_repro.config.params import MethodBlock
from isd_repro.config.reader import load
from isd_repro.runtime.errors import ConfigError
from isd_repro.runtime.files import sha256_file
from isd_repro.train.checkpoint import code_of

ROOT = Path(__file__).parents[2]
NAME = "../../tests/pipeline/barlow_twins"


def path_to(file: Path) -> str:
    return os.path.relpath(file, ROOT / "isd_repro" / "methods").removesuffix(".py")


def test_it_is_loaded_named_and_hashed() -> None:
    block = MethodBlock.model_validate({"name": NAME, "weight": 0.1})
    assert methods.config_of("mine", block, ROOT / "params.yaml").model_dump() == {"weight": 0.1, "dim": 64}
    assert methods.load(NAME) is methods.load(NAME)
    sha256 = sha256_file(ROOT / "tests" / "pipeline" / "barlow_twins.py")
    assert methods.identity(NAME) == {"name": NAME, "file_sha256": sha256}  # what fingerprint, record and verify compare
    assert code_of(NAME, torch.device("cpu"))[f"methods/{NAME}.py"] == sha256[:12]  # what a checkpoint keeps
    assert methods.identity("isd") == {"name": "isd"}


@pytest.mark.parametrize("name", ["/tmp/mine", "mine.py", "../../mine.py", "Mine", "../..", "a/b"])
def test_a_name_that_is_no_such_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        MethodBlock.model_validate({"name": name})


def test_a_file_that_is_no_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.name: no file .*/mine\.py") as found:
        methods.load(path_to(tmp_path / "mine.py"))
    assert found.value.hint == "give its path from isd_repro/methods, without .py: ../../my_method"
    (tmp_path / "empty.py").touch()
    with pytest.raises(ConfigError, match=r"empty\.py has no class Config or no class Method"):
        methods.load(path_to(tmp_path / "empty.py"))


@pytest.mark.slow
def test_one_command_tests_it(tmp_path: Path) -> None:
    """A good method passes, and one whose weights are drawn anew in a step does not."""
    good = (ROOT / "tests" / "pipeline" / "barlow_twins.py").read_text("utf-8")
    bad = good.replace(
        "        loss = barlow", "        nn.init.normal_(self.student.projector[0].weight)\n        loss = barlow"
    )
    run = (ROOT / "tests" / "pipeline" / "barlow_twins.yaml").read_text("utf-8")
    for content, failing in ((good, False), (bad, True)):
        (tmp_path / "mine.py").write_text(content, "utf-8")
        params = tmp_path / "params.yaml"
        added = run.replace("name: barlow_twins", f"name: {path_to(tmp_path / 'mine.py')}")
        params.write_text((ROOT / "params.yaml").read_text("utf-8").rstrip("\n") + "\n" + added, "utf-8")
        assert load(params)[0].runs["barlow-twins"].method.options == {"weight": 0.005}
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/conformance/test_methods.py"]
        ended = subprocess.run([*words, "--params", str(params)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (ended.returncode == 1) == failing, ended.stdout
        assert f"{path_to(tmp_path / 'mine.py')}]" in ended.stdout or not failing
