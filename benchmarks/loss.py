"""`bench loss`: the loss of ISD or MoCo v2 and its gradient on a large bank, the plain formula and ours in turns.

All get the same random unit vectors. The plain formula copies the bank, as the paper's code does at every step. Where lightly is
installed, its contrastive loss with its own bank stands beside MoCo's; each of its calls ends with a push of 256 rows, which ours
leaves to the method. Errors are those of the gradient of 16 images against the equations in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import peers, plain, turns
from benchmarks.turns import Comparison
from isd_repro.methods.isd import attended_isd_loss
from isd_repro.methods.moco import attended_moco_loss
from isd_repro.nn.bank_attention import kernel_of, why_not_triton
from isd_repro.runtime.errors import ConfigError

_CHECKED = 16  # images whose gradient is computed in float64
Arms = dict[str, tuple[Callable[..., Tensor], torch.dtype]]
_ARMS: dict[str, Arms] = {
    "isd": {
        "plain": (plain.isd_loss, torch.float32),
        "attention": (attended_isd_loss, torch.float32),
        "attention, float16 bank": (attended_isd_loss, torch.float16),
    },
    "moco": {
        "plain": (plain.moco_loss, torch.float32),
        "attention": (attended_moco_loss, torch.float32),
        "attention, float16 bank": (attended_moco_loss, torch.float16),
    },
}
LIGHTLY = "lightly"  # the arm of a peer, which keeps its bank itself


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    batch: int = 256
    bank: int = 128_000
    dim: int = 128
    tau_student: float = 0.02  # MoCo's one temperature, too
    tau_teacher: float = 0.02
    repeats: int = 5
    threads: int = 1
    method: Literal["isd", "moco"] = "isd"

    @property
    def taus(self) -> tuple[float, ...]:
        """What the method's loss takes behind the bank."""
        return (self.tau_student,) if self.method == "moco" else (self.tau_student, self.tau_teacher)


def sizes_of(**values: int | float | str) -> Sizes:
    """Sizes of a method that has a bank, or `ConfigError`."""
    if values.get("method", "isd") not in _ARMS:
        raise ConfigError(f"--method: {values['method']!r} is none of {', '.join(_ARMS)}")
    return Sizes(**values)  # type: ignore[arg-type]


def bench(sizes: Sizes, *, memory: bool = True, say: turns.Say = lambda line: None) -> Comparison:
    """Measure; `ConfigError` for sizes that are none."""
    turns.check_sizes(sizes)
    device = turns.device_of()
    with turns.threads(sizes.threads):
        arms, versions = list(_ARMS[sizes.method]), {}
        if sizes.method == "moco" and peers.module("lightly.loss"):
            arms, versions = [*arms, LIGHTLY], {LIGHTLY: peers.version(LIGHTLY)}
        peaks = {arm: peak_of(sizes, arm) for arm in arms} if memory else {}
        student, teacher, bank = inputs(sizes)
        works = {arm: work_of(sizes, arm, student, teacher, bank) for arm in arms}
        want, unit = _exact(sizes, student, teacher, bank), student[:_CHECKED].double()
        check, limits = {}, {}
        for arm, work in works.items():  # lightly's first call: later ones see what it has pushed
            found = work()[:_CHECKED].double()
            limits[f"gradient error of {arm}"] = 2e-3 if "float16" in arm else 1e-4
            aim = want - (want * unit).sum(1, keepdim=True) * unit if arm == LIGHTLY else want
            check[f"gradient error of {arm}"] = float((found - aim).norm() / aim.norm().clamp_min(1e-30))

        how = {arm: _kernel(bank.to(dtype)) for arm, (_, dtype) in _ARMS[sizes.method].items() if arm != "plain"}

        def floor() -> dict[str, float]:
            rate = turns.multiply_rate(2 * sizes.batch, sizes.dim, 1024, device)
            product = 2.0 * sizes.batch * sizes.bank * sizes.dim
            ours, theirs = (4, 3) if sizes.method == "isd" else (2, 2)  # ISD's teacher takes one of the plain, two of the sweep
            return {
                "GFLOP/s": rate / 1e9,
                f"s for {ours} products": ours * product / rate,
                f"s for the plain {theirs}": theirs * product / rate,
            }

        return turns.compare(
            "loss", sizes, works, floor=floor, check=check, limits=limits, how=how, memory_mib=peaks, versions=versions, say=say
        )


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
    function: Callable[..., Tensor] | None
    if arm == LIGHTLY:
        function = peers.lightly_loss(bank, sizes.tau_student)
        assert function is not None
        rest: tuple[object, ...] = ()
    else:
        function, dtype = _ARMS[sizes.method][arm]
        rest = (bank.to(dtype), *sizes.taus)

    def work() -> Tensor:
        point = student.clone().requires_grad_()
        function(point, teacher, *rest).backward()
        assert point.grad is not None
        return point.grad

    return work


def _kernel(bank: Tensor) -> str:
    why = why_not_triton(bank)
    return f"{kernel_of(bank)} (triton left out: {why})" if why else kernel_of(bank)


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


def peak_of(sizes: Sizes, arm: str) -> float:
    """MiB beyond the inputs, in a process of its own."""
    return turns.peak_in_process(__name__, sizes.method, arm, sizes.batch, sizes.bank, sizes.dim, sizes.threads)


def peak(method: str, arm: str, batch: str, bank: str, dim: str, threads: str) -> float:
    """What a fresh process runs."""
    torch.set_num_threads(int(threads))
    dtype = torch.float16 if "float16" in arm else torch.float32
    small = sizes_of(batch=2, bank=64, dim=8, method=method)
    work_of(small, arm, *inputs(small, dtype))()  # libraries and their buffers are loaded by a first call, whatever its size
    sizes = sizes_of(batch=int(batch), bank=int(bank), dim=int(dim), method=method)
    return turns.peak_beyond(work_of(sizes, arm, *inputs(sizes, dtype)))
