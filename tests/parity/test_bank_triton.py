"""The Triton kernel under Triton's interpreter against float64 sums written out, and the trial that a device puts it through."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isd_repro.config.params import Numerics
from isd_repro.methods.isd import attended_isd_loss
from isd_repro.nn import bank_attention, bank_triton, engine, products
from isd_repro.nn.bank import Bank
from isd_repro.nn.bank_attention import attend, by_triton, chunked, kernel_of, why_not_triton
from tests.parity.test_bank_attention import clustered, emulate_cuda, exact_isd, gradient_of, relative, unit_rows

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: it is for Linux")

# N, K, D, temperature, splits (0: the rule's): no tile (32 or 64 rows) and no split divides most K, no block of 64 most N
CASES = [
    (1, 1031, 512, 0.005, 0),
    (65, 331, 512, 0.005, 3),
    (65, 331, 512, 1.0, 3),
    (64, 256, 512, 0.05, 2),
    (3, 5, 512, 1.0, 0),
    (70, 1031, 320, 0.005, 4),
    (5, 200, 320, 1.0, 1),
    (130, 1031, 16, 0.005, 5),
    (9, 1, 16, 1.0, 0),
]


def child(*words: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    command = [sys.executable, "-m", "tests.parity.triton_child", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def problem_of(count: int, rows: int, features: int, tau: float, splits: int) -> dict[str, Any]:
    """Queries near rows of the bank, the last one among them, and a row of zeros."""
    bank, query = unit_rows(rows, features, 1), unit_rows(count, features, 2)
    near = nn.functional.normalize(bank[torch.linspace(rows - 1, 0, count).long()] + 0.5 * query, dim=1)
    bank[rows // 2] = 0
    return {"query": (near / tau).float(), "bank": bank.half(), "splits": splits}


def taught() -> dict[str, Any]:
    student, teacher, bank = clustered(20, 1500, 512, 7)
    return {
        **problem_of(1, 40, 512, 1.0, 0),
        "student": student.float(),
        "teacher": teacher.float(),
        "bank": bank.half(),
    }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The problems, and what the kernel made of them."""
    folder = tmp_path_factory.mktemp("triton")
    problems = [*(problem_of(*case) for case in CASES), taught()]
    torch.save(problems, folder / "in")
    child("sums", str(folder / "in"), str(folder / "out"), TRITON_INTERPRET="1")
    return problems, torch.load(folder / "out", weights_only=True)


