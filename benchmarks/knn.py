"""`bench knn`: exact nearest-neighbour search against faiss-cpu's exact index, in turns within one process.

Both search the same random clustered unit vectors with the same threads. An evaluation wants the neighbours for k = 1 and for
k: ours gives both from one search, a plain evaluation with faiss searches twice, and that is the comparison (`faster`, of
processor time). One search of each for the same k stands beside it. Turns alternate (ours, faiss, ours, faiss, ...), so that a
machine that gets slower slows both, and each turn gives one ratio, of wall clock and of processor time: the second is steadier
where other programs run. Ours reads, checks, normalises and orders the bank in every turn, as an evaluation does; faiss's time
is that of its searches alone, and what it takes to normalise and add the bank stands beside it.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from isd_repro.evaluations import knn
from isd_repro.evaluations.arithmetic import exact
from isd_repro.provenance import describe
from isd_repro.runtime.errors import ConfigError, UserError

CPU = torch.device("cpu")
CLUSTERS = 100
_CORES = {"AVX512": "SkylakeX", "AVX2": "Haswell"}  # OpenBLAS kernels by what torch sees
ONE, TWO = "one search", "faiss-cpu, two searches"
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
        ours, faiss, build: wall-clock seconds of each turn: our search, faiss's, and the making of its index.
        cpu: processor time of ours over that of faiss's search, of each turn.
        twice: processor time of faiss's two searches, for 1 and for k neighbours, over that of ours, of each turn.
        first: share of queries whose first neighbour is that of faiss's search for one.
        floor: processor seconds that the multiplications alone take at this machine's measured rate, of each turn.
        gflops: that rate, its median.
        neighbours: share of (query, rank) with the same neighbour.
        unexplained: neighbours that differ although their similarities do by more than `NEAR`.
        votes: share of queries with the same class for k = 1 and for k.
    """

    sizes: Sizes
    ours: tuple[float, ...]
    faiss: tuple[float, ...]
    build: tuple[float, ...]
    cpu: tuple[float, ...]
    twice: tuple[float, ...]
    first: float
    floor: tuple[float, ...]
    gflops: float
    neighbours: float
    unexplained: int
    votes: dict[int, float]
    versions: dict[str, str]
    machine: str
    kernels: str
    load: tuple[float, float]
    commit: str | None
    dirty: bool | None

    @property
    def ratios(self) -> list[float]:
        """Ours over faiss, turn by turn."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.faiss, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the ratios computed."""
        medians = {"ratio": statistics.median(self.ratios), "cpu_ratio": statistics.median(self.cpu)}
        faster = {ONE: {"median": statistics.median(self.twice), "turns": self.twice}}
        table = {"baseline": TWO, "n": self.sizes.repeats, "faster": faster, "less_memory": {}}
        table["wrong"] = [] if self.unexplained == 0 else [f"{self.unexplained} other neighbours"]
        return {**asdict(self), "ratios": self.ratios, **medians, **table}


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
    ours, theirs, build, cpu, twice, floor = [], [], [], [], [], []
    near = found = single = torch.empty(0)
    before = os.getloadavg()[0]
    _gemm(sizes)
    for turn in range(sizes.repeats):
        floor.append(_gemm(sizes))
        times = [_now()]
        near = knn.nearest(bank, label, query, sizes.k, CPU)
        times.append(_now())
        index = faiss.IndexFlatIP(sizes.dim)
        index.add(functional.normalize(bank, dim=1).numpy())
        times.append(_now())
        found = torch.from_numpy(index.search(unit_query.numpy(), sizes.k)[1])
        times.append(_now())
        single = torch.from_numpy(index.search(unit_query.numpy(), 1)[1])
        times.append(_now())
        mine, made, searched, again = (after - before for before, after in itertools.pairwise(times))
        ours.append(float(mine[0]))
        build.append(float(made[0]))
        theirs.append(float(searched[0]))
        cpu.append(float(mine[1] / searched[1]))
        twice.append(float((again[1] + searched[1]) / mine[1]))
        on_turn(turn, ours[-1], theirs[-1])
    flop = 2.0 * sizes.bank * sizes.dim * sizes.queries
    place = describe(0.0)
    machine = place.machine
    return Result(
        sizes=sizes,
        ours=tuple(ours),
        faiss=tuple(theirs),
        build=tuple(build),
        cpu=tuple(cpu),
        twice=tuple(twice),
        first=float((near[:, :1] == single).float().mean()),
        floor=tuple(floor),
        gflops=flop / statistics.median(floor) / 1e9,
        neighbours=float((near == found).float().mean()),
        unexplained=_unexplained(bank, query, near, found),
        votes={k: float((knn.vote(label[near[:, :k]]) == knn.vote(label[found[:, :k]])).float().mean()) for k in {1, sizes.k}},
        versions={"torch": torch.__version__, "faiss": faiss.__version__},
        kernels=os.environ.get("OPENBLAS_CORETYPE") or "as it chooses",
        machine=f"{machine.cpu}, {sizes.threads} of {machine.cores} threads, {machine.system}",
        commit=place.commit,
        dirty=place.dirty,
        load=(round(before, 2), round(os.getloadavg()[0], 2)),
    )


