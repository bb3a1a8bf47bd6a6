"""The loss of ISD or MoCo v2 and its gradient on a large bank: the plain formula against attention over the bank.

All variants get the same random unit vectors. The plain formula copies the bank at every call, as the paper's code does at every
step. lightly's contrastive loss with its own bank is compared with MoCo's if it is installed; each of its calls also pushes the
batch into its bank. The check is the gradient of 16 images against the equations in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness, peers, plain_recipe
from isd_repro.methods.isd import attended_isd_loss
from isd_repro.methods.moco import attended_moco_loss
from isd_repro.nn import bank_attention

_CHECKED = 16  # images whose gradient is computed in float64


@dataclass(frozen=True)
class Sizes(harness.Sizes):
    """Batch B, bank K x D and temperatures; MoCo has one temperature, `tau_student`."""

    batch: int = 256
    bank: int = 128_000
    dim: int = 128
    tau_student: float = 0.02
    tau_teacher: float = 0.02
    method: Literal["isd", "moco"] = "isd"
    memory: bool = True  # measure peak memory on a CPU, in a process for each variant


CPU = {
    "loss-d128": Sizes(),
    "loss-d512": Sizes(dim=512),
    "loss-moco": Sizes(bank=65_536, tau_student=0.2, method="moco"),
}
CUDA = {name: replace(sizes, repetitions=11, calls=5) for name, sizes in CPU.items()}


def toy(sizes: Sizes) -> Sizes:
    """The same in a moment."""
    return replace(sizes, batch=20, bank=500, dim=16, repetitions=2, calls=1, memory=False)


def measure(sizes: Sizes, say: harness.Say) -> harness.Comparison:
    """Compare all variants that this device has."""
    device = harness.device_of()
    student, teacher, bank = inputs(sizes)
    works = {name: work_of(sizes, name, student, teacher, bank) for name in variants(sizes, device)}
    want, unit = _exact(sizes, student, teacher, bank), student[:_CHECKED].double()

    def check(name: str) -> dict[str, tuple[float, float]]:
        found = works[name]()[:_CHECKED].double()
        # lightly normalises the student's rows itself, so its gradient has no part along them
        aim = want - (want * unit).sum(1, keepdim=True) * unit if name == "lightly" else want
        error = float((found - aim).norm() / aim.norm().clamp_min(1e-30))
        return {"gradient error": (error, 2e-3 if "float16" in name or "TF32" in name else 1e-4)}

    def how(name: str) -> str:
        if "attention" not in name:
            return ""
        given = bank.half() if "float16" in name else bank
        why = bank_attention.why_not_triton(given)
        return f"{bank_attention.kernel_of(given)} (triton left out: {why})" if why else bank_attention.kernel_of(given)

    def floor() -> dict[str, float]:
        rate = harness.multiply_rate(device, torch.float16 if device.type == "cuda" else torch.float32)
        product = 2.0 * sizes.batch * sizes.bank * sizes.dim
        ours, theirs = (4, 3) if sizes.method == "isd" else (2, 2)  # the sweep makes two products for each of ISD's encoders
        return {
            "GFLOP/s": rate / 1e9,
            f"s for attention's {ours} products": ours * product / rate,
            f"s for the plain formula's {theirs}": theirs * product / rate,
        }

    def memory(name: str) -> float:
        return harness.peak_in_process(__name__, json.dumps(asdict(sizes)), name)

    versions = {"lightly": peers.version("lightly")} if "lightly" in works else {}
    fresh = memory if sizes.memory else None
    return harness.compare(
        "loss",
        sizes,
        works,
        check=check,
        floor=floor,
        how=how,
        memory=fresh,
        versions=versions,
        say=say,
    )


def variants(sizes: Sizes, device: torch.device) -> list[str]:
    """Names, the baseline first."""
    found = ["plain", "attention", "attention, float16 bank"]
    if device.type == "cuda":
        found[1:1] = ["plain, TF32"]
        found.append("chunked, float16 bank")
    return [*found, *(["lightly"] if sizes.method == "moco" and peers.module("lightly.loss") else [])]


def inputs(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and bank: random unit rows, made in place so that nothing larger was ever held."""
    device, draws = harness.device_of(), torch.Generator().manual_seed(0)
    student, teacher = (functional.normalize(torch.randn(sizes.batch, sizes.dim, generator=draws)).to(device) for _ in range(2))
    bank = torch.empty(sizes.bank, sizes.dim, device=device, dtype=dtype)
    for rows in bank.split(4096):
        rows.copy_(functional.normalize(torch.randn(len(rows), sizes.dim, generator=draws)))
    return student, teacher, bank


def work_of(sizes: Sizes, name: str, student: Tensor, teacher: Tensor, bank: Tensor) -> Callable[[], Tensor]:
    """Loss and gradient with respect to the student's embeddings, which the call returns."""
    taus = (sizes.tau_student,) if sizes.method == "moco" else (sizes.tau_student, sizes.tau_teacher)
    plain = name.startswith("plain")
    isd, moco = (plain_recipe.isd_loss, plain_recipe.moco_loss) if plain else (attended_isd_loss, attended_moco_loss)
    loss: Callable[..., Tensor] = isd if sizes.method == "isd" else moco
    rest: tuple[Any, ...] = (bank.half() if "float16" in name else bank, *taus)
    if name == "lightly":
        loss, rest = peers.lightly_loss(bank, sizes.tau_student), ()

    def work() -> Tensor:
        point = student.clone().requires_grad_()
        loss(point, teacher, *rest).backward()
        assert point.grad is not None
        return point.grad

    def in_tf32() -> Tensor:
        with harness.tf32():
            return work()

    def chunked() -> Tensor:
        with patch.object(bank_attention, "kernel_of", lambda rows: "chunked"):
            return work()

    return in_tf32 if "TF32" in name else chunked if "chunked" in name else work


def _exact(sizes: Sizes, student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """Gradients of the first images in float64: (p_s - p_t) X / (B tau_s) of ISD, ((p_0 - 1) k + p X) / (B tau) of MoCo."""
    rows, tau = bank.double(), sizes.tau_student
    asked, taught = (x[:_CHECKED].double() for x in (student, teacher))
    near = asked @ rows.T / tau
    if sizes.method == "moco":
        p = torch.softmax(torch.cat([(asked * taught).sum(1, keepdim=True) / tau, near], dim=1), dim=1)
        return ((p[:, :1] - 1) * taught + p[:, 1:] @ rows) / (sizes.batch * tau)
    p_t = torch.softmax(taught @ rows.T / sizes.tau_teacher, dim=1)
    return (torch.softmax(near, dim=1) - p_t) @ rows / (sizes.batch * tau)


def peak(sizes: str, name: str) -> float:
    """MiB beyond the inputs, in a process of its own; a first small call loads libraries and their buffers."""
    given = Sizes(**json.loads(sizes))
    torch.set_num_threads(given.threads)
    dtype = torch.float16 if "float16" in name else torch.float32
    small = replace(given, batch=2, bank=64, dim=8)
    work_of(small, name, *inputs(small, dtype))()
    return harness.peak_beyond(work_of(given, name, *inputs(given, dtype)))