def exact(query: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """lse and mean in float64 of the query as the kernel rounds it."""
    near = query.half().double() @ bank.double().T
    top = near.amax(1, keepdim=True)
    weight = (near - top).exp()
    total = weight.sum(1, keepdim=True)
    return (top + total.log())[:, 0], weight @ bank.double() / total


def agrees(lse: Tensor, mean: Tensor, query: Tensor, bank: Tensor) -> bool:
    """float32 sums of logits up to 200 to 2e-4, the mean to the 11 bits of a weight for each query."""
    want_lse, want_mean = exact(query, bank)
    apart = (mean.double() - want_mean).norm(dim=1)
    return bool(((lse.double() - want_lse).abs() <= 2e-4).all() and (apart <= 2**-11 * want_mean.norm(dim=1) + 1e-12).all())


# --- the kernel ---------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case])))
def test_the_kernel_gives_the_sums_of_float64(case: int, interpreted: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    """Of the bank and of each split by itself; and the same comparison refuses a bank that lacks or doubles its last row."""
    count, rows, features, _, splits = CASES[case]
    query, bank = interpreted[0][case]["query"], interpreted[0][case]["bank"]
    (lses, means), (lse, mean) = interpreted[1]["sums"][case]
    assert (lse.shape, mean.shape, lse.dtype, mean.dtype) == ((count,), (count, features), torch.float32, torch.float32)
    assert agrees(lse, mean, query, bank)
    if rows > 1:
        assert not agrees(lse, mean, query, bank[:-1])
        assert not agrees(lse, mean, query, torch.cat([bank, bank[-1:]]))
    if splits:
        assert len(lses) == splits
    tile = bank_triton.tile_of(features)
    length = tile * -(-rows // (tile * len(lses)))
    for each_lse, each_mean, part in zip(lses, means, bank.split(length), strict=True):
        assert agrees(each_lse, each_mean, query, part)


@needs_triton
def test_the_kernels_gradient_is_within_a_thousandth(interpreted: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    """As that of a float16 bank in the tests of `attend`."""
    student, teacher, bank = clustered(20, 1500, 512, 7)
    (found,) = interpreted[1]["gradients"]
    assert relative(found, exact_isd(student, teacher, bank.half().double(), 0.1, 0.02)[1]) <= 1e-3
    assert 1e-6 < relative(found, exact_isd(student, teacher, bank, 0.1, 0.02)[1]) <= 1e-3


@needs_triton
def test_the_kernel_passes_its_trial_beside_a_gpus_products(interpreted: tuple[list[dict[str, Any]], dict[str, Any]]) -> None:
    assert interpreted[1]["trial"] == ""


@needs_triton
@pytest.mark.slow
def test_the_kernel_compiles_for_cards_without_spilling_registers() -> None:
    """Shared memory that a program may have: 163 KiB at 8.0, 227 KiB at 9.0."""
    for found in json.loads(child("compiled", TRITON_INTERPRET="0")):
        assert 0 < found["shared"] <= {80: 163, 90: 227}[found["capability"]] * 1024, found
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", found["usage"]))
        assert int(usage["REG"]) > 128, found  # the sums alone
        assert (usage["STACK"], usage["LOCAL"]) == ("0", "0"), found


def test_splits_follow_from_the_sizes() -> None:
    """About 528 programs, and never more splits than tiles."""
    assert bank_triton.splits_of(512, 128_000, 512) == 66
    assert bank_triton.splits_of(1, 4096, 512) == 128
    assert bank_triton.splits_of(513, 128_000, 512) == 58
    assert bank_triton.splits_of(100_000, 128_000, 512) == bank_triton.splits_of(1, 1, 16) == 1


def test_a_cpu_run_loads_no_triton() -> None:
    """Where it is not installed all this works, too: nothing asks for it."""
    code = """
import sys, torch
sys.modules["triton"] = None
from isd_repro.nn import bank_attention, bank_triton
bank = torch.randn(5000, 512).half()
bank_attention.attend(torch.randn(3, 512), bank)
assert bank_attention.why_not_triton(bank) == ""
assert not hasattr(bank_triton, "tl")
print(bank_attention._trial(512, torch.device("cpu")))
"""
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith(("ModuleNotFoundError: ", "ImportError: "))


# --- the trial ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A CPU that counts as such a CUDA device, with a GPU's products and without oneDNN."""
    monkeypatch.setattr(bank_attention, "_takes_splits", lambda bank: len(bank) >= 4096 and bank.dtype == torch.float16)
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    emulate_cuda(monkeypatch)
    bank_attention._trial.cache_clear()
    yield monkeypatch
    bank_attention._trial.cache_clear()


def half(rows: int, features: int) -> Tensor:
    return torch.zeros(rows, features, dtype=torch.float16)


def other_tiles(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
    """A right kernel: `chunked` by other rows at a time, so its roundings are others."""
    return chunked(query, bank, 32)


def test_the_rule_on_such_a_card(card: pytest.MonkeyPatch) -> None:
    tried = []

    def kernel(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
        tried.append(bank.shape)
        return other_tiles(query, bank)

    card.setattr(bank_attention, "by_triton", kernel)
    want = {16: "flash", 256: "flash", 264: "chunked", 272: "triton", 320: "triton", 512: "triton", 528: "chunked"}
    assert {features: kernel_of(half(4096, features)) for features in want} == want
    assert kernel_of(half(4095, 512)) == kernel_of(half(4096, 512).float()) == "chunked"
    assert [shape[1] for shape in tried] == [272, 320, 512]
    assert kernel_of(half(8192, 512)) == "triton"
    assert len(tried) == 3  # once for each D and device
    attend(torch.randn(3, 512), half(4096, 512))
    assert tried[3:] == [(4096, 512)]  # the bank itself, and no trial more


def raising(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
    raise RuntimeError("out of resource: shared memory\nRequired: 163840\nand more")


def scaled(by_lse: float, by_mean: float) -> Callable[..., tuple[Tensor, Tensor]]:
    def kernel(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
        lse, mean = other_tiles(query, bank)
        return lse * by_lse, mean * by_mean

    return kernel


def one_query(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
    lse, mean = other_tiles(query, bank)
    mean[-1] = mean[-2]
    return lse, mean


BROKEN: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], str]] = {
    "raises": (raising, "RuntimeError: out of resource: shared memory Required: 163840"),
    "lse": (scaled(1.0001, 1.0), "wrong by 1.0e-04 of lse and "),
    "mean": (scaled(1.0, 1.003), " and 3.0e-03 of the mean"),
    "not finite": (scaled(float("nan"), 1.0), "wrong by nan of lse"),
    "a query": (one_query, "wrong by "),
    "without the first row": (lambda query, bank, splits=0: other_tiles(query, bank[1:]), "wrong by "),
    "without the tail": (lambda query, bank, splits=0: other_tiles(query, bank[: len(bank) // 64 * 64]), "wrong by "),
    "padded by a row of zeros": (
        lambda query, bank, splits=0: other_tiles(query, torch.cat([bank, 0 * bank[:1]])),
        "wrong by 2.9e-05 of lse and ",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_fails_its_trial_is_left_out_for_good(name: str, card: pytest.MonkeyPatch) -> None:
    kernel, why = BROKEN[name]
    tried = []

    def counted(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
        tried.append(len(bank))
        return kernel(query, bank, splits)

    card.setattr(bank_attention, "by_triton", counted)
    bank = unit_rows(5000, 512, 1).half()
    assert kernel_of(bank) == "chunked"
    assert why in why_not_triton(bank)
    assert "\n" not in why_not_triton(bank)
    query = unit_rows(3, 512, 2).float() / 0.02
    assert all(torch.equal(one, other) for one, other in zip(attend(query, bank), chunked(query, bank), strict=True))
    card.setattr(bank_attention, "by_triton", other_tiles)
    assert kernel_of(bank) == "chunked"
    assert tried == [4100]


def test_memory_that_is_out_says_nothing_of_the_kernel(card: pytest.MonkeyPatch) -> None:
    def full(query: Tensor, bank: Tensor, splits: int = 0) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("no more")

    card.setattr(bank_attention, "by_triton", full)
    with pytest.raises(torch.OutOfMemoryError):
        kernel_of(half(4096, 512))
    card.setattr(bank_attention, "by_triton", other_tiles)
    assert kernel_of(half(4096, 512)) == "triton"


def test_the_record_says_which_and_why_not(card: pytest.MonkeyPatch) -> None:
    method, fast = nn.Sequential(Bank(4096, 512, 64, dtype=torch.float16)), Numerics(engine="fast", precision="bf16")
    card.setattr(bank_attention, "by_triton", other_tiles)
    words = engine.kernels_of(method, fast)
    assert words == ", bank attention triton on float16"
    assert engine.complaints(words, "", ", compiled by inductor") == []
    bank_attention._trial.cache_clear()
    card.setattr(bank_attention, "by_triton", raising)
    words = engine.kernels_of(method, fast)
    assert words == f", bank attention chunked on float16 (triton left out: {BROKEN['raises'][1]})"
    assert engine.complaints(words, ", not compiled by inductor (why)") == [words[2:], "not compiled by inductor (why)"]


# --- a GPU --------------------------------------------------------------------------------------------------------------


def skip_a_small_card() -> None:
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 132 * 1024:
        pytest.skip("a program of this card may not have the shared memory that the kernel needs at this D")


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_kernel_on_a_gpu(case: tuple[int, int, int, float, int]) -> None:
    if case[2] > 256:
        skip_a_small_card()
    problem = problem_of(*case)
    lse, mean = by_triton(problem["query"].cuda(), problem["bank"].cuda(), problem["splits"])
    assert agrees(lse.cpu(), mean.cpu(), problem["query"], problem["bank"])


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4096, 8200, 128_000])
def test_the_gradient_on_a_gpu(rows: int) -> None:
    skip_a_small_card()
    exact = clustered(96, rows, 512, 5)
    student, teacher, bank = (x.float().cuda() for x in exact)
    assert (why_not_triton(bank.half()), kernel_of(bank.half())) == ("", "triton")
    found = gradient_of(lambda q, k, x: attended_isd_loss(q, k, x, 0.1, 0.02), student, teacher, bank.half())
    assert relative(found.cpu(), exact_isd(*exact, 0.1, 0.02)[1]) <= 1e-3
