"""What the comparisons share: arms in turns within one process, their seconds, peak memory in processes of their own.

Seconds are this process's time on the processor (user and system), which is steadier than the clock where other programs run;
on a GPU they are those between two CUDA events. The order of the arms rotates, so that a machine that gets slower slows all.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from isd_repro.nn import products
from isd_repro.provenance import describe
from isd_repro.records import __file__
from isd_repro.runtime.errors import ConfigError, UserError

Say = Callable[[str], object]
PAGE = 4096 / 2**20  # MiB below which memory is not measured
# Blocks of 64 KiB or more go back to the system, so that none is left over from the inputs and counts as held.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


@dataclass(frozen=True)
class Comparison:
    """One comparison of some arms, the first of which is the baseline.

    Attributes:
        what: the name of the benchmark.
        sizes: what was measured.
        seconds: of every turn, by arm.
        memory_mib: most memory beyond the inputs, by arm; empty where it was not measured.
        floor: seconds that the hardware needs at its measured rate, and where from.
        check: how far apart what the arms computed is; each entry says from what.
        limits: the most that an entry of `check` may be; beyond it an arm computes something else and its ratio is worth nothing.
        how: what decided an arm's speed on this device (a kernel, a compiler), by arm.
        machine: what it ran on, and `load` how busy that was, before and after.
    """

    what: str
    sizes: dict[str, Any]
    seconds: dict[str, tuple[float, ...]]
    check: dict[str, float]
    floor: dict[str, float]
    memory_mib: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    clock: str = "processor seconds"
    machine: str = ""
    load: tuple[float, float] = (0.0, 0.0)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None

    @property
    def wrong(self) -> list[str]:
        """Entries of `check` that are beyond their limit, or no numbers."""
        return [name for name, limit in self.limits.items() if not self.check[name] <= limit]

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.seconds))

    def ratios(self, arm: str) -> list[float]:
        """How many times faster than the baseline an arm was, turn by turn."""
        return [base / own for base, own in zip(self.seconds[self.baseline], self.seconds[arm], strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with ratios and medians computed."""
        others = [arm for arm in self.seconds if arm != self.baseline]
        faster = {arm: {"median": statistics.median(self.ratios(arm)), "turns": self.ratios(arm)} for arm in others}
        memory = {arm: max(value, PAGE) for arm, value in self.memory_mib.items()}
        less = {arm: memory[self.baseline] / memory[arm] for arm in others if arm in memory}
        return {
            **asdict(self),
            "check": {name: value if math.isfinite(value) else None for name, value in self.check.items()},
            "wrong": self.wrong,
            "baseline": self.baseline,
            "n": len(self.seconds[self.baseline]),
            "faster": faster,
            "less_memory": less,
        }


def compare(
    what: str,
    sizes: Any,
    arms: Mapping[str, Callable[[], object]],
    *,
    floor: Callable[[], dict[str, float]],
    check: dict[str, float],
    limits: Mapping[str, float] = {},
    how: Mapping[str, str] = {},
    memory_mib: Mapping[str, float] = {},
    versions: Mapping[str, str] = {},
    say: Say = lambda line: None,
) -> Comparison:
    """Run every arm once to warm up, then `sizes.repeats` turns of all of them; `versions` are those of packages beside torch."""
    device, before = device_of(), os.getloadavg()[0]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    names = list(arms)
    for arm in names:
        arms[arm]()
    for turn in range(sizes.repeats):
        for arm in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[arm].append(seconds_of(arms[arm], device))
        say(f"{what}, turn {turn + 1}: " + ", ".join(f"{arm} {values[-1]:.3f} s" for arm, values in seconds.items()))
    found = describe(0.0)
    place = found.machine
    return Comparison(
        what=what,
        sizes=asdict(sizes),
        seconds={arm: tuple(values) for arm, values in seconds.items()},
        check=check,
        limits=dict(limits),
        how={arm: words for arm, words in how.items() if words},
        floor=floor(),
        memory_mib=dict(memory_mib),
        clock="seconds between CUDA events" if device.type == "cuda" else "processor seconds",
        machine=f"{place.gpu or place.cpu}, {torch.get_num_threads()} of {place.cores} threads, {place.system}",
        load=(round(before, 2), round(os.getloadavg()[0], 2)),
        versions={**found.versions, **versions},
        commit=found.commit,
        dirty=found.dirty,
    )


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.process_time()
    work()
    return time.process_time() - began


