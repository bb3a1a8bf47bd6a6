"""One comparison: variants of the same computation against a baseline, with a correctness check beside every ratio.

All variants run in one process. Repetitions are interleaved and the order rotates, so a machine that slows down slows every
variant. Times are this process's processor seconds on a CPU, which other programs disturb less than the wall clock, and seconds
between two CUDA events on a GPU.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from isd_repro.nn import products
from isd_repro.provenance import describe
from isd_repro.runtime.errors import ConfigError, UserError

Say = Callable[[str], object]
Check = Callable[[str], dict[str, tuple[float, float]]]  # of a variant: what was checked -> the value, and the most it may be
PAGE = 4096 / 2**20  # MiB; less memory than this cannot be measured
# Blocks of 64 KiB or more go back to the system at once, so that memory left over from the inputs does not count as held.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


class Seconds(float):
    """A variant returns this when it has timed the relevant part of itself."""


@dataclass(frozen=True)
class Sizes:
    """What every comparison can be told; subjects add their own sizes."""

    repetitions: int = 5
    calls: int = 1  # calls of a variant within one repetition
    threads: int = 1
    only: tuple[str, ...] = ()  # variants to measure; empty means all


class Clock:
    """The time after which no further repetition or variant begins; `gpu_day` sets it."""

    end = math.inf

    @classmethod
    def is_over(cls) -> bool:
        """Whether that time has come."""
        return time.monotonic() > cls.end


@dataclass(frozen=True)
class Comparison:
    """The result of one comparison. The first variant is the baseline.

    Attributes:
        what: the subject.
        sizes: what was measured.
        seconds: of one call, for every repetition, by variant.
        check: how far each variant's result is from the expected one.
        limits: the most that an entry of `check` may be; beyond it the variant computes something else.
        floor: what the hardware needs at its measured rates, in seconds, and those rates.
        memory_mib: peak memory beyond the inputs, by variant; empty if not measured.
        how: the kernel or compiler that a variant ran with.
        failed: the error of a variant that could not run.
        images: that a call takes; 0 where it takes none.
        least: seconds that a call needs at the rates of `floor` at least, by variant.
        load: the machine's load average before and after.
    """

    what: str
    sizes: dict[str, Any]
    seconds: Mapping[str, tuple[float, ...]]
    check: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    images: int = 0
    least: dict[str, float] = field(default_factory=dict)
    clock: str = "processor seconds"
    machine: str = ""
    load: tuple[float, float] = (0.0, 0.0)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None

    @property
    def wrong(self) -> list[str]:
        """Checks beyond their limit or not a number, and variants that failed."""
        beyond = [name for name, limit in self.limits.items() if not self.check[name] <= limit]
        return [*beyond, *(f"{name} failed" for name in self.failed)]

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.seconds), "")

    def speed(self, variant: str) -> str:
        """Images per second and the share of what the hardware allows, in words that follow others; empty without either."""
        seconds = statistics.median(self.seconds[variant])
        found = f", {self.images / seconds:.0f} images/s" if self.images else ""
        return found + (f", {self.least[variant] / seconds:.0%} of the roofline" if variant in self.least else "")

    def ratios(self, variant: str) -> list[float]:
        """How many times faster than the baseline a variant was, by repetition."""
        return [base / own for base, own in zip(self.seconds[self.baseline], self.seconds[variant], strict=True)]

    def as_json(self) -> dict[str, Any]:
        """All fields, with ratios and medians computed; `turns` are the repetitions."""
        others = [name for name in self.seconds if name != self.baseline]
        memory = {name: max(value, PAGE) for name, value in self.memory_mib.items()}
        measured = [name for name in others if name in memory and self.baseline in memory]
        return {
            **asdict(self),
            "check": {name: value if math.isfinite(value) else None for name, value in self.check.items()},
            "wrong": self.wrong,
            "baseline": self.baseline,
            "n": len(self.seconds.get(self.baseline, ())),
            "faster": {n: {"median": statistics.median(self.ratios(n)), "turns": self.ratios(n)} for n in others},
            "speed": {name: self.speed(name).removeprefix(", ") for name in self.seconds},
            "less_memory": {name: memory[self.baseline] / memory[name] for name in measured},
        }

    def lines(self) -> list[str]:
        """The result for a terminal."""
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items() if value != ())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        found = [
            f"machine  {self.machine}; load {self.load[0]} to {self.load[1]}; {versions}",
            f"{self.what:<8} {sizes}; {self.clock}",
        ]
        for name, values in self.seconds.items():
            faster = "" if name == self.baseline else f"   {spread(self.ratios(name), '.2f')} times as fast"
            memory = f"   {self.memory_mib[name]:.1f} MiB extra" if name in self.memory_mib else ""
            found.append(f"  {name:<26} {spread(values, '.4g')} s{faster}{memory}{self.speed(name)}")
        found += [f"  {name:<26} FAILED: {why}" for name, why in self.failed.items()]
        for title, numbers in (("floor", self.floor), ("check", self.check)):
            if numbers:
                found.append(f"{title:<8} " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
        if self.how:
            found.append("how      " + "; ".join(f"{name}: {words}" for name, words in self.how.items()))
        return [*found, *([f"WRONG    {', '.join(self.wrong)}"] if self.wrong else [])]


def compare(
    what: str,
    sizes: Sizes,
    variants: Mapping[str, Callable[[], object]],
    *,
    check: Check = lambda name: {},
    floor: Callable[[], dict[str, float]] = dict,
    how: Callable[[str], str] = lambda name: "",
    memory: Callable[[str], float] | None = None,
    versions: Mapping[str, str] = {},
    say: Say = lambda line: None,
) -> Comparison:
    """Check and warm up every variant, then time the repetitions. A variant that fails leaves the others running.

    Args:
        what: the subject.
        sizes: repetitions, calls and variants to measure, and what the caller made the variants of.
        variants: what is timed, the baseline first.
        check: compares a variant's result with the expected one; called before the variant's first timed call.
        floor: what the hardware would need; called last.
        how: says which kernel or compiler a variant uses, after its first call.
        memory: MiB that a variant needs on a CPU; on a GPU the allocator counts it.
        versions: of other packages that take part.
        say: takes a line of progress.
    """
    device, before = device_of(), os.getloadavg()[0]
    seconds: dict[str, list[float]] = {}
    values: dict[str, tuple[float, float]] = {}
    memory_mib: dict[str, float] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a variant may fail in any way
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            seconds.pop(name, None)

    def prepare(name: str) -> None:
        if seconds and Clock.is_over():
            raise UserError("no time was left for it")
        values.update({f"{name}: {key}": pair for key, pair in check(name).items()})
        if device.type == "cuda":
            memory_mib[name] = peak_beyond(variants[name])
        else:
            variants[name]()
            memory_mib.update({name: memory(name)} if memory else {})
        seconds[name] = []

    def measure(name: str) -> None:
        seconds[name].append(seconds_of(variants[name], device, sizes.calls))

    for name in variants:
        if not sizes.only or name in sizes.only:
            attempt(name, partial(prepare, name))
    for repetition in range(sizes.repetitions):
        if repetition and Clock.is_over():
            break
        names = list(seconds)
        start = repetition % max(1, len(names))
        for name in names[start:] + names[:start]:
            attempt(name, partial(measure, name))
        said = ", ".join(f"{name} {taken[-1]:.4g} s" for name, taken in seconds.items())
        say(f"{what}, repetition {repetition + 1}: {said}")
    place = describe(0.0)
    return Comparison(
        what=what,
        sizes=asdict(sizes),
        seconds={name: tuple(taken) for name, taken in seconds.items()},
        check={name: pair[0] for name, pair in values.items()},
        limits={name: pair[1] for name, pair in values.items()},
        floor=floor(),
        memory_mib=memory_mib,
        how={name: words for name in seconds if (words := how(name))},
        failed=failed,
        clock="seconds between CUDA events" if device.type == "cuda" else "processor seconds",
        machine=f"{place.machine.gpu or place.machine.cpu}, {torch.get_num_threads()} of {place.machine.cores} threads, "
        f"{place.machine.system}",
        load=(round(before, 2), round(os.getloadavg()[0], 2)),
        versions={**place.versions, **versions},
        commit=place.commit,
        dirty=place.dirty,
    )


@contextmanager
def settled(sizes: Sizes) -> Iterator[None]:
    """Check the sizes, then set the threads and the seed that they stand for; both are restored afterwards.

    Raises:
        ConfigError: a size that is not positive.
    """
    if bad := [name for name, value in asdict(sizes).items() if type(value) in (int, float) and value <= 0]:
        raise ConfigError(f"cannot measure {sizes}", f"{', '.join(bad)} must be positive")
    before = torch.get_num_threads()
    torch.set_num_threads(sizes.threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(before)


def device_of() -> torch.device:
    """The GPU if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, averaged over some calls in a row."""

    def run() -> float:
        return math.fsum(found if isinstance(found := work(), Seconds) else 0.0 for _ in range(calls))

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        own = run()
        end.record()
        end.synchronize()
        total = float(start.elapsed_time(end)) / 1e3
    else:
        began = time.process_time()
        own = run()
        total = time.process_time() - began
    return (own or total) / calls


def spread(values: Sequence[float], form: str) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# --- rates of the hardware ------------------------------------------------------------------------------------------------


@contextmanager
def tf32() -> Iterator[None]:
    """Within the block float32 matrix products may use TF32; torch's default allows it for convolutions alone."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def multiply_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of large matrix products, median of five."""
    rows, inner, columns = (8192,) * 3 if device.type == "cuda" else (512, 512, 1024)
    left, right = (torch.rand(count, inner, device=device).to(dtype) for count in (rows, columns))
    return _rate(lambda: products.times(left, right), 2 * rows * inner * columns, device)


