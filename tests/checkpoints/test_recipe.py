"""The lines of docs/checkpoints.md that convert a file, on every kind of file that they are said to convert."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import ResNet

from isd_repro import checkpoints
from isd_repro.runtime.errors import DataError
from tests.checkpoints.foreign import State, backbone, mlp, momentum, under

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def vicreg(net: ResNet, other: State) -> Any:
    del other
    state = under("module.backbone.", backbone(net))
    return {"epoch": 1, "model": state | mlp("module.projector"), "optimizer": momentum(state), "own": Fraction(1, 2)}


CASES: dict[str, Callable[[ResNet, State], Any]] = {
    "dino": lambda net, other: {
        "student": under("module.backbone.", backbone(net)), "teacher": under("backbone.", other), "loss": Fraction(1, 2)
    },
    "vicreg": vicreg,
    "module": lambda net, _: net,
    "arrays": lambda net, _: {name: tensor.numpy() for name, tensor in backbone(net).items()},
}  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, "pickle"])
def test_the_recipe_of_the_page(
    case: str, nets: dict[str, ResNet], wanted: dict[str, Tensor], images: Tensor, tmp_path: Path
) -> None:
    (lines,) = re.findall(r"```python\n(import numpy.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path / "untrusted.ckpt"
    if case == "pickle":
        file.write_bytes(pickle.dumps(CASES["arrays"](nets["student"], {})))
        opened = 'torch.load("untrusted.ckpt", map_location="cpu", weights_only=False)'
        instead = re.search(r"`(pickle\.load\(.*\))` instead", PAGE.read_text())
        assert instead is not None
        assert opened in lines
        lines = "import pickle\n" + lines.replace(opened, instead[1])
    else:
        torch.save(CASES[case](nets["student"], backbone(nets["teacher"])), file)
    with pytest.raises(DataError):
        checkpoints.load(file)
    subprocess.run([sys.executable, "-W", "ignore", "-c", lines], cwd=tmp_path, check=True, env=_environment())
    found = checkpoints.load(tmp_path / "weights.safetensors")
    with torch.inference_mode():
        assert torch.equal(found.encoders["student"](images), wanted["student"])
    file.unlink()
    (tmp_path / "weights.safetensors").unlink()


def _environment() -> dict[str, str]:
    return {"PYTHONPATH": str(PAGE.parents[1]), "PATH": "/usr/bin:/bin"}
