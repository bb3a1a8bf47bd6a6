"""The bank's losses by attention against float64 sums written from the equations, with the plain float32 formulas beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isd_repro.methods.isd import attended_isd_loss, isd_loss
from isd_repro.methods.moco import attended_moco_loss, moco_loss
from isd_repro.nn import bank_attention, products
from isd_repro.nn.bank_attention import attend, chunked, flash, kernel_of
from tests.parity import oracles

SHAPES = [(1, 7, 3), (4, 13, 5), (5, 1, 2), (3, 1031, 8)]  # B, K, D; the last is no multiple of the chunk
TAUS = [(0.005, 0.005), (0.02, 0.02), (0.1, 0.01), (0.005, 1.0), (1.0, 0.005), (1.0, 1.0)]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def unit_rows(rows: int, features: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def clustered(batch: int, rows: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and bank about common centres, so that a few rows of the bank have most of the teacher's softmax."""
    centre = unit_rows(20, features, seed)
    draws = torch.Generator().manual_seed(seed + 1)
    own = torch.randint(20, (batch,), generator=draws)
    found = []
    for at, noise in ((own, 0.7), (own, 0.5), (torch.randint(20, (rows,), generator=draws), 0.8)):
        spread = torch.randn(len(at), features, generator=draws, dtype=torch.float64) / features**0.5
        found.append(F.normalize(centre[at] + noise * spread, dim=1))
    return found[0], found[1], found[2]