def convolve_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a ResNet's 3x3 convolution with 128 channels at 28 px, median of five."""
    batch = 256 if device.type == "cuda" else 16
    images = torch.rand(batch, 128, 28, 28, device=device).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.rand(128, 128, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        return _rate(lambda: functional.conv2d(images, weight, padding=1), 2 * 9 * 128 * images.numel(), device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of copying 256 MiB; median of five."""
    one = torch.rand(2**26, device=device)
    other = torch.empty_like(one)
    return _rate(lambda: other.copy_(one), 2 * one.nbytes, device)


def _rate(work: Callable[[], object], amount: int, device: torch.device) -> float:
    """Amount per second, of so many calls at a time that starting them does not count."""
    calls = max(1, int((1e12 if device.type == "cuda" else 1e9) / amount))
    work()
    return amount / statistics.median(seconds_of(work, device, calls) for _ in range(5))


# --- memory ---------------------------------------------------------------------------------------------------------------


def peak_in_process(module: str, *arguments: str) -> float:
    """MiB that `module.peak(*arguments)` returns in a fresh Python process, whose earlier peaks do not count."""
    call = f"import sys; from {module} import peak; print('peak', peak(*sys.argv[1:]))"
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]), **_MALLOC}
    words = [sys.executable, "-c", call, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise UserError(f"peak memory could not be measured: {last[:300]}", "choose smaller sizes")
    return float(done.stdout.rsplit("peak", 1)[1])


def peak_beyond(work: Callable[[], object]) -> float:
    """MiB that a call needs at its peak beyond what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    held_kib = _kib("VmRSS")
    work()
    return (_kib("VmHWM") - held_kib) / 2**10


def _kib(name: str) -> int:
    """A line of Linux's account of this process; a child's `ru_maxrss` would begin with its parent's."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ConfigError("peak memory is read from /proc, which this system does not have")
    return int(next(line for line in status.read_text("utf-8").splitlines() if line.startswith(name)).split()[1])