def _now() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Wall-clock and processor seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def clustered(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Bank, its classes and queries: noisy copies of random centres, the bank sorted by class as image folders are."""
    draw = torch.Generator().manual_seed(0)
    centre = torch.randn(CLUSTERS, sizes.dim, generator=draw)
    label = torch.arange(sizes.bank) * CLUSTERS // sizes.bank
    bank = torch.randn(sizes.bank, sizes.dim, generator=draw).mul_(2).add_(centre[label])
    asked = torch.randint(0, CLUSTERS, (sizes.queries,), generator=draw)
    return bank, label, torch.randn(sizes.queries, sizes.dim, generator=draw).mul_(2).add_(centre[asked])


def _gemm(sizes: Sizes) -> float:
    """Processor seconds of the multiplications of one search and of nothing else, in blocks as `knn` has them."""
    left, right = torch.ones(knn.QUERY_ROWS, sizes.dim), torch.ones(knn.BANK_ROWS, sizes.dim)
    out = torch.empty(knn.QUERY_ROWS, knn.BANK_ROWS)
    products = math.ceil(sizes.bank / knn.BANK_ROWS) * math.ceil(sizes.queries / knn.QUERY_ROWS)
    with exact(CPU):
        begun = time.process_time()
        for _ in range(products):
            torch.mm(left, right.T, out=out)
        taken = time.process_time() - begun
    return taken / products * (sizes.bank / knn.BANK_ROWS) * (sizes.queries / knn.QUERY_ROWS)


def _unexplained(bank: Tensor, query: Tensor, near: Tensor, found: Tensor) -> int:
    """Neighbours that differ in position by more than the order of near-equal similarities."""
    row, rank = (near != found).nonzero(as_tuple=True)
    unit = functional.normalize(query[row].double(), dim=1)
    one, other = (functional.normalize(bank[which[row, rank]].double(), dim=1) for which in (near, found))
    gap = ((unit * one).sum(dim=1) - (unit * other).sum(dim=1)).abs()
    return int((gap > NEAR).sum())


def _faiss() -> Any:
    """faiss with the fastest kernels for this CPU: its OpenBLAS takes virtual CPUs for old ones and runs at a quarter."""
    capability = torch.backends.cpu.get_cpu_capability()
    os.environ.setdefault("OPENBLAS_CORETYPE", _CORES.get(capability, ""))
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(
            "`bench knn` compares with faiss-cpu, which is not installed", 'install the extra "dev" of isd-repro'
        ) from error


def lines(result: Result) -> list[str]:
    """What was measured, for a reader."""
    sizes = result.sizes
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())

    def seconds(values: tuple[float, ...]) -> str:
        return f"median {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})"

    votes = ", ".join(f"k={k} {100 * share:.2f} %" for k, share in sorted(result.votes.items()))
    return [
        f"machine     {result.machine}; {versions}",
        f"search      {sizes.bank} x {sizes.dim} float32, {sizes.queries} queries, k={sizes.k}, n={sizes.repeats} turns",
        f"isd-repro   {seconds(result.ours)}",
        f"faiss-cpu   {seconds(result.faiss)}  IndexFlatIP, OpenBLAS kernels {result.kernels}",
        f"faiss index {seconds(result.build)}  normalise and add",
        f"floor       {seconds(result.floor)}  the products alone, at a measured {result.gflops:.1f} GFLOP/s",
        f"faster      {_spread(result.twice)} times than faiss-cpu's two searches, for 1 and for {sizes.k}, by processor time",
        f"ratio       {_spread(result.ratios)} of faiss-cpu's search by the clock, {_spread(result.cpu)} by processor time",
        f"same        neighbours {100 * result.neighbours:.3f} %, of the others {result.unexplained} no near-ties; votes {votes}",
        f"first       {100 * result.first:.3f} % of the first neighbours are those of faiss's search for one",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
