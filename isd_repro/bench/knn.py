"""`bench knn`: exact nearest-neighbour search against faiss-cpu's exact index, in turns within one process.

Both search the same random clustered unit vectors for the same k with the same threads. Turns alternate (ours, faiss, ours,
faiss, ...), so that a machine that gets slower slows both, and each turn gives one ratio. faiss searches an index that holds
its vectors already normalised; ours reads, normalises and orders the bank in every turn, as an evaluation does.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isd_repro import artifacts
from isd_repro.errors import ConfigError, UserError
from isd_repro.evals import knn
from isd_repro.evals.arithmetic import exact

CPU = torch.device("cpu")
CLUSTERS = 100
NEAR = 1e-5  # similarities closer than this may be ordered either way in float32


@dataclass(frozen=True)
class Sizes:
    """What is searched, and how often."""

    bank: int = 100_000
    dim: int = 512
    queries: int = 1_000
    k: int = 20
    repeats: int = 5
    threads: int = 1


@dataclass(frozen=True)
class Result:
    """Seconds of every turn, and whether both found the same.

    Attributes:
        ours, faiss: seconds of each turn.
        floor: seconds that the multiplications alone take at this machine's measured rate, of each turn.
        gflops: that rate, its median.
        neighbours: share of (query, rank) with the same neighbour.
        unexplained: neighbours that differ although their similarities do by more than `NEAR`.
        votes: share of queries with the same class for k = 1 and for k.
    """

    sizes: Sizes
    ours: tuple[float, ...]
    faiss: tuple[float, ...]
    floor: tuple[float, ...]
    gflops: float
    neighbours: float
    unexplained: int
    votes: dict[int, float]
    versions: dict[str, str]
    machine: str

    @property
    def ratios(self) -> list[float]:
        """Ours over faiss, turn by turn."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.faiss, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratios computed."""
        return {**asdict(self), "ratios": self.ratios, "ratio": statistics.median(self.ratios)}


def bench(sizes: Sizes, on_turn: Callable[[int, float, float], object] = lambda turn, ours, faiss: None) -> Result:
    """Measure.

    Raises:
        UserError: faiss is not installed.
        ConfigError: sizes that cannot be searched.
    """
    faiss = _faiss()
    if min(asdict(sizes).values()) < 1 or sizes.k > sizes.bank:
        raise ConfigError(f"cannot search {sizes}", "every size must be 1 or more, and k no more than the bank")
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(sizes.threads)
    faiss.omp_set_num_threads(sizes.threads)
    try:
        return _measure(faiss, sizes, on_turn)
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


def _measure(faiss: Any, sizes: Sizes, on_turn: Callable[[int, float, float], object]) -> Result:
    bank, label, query = clustered(sizes)
    unit_query = functional.normalize(query, dim=1)
    index = faiss.IndexFlatIP(sizes.dim)
    index.add(functional.normalize(bank, dim=1).numpy())
    ours, theirs, floor = [], [], []
    near = found = torch.empty(0)
    _gemm(sizes)
    for turn in range(sizes.repeats):
        floor.append(_gemm(sizes))
        begun = time.perf_counter()
        near = knn.nearest(bank, label, query, sizes.k, CPU)
        middle = time.perf_counter()
        found = torch.from_numpy(index.search(unit_query.numpy(), sizes.k)[1])
        ours.append(middle - begun)
        theirs.append(time.perf_counter() - middle)
        on_turn(turn, ours[-1], theirs[-1])
    flop = 2.0 * sizes.bank * sizes.dim * sizes.queries
    machine = artifacts.provenance(0.0).machine
    return Result(
        sizes=sizes,
        ours=tuple(ours),
        faiss=tuple(theirs),
        floor=tuple(floor),
        gflops=flop / statistics.median(floor) / 1e9,
        neighbours=float((near == found).float().mean()),
        unexplained=_unexplained(bank, query, near, found),
        votes={k: float((knn.vote(label[near[:, :k]]) == knn.vote(label[found[:, :k]])).float().mean()) for k in {1, sizes.k}},
        versions={"torch": torch.__version__, "faiss": faiss.__version__},
        machine=f"{machine.cpu}, {sizes.threads} of {machine.cores} threads, {machine.system}",
    )


def clustered(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Bank, its classes and queries: noisy copies of random centres, the bank sorted by class as image folders are."""
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(CLUSTERS, sizes.dim, generator=draw)
    label = torch.arange(sizes.bank) * CLUSTERS // sizes.bank
    bank = torch.randn(sizes.bank, sizes.dim, generator=draw).mul_(2).add_(centre[label])
    asked = torch.randint(0, CLUSTERS, (sizes.queries,), generator=draw)
    return bank, label, torch.randn(sizes.queries, sizes.dim, generator=draw).mul_(2).add_(centre[asked])


def _gemm(sizes: Sizes) -> float:
    """Seconds of the multiplications of one search and of nothing else, in blocks as `knn` has them."""
    left, right = torch.ones(knn.QUERY_ROWS, sizes.dim), torch.ones(knn.BANK_ROWS, sizes.dim)
    out = torch.empty(knn.QUERY_ROWS, knn.BANK_ROWS)
    products = math.ceil(sizes.bank / knn.BANK_ROWS) * math.ceil(sizes.queries / knn.QUERY_ROWS)
    with exact(CPU):
        begun = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right.T, out=out)
        taken = time.perf_counter() - begun
    return taken / products * (sizes.bank / knn.BANK_ROWS) * (sizes.queries / knn.QUERY_ROWS)


def _unexplained(bank: Tensor, query: Tensor, near: Tensor, found: Tensor) -> int:
    """Neighbours that differ in position by more than the order of near-equal similarities."""
    row, rank = (near != found).nonzero(as_tuple=True)
    unit = functional.normalize(query[row].double(), dim=1)
    one, other = (functional.normalize(bank[which[row, rank]].double(), dim=1) for which in (near, found))
    gap = ((unit * one).sum(dim=1) - (unit * other).sum(dim=1)).abs()
    return int((gap > NEAR).sum())


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            "`bench knn` compares with faiss-cpu, which is not installed", 'install the extra "dev" of isd-repro'
        ) from error


def lines(result: Result) -> list[str]:
    """What was measured, for a reader."""
    sizes, ratios = result.sizes, sorted(result.ratios)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())

    def seconds(values: tuple[float, ...]) -> str:
        return f"median {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})"

    votes = ", ".join(f"k={k} {100 * share:.2f} %" for k, share in sorted(result.votes.items()))
    return [
        f"machine     {result.machine}; {versions}",
        f"search      {sizes.bank} x {sizes.dim} float32, {sizes.queries} queries, k={sizes.k}, n={sizes.repeats} turns",
        f"isd-repro   {seconds(result.ours)}",
        f"faiss-cpu   {seconds(result.faiss)}  IndexFlatIP, built beforehand",
        f"floor       {seconds(result.floor)}  the products alone, at a measured {result.gflops:.1f} GFLOP/s",
        f"ratio       median {statistics.median(ratios):.3f} of faiss-cpu's time by turn ({ratios[0]:.3f} to {ratios[-1]:.3f})",
        f"same        neighbours {100 * result.neighbours:.3f} %, of the others {result.unexplained} no near-ties; votes {votes}",
    ]
