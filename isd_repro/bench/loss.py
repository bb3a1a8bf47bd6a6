"""`bench loss`: ISD's loss and gradient on a large bank, the plain formula and ours in turns.

Both get the same random unit vectors. The plain formula copies the bank, as the paper's code does at every step. Errors are
those of the gradient of 16 images against the equations in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.bench import plain, turns
from isd_repro.bench.turns import Comparison
from isd_repro.methods.isd import attended_isd_loss

_CHECKED = 16  # images whose gradient is computed in float64
_ARMS: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
    "plain": (plain.isd_loss, torch.float32),
    "attention": (attended_isd_loss, torch.float32),
    "attention, float16 bank": (attended_isd_loss, torch.float16),
}


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    batch: int = 256
    bank: int = 128_000
    dim: int = 128
    tau_student: float = 0.02
    tau_teacher: float = 0.02
    repeats: int = 5
    threads: int = 1


def bench(sizes: Sizes, *, memory: bool = True, say: turns.Say = lambda line: None) -> Comparison:
    """Measure; `ConfigError` for sizes that are none."""
    turns.check_sizes(sizes)
    device = turns.device_of()
    with turns.threads(sizes.threads):
        peaks = {arm: peak_of(sizes, arm) for arm in _ARMS} if memory else {}
        student, teacher, bank = inputs(sizes)
        banks = {torch.float32: bank, torch.float16: bank.half()}
        works = {arm: work_of(sizes, arm, student, teacher, banks[dtype]) for arm, (_, dtype) in _ARMS.items()}
        want = _exact(sizes, student, teacher, bank)
        check = {}
        for arm, work in works.items():
            found = work()[:_CHECKED].double()
            check[f"gradient error of {arm}"] = float((found - want).norm() / want.norm())

        def floor() -> dict[str, float]:
            rate = turns.multiply_rate(2 * sizes.batch, sizes.dim, 1024, device)
            product = 2.0 * sizes.batch * sizes.bank * sizes.dim
            return {"GFLOP/s": rate / 1e9, "s for 4 products": 4 * product / rate, "s for the plain 3": 3 * product / rate}

        return turns.compare("loss", sizes, works, floor=floor, check=check, memory_mib=peaks, say=say)


def inputs(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and bank: random unit rows, made in place so that nothing larger was ever held."""
    device = turns.device_of()
    draws = torch.Generator().manual_seed(0)
    student, teacher = (functional.normalize(torch.randn(sizes.batch, sizes.dim, generator=draws)).to(device) for _ in range(2))
    bank = torch.empty(sizes.bank, sizes.dim, device=device, dtype=dtype)
    for rows in bank.split(4096):
        rows.copy_(functional.normalize(torch.randn(len(rows), sizes.dim, generator=draws)))
    return student, teacher, bank


def work_of(sizes: Sizes, arm: str, student: Tensor, teacher: Tensor, bank: Tensor) -> Callable[[], Tensor]:
    """Loss and gradient with respect to the student's embeddings, which the call returns."""
    function = _ARMS[arm][0]

    def work() -> Tensor:
        point = student.clone().requires_grad_()
        function(point, teacher, bank, sizes.tau_student, sizes.tau_teacher).backward()
        assert point.grad is not None
        return point.grad

    return work


def _exact(sizes: Sizes, student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    """(p_s - p_t) X / (B tau_s) of the first images, in float64."""
    rows = bank.double()
    p_s, p_t = (
        torch.softmax(x[:_CHECKED].double() @ rows.T / tau, dim=1)
        for x, tau in ((student, sizes.tau_student), (teacher, sizes.tau_teacher))
    )
    return (p_s - p_t) @ rows / (sizes.batch * sizes.tau_student)


def peak_of(sizes: Sizes, arm: str) -> float:
    """MiB beyond the inputs, in a process of its own."""
    return turns.peak_in_process(__name__, arm, sizes.batch, sizes.bank, sizes.dim, sizes.threads)


def peak(arm: str, batch: str, bank: str, dim: str, threads: str) -> float:
    """What a fresh process runs."""
    torch.set_num_threads(int(threads))
    dtype = _ARMS[arm][1]
    small = Sizes(batch=2, bank=64, dim=8)
    work_of(small, arm, *inputs(small, dtype))()  # libraries and their buffers are loaded by a first call, whatever its size
    sizes = Sizes(batch=int(batch), bank=int(bank), dim=int(dim))
    return turns.peak_beyond(work_of(sizes, arm, *inputs(sizes, dtype)))
