"""Runs the Triton kernel in a process of its own, because Triton reads TRITON_INTERPRET when it is imported.

`sums IN OUT` takes a list of problems and writes what the kernel gives for each; `compiled` prints what it takes of a card.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from isd_repro.methods.isd import attended_isd_loss
from isd_repro.nn import bank_attention, bank_triton
from tests.parity.test_bank_attention import emulate_cuda


def fix_interpreter() -> None:
    """Triton 3.6, that of torch 2.11, takes an index by `int` of an array of one number, which numpy 2.5 refuses."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def sums(source: str, target: str) -> None:
    if version("triton").startswith("3.6."):
        fix_interpreter()
    found = []
    for problem in torch.load(source, weights_only=True):
        query, bank, splits = problem["query"], problem["bank"], problem["splits"]
        found.append([bank_triton.parts(query, bank, splits), bank_attention.by_triton(query, bank, splits)])
    with pytest.MonkeyPatch.context() as patch:
        emulate_cuda(patch)
        trial = bank_attention._trial(512, torch.device("cpu"))
    torch.save({"sums": found, "trial": trial, "gradients": gradients(torch.load(source, weights_only=True))}, target)


def gradients(problems: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Of ISD's loss, where a problem has a teacher, with `attend` on the kernel."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank_attention, "kernel_of", lambda bank: "triton")
        for problem in problems:
            if "teacher" in problem:
                point = problem["student"].clone().requires_grad_()
                attended_isd_loss(point, problem["teacher"], problem["bank"], 0.1, 0.02).backward()
                assert point.grad is not None
                found.append(point.grad)
    return found


def compiled() -> None:
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_

    found = []
    for features, capability in ((512, 80), (512, 90), (320, 90)):
        names = {"query_ND": "*fp16", "bank_KD": "*fp16", "lse_SN": "*fp32", "mean_SND": "*fp32"}
        sizes = {"D": features, "P": 512, "B": bank_triton.BLOCK, "T": bank_triton.tile_of(features)}
        signature = {**names, **dict.fromkeys(["count", "rows", "length"], "i32"), **dict.fromkeys(sizes, "constexpr")}
        aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(names))}
        made = compile_(
            ASTSource(bank_triton._kernel(), signature=signature, constexprs=sizes, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options=bank_triton.OPTIONS,
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append({"features": features, "capability": capability, "shared": made.metadata.shared, "usage": usage})
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "sums":
        sums(*sys.argv[2:])
    else:
        compiled()