def device_of() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block torch uses so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_sizes(sizes: Any) -> None:
    """`ConfigError` where a number is not positive."""
    numbers = {name: value for name, value in asdict(sizes).items() if isinstance(value, int | float)}
    if bad := [name for name, value in numbers.items() if not isinstance(value, bool) and value <= 0]:
        raise ConfigError(f"cannot measure {sizes}", f"{', '.join(bad)} must be positive")


def multiply_rate(rows: int, inner: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of matrix products of one shape, by oneDNN on a CPU that has it; the median of five."""
    left, right = (torch.rand(count, inner, device=device).to(dtype) for count in (rows, columns))
    return _rate(lambda: products.times(left, right), 2 * rows * inner * columns, device)


def convolve_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a ResNet's 3x3 convolution with 128 channels at 28 px, its border counted as work; the median of five."""
    images = torch.rand(16, 128, 28, 28, device=device).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.rand(128, 128, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return _rate(lambda: functional.conv2d(images, weight, padding=1), 2 * 9 * 128 * images.numel(), device)


def _rate(work: Callable[[], object], flop: int, device: torch.device) -> float:
    """Of so much work at a time that starting it is no part of it."""
    times = max(1, int((1e12 if device.type == "cuda" else 1e9) / flop))

    def many() -> None:
        for _ in range(times):
            work()

    many()
    return flop * times / statistics.median(seconds_of(many, device) for _ in range(5))


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of copying 256 MiB; the median of five."""
    one = torch.rand(2**25, device=device)
    other = torch.empty_like(one)
    return 2 * 2**27 / statistics.median(seconds_of(lambda: other.copy_(one), device) for _ in range(5))


# --- memory -------------------------------------------------------------------------------------------------------------


def peak_in_process(module: str, *arguments: object) -> float:
    """MiB that `module.peak(*arguments)`, called in a fresh Python, says; arguments are given as text."""
    call = f"import sys; from {module} import peak; print('peak', peak(*sys.argv[1:]))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
        **_MALLOC,
    }
    words = [sys.executable, "-c", call, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise UserError(f"peak memory could not be measured: {last[:300]}", "choose smaller sizes")
    return float(done.stdout.rsplit("peak", 1)[1])


def peak_beyond(work: Callable[[], object]) -> float:
    """MiB that a call needs at its height beyond what is held before it; for a fresh process, whose peak is not behind it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    held_kib = _kib("VmRSS")
    work()
    return (_kib("VmHWM") - held_kib) / 2**10


def _kib(name: str) -> int:
    """A line of Linux's account of this process; a child's `ru_maxrss` would begin with its parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ConfigError("peak memory is read from /proc, which this system does not have", "leave memory out with --no-memory")
    return int(next(line for line in status.read_text("utf-8").splitlines() if line.startswith(name)).split()[1])


# --- words --------------------------------------------------------------------------------------------------------------


def lines(result: Comparison) -> list[str]:
    """What was measured, for a reader."""
    sizes = ", ".join(f"{name} {value}" for name, value in result.sizes.items())
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    found = [
        f"machine  {result.machine}; load {result.load[0]} to {result.load[1]}; {versions}",
        f"{result.what:<8} {sizes}; {result.clock}",
    ]
    for arm, values in result.seconds.items():
        faster = "" if arm == result.baseline else f"   {times(result.ratios(arm))}"
        memory = f"   {result.memory_mib[arm]:.1f} MiB extra" if arm in result.memory_mib else ""
        found.append(f"  {arm:<22} {spread(values, '.3f')} s{faster}{memory}")
    found.append("floor    " + ", ".join(f"{name} {value:.4g}" for name, value in result.floor.items()))
    found.append("check    " + ", ".join(f"{name} {value:.2g}" for name, value in result.check.items()))
    if result.how:
        found.append("how      " + "; ".join(f"{arm}: {words}" for arm, words in result.how.items()))
    if result.wrong:
        found.append(f"WRONG    beyond its limit: {', '.join(result.wrong)}")
    return found


def times(ratios: Sequence[float]) -> str:
    """So many times faster than the baseline, or so many times its time."""
    if statistics.median(ratios) >= 1:
        return f"x{spread(ratios, '.2f')} faster"
    return f"x{spread([1 / ratio for ratio in ratios], '.2f')} its time"


def spread(values: Sequence[float], form: str) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