def rounded(student: Tensor, teacher: Tensor, bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values that float32 holds, in float64."""
    return student.float().double(), teacher.float().double(), bank.float().double()


def gradient_of(loss: Loss, student: Tensor, teacher: Tensor, bank: Tensor) -> Tensor:
    point = student.clone().requires_grad_()
    return torch.autograd.grad(loss(point, teacher, bank), point)[0]


def exact_isd(student: Tensor, teacher: Tensor, bank: Tensor, tau_student: float, tau_teacher: float) -> tuple[float, Tensor]:
    """KL(p_t || p_s) and (p_s - p_t) X / (B tau_s) in float64, as the paper has them."""
    s, t = student @ bank.T / tau_student, teacher @ bank.T / tau_teacher
    log_s, log_t = (x - x.amax(1, keepdim=True) for x in (s, t))
    log_s, log_t = (x - x.exp().sum(1, keepdim=True).log() for x in (log_s, log_t))
    loss = (log_t.exp() * (log_t - log_s)).sum() / len(student)
    return float(loss), (log_s.exp() - log_t.exp()) @ bank / (len(student) * tau_student)


def exact_moco(student: Tensor, teacher: Tensor, bank: Tensor, tau: float) -> tuple[float, Tensor]:
    logits = torch.cat([(student * teacher).sum(1, keepdim=True), student @ bank.T], dim=1) / tau
    logits = logits - logits.amax(1, keepdim=True)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    gradient = (p[:, :1] * teacher + p[:, 1:] @ bank - teacher) / (len(student) * tau)
    return float((logits.exp().sum(1).log() - logits[:, 0]).mean()), gradient


def relative(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


# --- float64: the formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taus", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_isd_loss_and_gradient_are_the_papers(shape: tuple[int, int, int], taus: tuple[float, float]) -> None:
    batch, rows, features = shape
    student, teacher, bank = unit_rows(batch, features, 1), unit_rows(batch, features, 2), unit_rows(rows, features, 3)
    lists = student.tolist(), teacher.tolist(), bank.tolist()
    assert float(attended_isd_loss(student, teacher, bank, *taus)) == pytest.approx(
        oracles.isd_loss(*lists, *taus), rel=1e-10, abs=1e-12
    )
    gradient = gradient_of(lambda q, k, x: attended_isd_loss(q, k, x, *taus), student, teacher, bank)
    torch.testing.assert_close(gradient, student.new_tensor(oracles.isd_gradient(*lists, *taus)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tau", [0.005, 0.07, 0.2, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_moco_loss_and_gradient_are_the_papers(shape: tuple[int, int, int], tau: float) -> None:
    batch, rows, features = shape
    student, teacher, bank = unit_rows(batch, features, 1), unit_rows(batch, features, 2), unit_rows(rows, features, 3)
    lists = student.tolist(), teacher.tolist(), bank.tolist()
    assert float(attended_moco_loss(student, teacher, bank, tau)) == pytest.approx(
        oracles.moco_loss(*lists, tau), rel=1e-10, abs=1e-12
    )
    gradient = gradient_of(lambda q, k, x: attended_moco_loss(q, k, x, tau), student, teacher, bank)
    torch.testing.assert_close(gradient, student.new_tensor(oracles.moco_gradient(*lists, tau)), rtol=1e-9, atol=1e-10)


def test_gradcheck() -> None:
    student, teacher, bank = unit_rows(3, 5, 1).requires_grad_(), unit_rows(3, 5, 2), unit_rows(41, 5, 3)
    assert torch.autograd.gradcheck(lambda q: attend(q, bank)[0], student)
    assert torch.autograd.gradcheck(lambda q: attended_isd_loss(q, teacher, bank, 0.1, 0.02), student)
    assert torch.autograd.gradcheck(lambda q: attended_moco_loss(q, teacher, bank, 0.2), student)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(attend(student, bank)[0].sum(), student, create_graph=True)


# --- float32 and float16: the roundings ---------------------------------------------------------------------------------

SEEDS = range(4)


@pytest.mark.parametrize("taus", [(0.005, 0.005), (0.02, 0.02), (0.1, 0.01), (1.0, 0.005), (1.0, 1.0)])
def test_float32_is_as_exact_as_the_plain_formula(taus: tuple[float, float]) -> None:
    """Largest error over some problems, of gradient and of loss.

    Half as much again is the luck of the draw; with AVX2 alone the gradient's is twice the plain formula's (4.9e-6).
    """
    errors: dict[str, list[float]] = {"plain": [], "ours": [], "plain loss": [], "ours loss": []}
    for seed in SEEDS:
        exact = rounded(*clustered(16, 3001, 64, 10 * seed))
        loss, gradient = exact_isd(*exact, *taus)
        student, teacher, bank = (x.float() for x in exact)
        for name, function in (("plain", isd_loss), ("ours", attended_isd_loss)):
            errors[name].append(relative(gradient_of(lambda q, k, x: function(q, k, x, *taus), student, teacher, bank), gradient))  # noqa: B023
            errors[f"{name} loss"].append(abs(float(function(student, teacher, bank, *taus)) - loss))
    room = 2.5 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1.5
    assert max(errors["ours"]) <= room * max(errors["plain"]), errors
    # a loss is a difference of logits of up to 1 / tau: it is known to their last bits
    room = 2 * torch.finfo(torch.float32).eps / min(taus)
    assert max(errors["ours loss"]) <= max(1.5 * max(errors["plain loss"]), room), errors


@pytest.mark.parametrize("tau", [0.005, 0.07, 0.2, 1.0])
def test_float32_moco_is_as_exact_as_the_plain_formula(tau: float) -> None:
    errors: dict[str, list[float]] = {"plain": [], "ours": []}
    for seed in SEEDS:
        exact = rounded(*clustered(16, 3001, 64, 10 * seed))
        loss, gradient = exact_moco(*exact, tau)
        student, teacher, bank = (x.float() for x in exact)
        for name, function in (("plain", moco_loss), ("ours", attended_moco_loss)):
            errors[name].append(relative(gradient_of(lambda q, k, x: function(q, k, x, tau), student, teacher, bank), gradient))  # noqa: B023
        assert float(attended_moco_loss(student, teacher, bank, tau)) == pytest.approx(loss, rel=1e-5, abs=1e-6 / tau)
    assert max(errors["ours"]) <= 1.5 * max(errors["plain"]), errors


def emulate_cuda(patch: pytest.MonkeyPatch) -> None:
    """Products as a GPU makes them: both factors rounded to float16, sums in float32."""
    patch.setattr(bank_attention, "_multiplies_half", lambda query, bank: True)
    patch.setattr(bank_attention, "_half_product", lambda left, right: left.half().float() @ right.float().T)


@pytest.mark.parametrize("device", ["cpu", "cuda, emulated"])
@pytest.mark.parametrize(
    ("taus", "stored"),
    [((0.02, 0.02), 1e-3), ((0.1, 0.02), 1e-3), ((0.1, 0.01), 1.5e-3), ((0.005, 0.005), 2e-3), ((1.0, 1.0), 1e-3)],
)
def test_a_float16_bank_moves_the_gradient_by_a_thousandth(
    taus: tuple[float, float], stored: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the float64 gradient of the same float16 rows; and, with the rounding of the rows, of the rows before it.

    A row keeps 11 bits whatever reads it: at teacher temperatures of 0.01 and below that alone is above a thousandth.
    """
    if device != "cpu":
        emulate_cuda(monkeypatch)
    student, teacher, bank = clustered(32, 5000, 512, 7)
    half = bank.half()
    found = gradient_of(lambda q, k, x: attended_isd_loss(q, k, x, *taus), student.float(), teacher.float(), half)
    assert found.dtype == torch.float32
    assert relative(found, exact_isd(student, teacher, half.double(), *taus)[1]) <= 1e-3
    assert 1e-6 < relative(found, exact_isd(student, teacher, bank, *taus)[1]) <= stored
    found = gradient_of(lambda q, k, x: attended_moco_loss(q, k, x, 0.2), student.float(), teacher.float(), half)
    assert 1e-6 < relative(found, exact_moco(student, teacher, bank, 0.2)[1]) <= 1e-3


def test_bfloat16_is_refused_and_autocast_has_no_part() -> None:
    student, _, bank = (x.float() for x in clustered(4, 200, 16, 1))
    with pytest.raises(TypeError, match="bfloat16 bank"):
        attend(student, bank.bfloat16())
    with pytest.raises(TypeError, match=r"torch\.float16 query"):
        attend(student.half(), bank)
    plain = attend(student / 0.02, bank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attend(student / 0.02, bank)
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))


# --- as a part of a graph -----------------------------------------------------------------------------------------------


def test_the_gradient_scales_adds_up_and_outlives_the_bank() -> None:
    student, teacher, bank = clustered(6, 700, 16, 3)
    once = gradient_of(lambda q, k, x: attended_isd_loss(q, k, x, 0.1, 0.02), student, teacher, bank)
    other = gradient_of(lambda q, k, x: attended_moco_loss(q, k, x, 0.2), student, teacher, bank)

    def both(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        x = x.clone()
        total = 3 * attended_isd_loss(q, k, x, 0.1, 0.02) - 0.5 * attended_moco_loss(q, k, x, 0.2)
        x.zero_()  # as `push` overwrites rows before `backward`
        return total + attended_isd_loss(q, k, bank, 0.1, 0.02)

    torch.testing.assert_close(gradient_of(both, student, teacher, bank), 4 * once - 0.5 * other, rtol=1e-12, atol=1e-14)


def test_only_the_student_takes_a_gradient() -> None:
    student, teacher, bank = (x.requires_grad_() for x in clustered(4, 50, 8, 2))
    (attended_isd_loss(student, teacher, bank, 0.1, 0.1) + attended_moco_loss(student, teacher, bank, 0.2)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert bank.grad is None


# --- kernels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 64])
@pytest.mark.parametrize("rows", [64, 200, 1031])
def test_flash_is_the_chunked_sum(parts: int, rows: int) -> None:
    """Through the operator's CPU form: splitting, merging and the rest of the bank are the same code on CUDA."""
    query, bank = unit_rows(9, 16, 1).float() / 0.02, unit_rows(rows, 16, 2).float()
    for found, want in zip(flash(query, bank, parts), chunked(query.double(), bank.double()), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 256, 5000])
def test_the_size_of_a_chunk_changes_roundings_alone(rows: int) -> None:
    query, bank = unit_rows(5, 8, 1) / 0.005, unit_rows(1031, 8, 2)
    for found, want in zip(chunked(query, bank, rows), chunked(query, bank), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)


def test_no_matrix_of_the_batch_and_the_bank_is_made() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = function(*args, **(kwargs or {}))
            for each in found if isinstance(found, tuple | list) else (found,):
                if isinstance(each, Tensor):
                    self.size = max(self.size, each.untyped_storage().nbytes())
            return found

    student, teacher, bank = (x.float() for x in clustered(16, 20_000, 8, 1))
    with Largest() as ours:
        attended_isd_loss(student.requires_grad_(), teacher, bank, 0.1, 0.1).backward()
    with Largest() as plain:
        isd_loss(student, teacher, bank, 0.1, 0.1).backward()
    assert ours.size == bank.nbytes  # the bank itself, as a view of its rows
    assert plain.size >= 16 * 20_000 * 4


def test_the_rule_on_a_cpu() -> None:
    assert kernel_of(torch.zeros(10_000, 128)) == "onednn"
    assert kernel_of(torch.zeros(10_000, 128, dtype=torch.float16)) == "onednn"
    assert kernel_of(torch.zeros(10_000, 128, dtype=torch.float64)) == "chunked"


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (3, 7, 5), (64, 128, 96), (33, 515, 1)])
def test_products_are_those_of_float64(
    rows: int, inner: int, columns: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of matrices that lie transposed in memory, and where torch has no oneDNN."""
    assert products.has_onednn() == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(products, "has_onednn", lambda: onednn)
    assert products.by_onednn(torch.zeros(1, 1)) == onednn
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.randn(count, inner, generator=draws) for count in (rows, columns))
    want = left.double() @ right.double().T
    room = 1e-6 * inner
    for one in (left, left.T.contiguous().T):
        for other in (right, right.T.contiguous().T):
            torch.testing.assert_close(products.times(one, other).double(), want, rtol=0, atol=room)
    assert torch.equal(products.times(left.double(), right.double()), want)


def test_both_products_give_the_sums_of_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    query, bank = unit_rows(9, 16, 1).float() / 0.02, unit_rows(3000, 16, 2).float()
    ours = attend(query, bank)
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    assert kernel_of(bank) == "chunked"
    for found, want in zip(ours, attend(query, bank), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("features", "rows", "kernel"),
    [(128, 8192, "flash"), (256, 8200, "flash"), (512, 8200, "triton"), (520, 8200, "chunked"), (512, 4000, "chunked")],
)
def test_cuda_kernels_against_float64(features: int, rows: int, kernel: str) -> None:
    exact = clustered(32, rows, features, 5)
    loss, gradient = exact_isd(*exact, 0.1, 0.02)
    student, teacher, bank = (x.float().cuda() for x in exact)
    half = bank.half()
    if kernel == "triton" and torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 132 * 1024:
        kernel = "chunked"  # and the trial finds it out
    assert (kernel_of(half), kernel_of(bank)) == (kernel, "chunked")
    for rows_KD, room in ((half, 1e-3), (bank, 1e-4)):
        found = gradient_of(lambda q, k, x: attended_isd_loss(q, k, x, 0.1, 0.02), student, teacher, rows_KD)
        assert relative(found.cpu(), gradient) <= room
        assert float(attended_isd_loss(student, teacher, rows_KD, 0.1, 0.02)) == pytest.approx(loss, rel=1e-3)
