"""The measurements of `benchmarks.gpu_day`, one function for each step; each says what it finds as it finds it.

Times are those between two CUDA events around a block of calls (on a CPU by the clock), of arms in turns within one process, in
a rotating order; medians over the turns. Inputs are random. Beside each ratio stands a check of what was computed.
With `rehearse` sizes are toys, so that a CPU runs every line that needs no CUDA device.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from isd_repro import methods
from isd_repro.config.params import BackboneConfig, Blur, Cosine, Efficiency, Jitter, Numerics, Optim, View
from isd_repro.data import augment
from isd_repro.data.loader import generator_of
from isd_repro.evaluations import knn as search
from isd_repro.interfaces import Batch, Setting
from isd_repro.methods.isd import attended_isd_loss
from isd_repro.methods.moco import attended_moco_loss
from isd_repro.nn import backbones, bank_attention, bank_triton, engine
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.train import checkpoint, loop
from isd_repro.train.checkpoint import Progress

STRONG = View(
    jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    grayscale=0.2,
    blur=Blur(sigma_min=0.1, sigma_max=2.0, p=0.5),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REFERENCE, FAST = Numerics(), Numerics(engine="fast")
HALF_REFERENCE, HALF = Numerics(precision="bf16"), Numerics(engine="fast", precision="bf16")
OPTIONS: dict[str, dict[str, Any]] = {
    "isd": {"tau_student": 0.02, "tau_teacher": 0.02, "momentum": 0.999},
    "moco": {"tau": 0.2, "momentum": 0.999},
    "byol": {"momentum": 0.99},
    "supervised": {},
}


@dataclass(frozen=True)
class Bench:
    """What a step is given.

    Attributes:
        say: takes a line of results: a name, and values by key.
        out: a folder for files.
        seconds: how long the step may take; what does not matter most is left out near its end.
        rehearse: toy sizes.
    """

    device: torch.device
    say: Callable[..., None]
    out: Path
    seconds: float
    began: float
    rehearse: bool

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def size(self, real: int, toy: int) -> int:
        """One of the two."""
        return toy if self.rehearse else real

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Its result; None where it fails, which is said and stops nothing."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - one arm that fails must not lose the others
            traceback.print_exc()
            self.say(name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return None


# --- the clock --------------------------------------------------------------------------------------------------------------


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, times: int = 1) -> tuple[float, float]:
    """Milliseconds of one call in a block of `times`: of the device, and until the host had asked for everything."""
    sync(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun = time.perf_counter()
        start.record()
        for _ in range(times):
            work()
        end.record()
        asked = time.perf_counter() - begun
        end.synchronize()
        return float(start.elapsed_time(end)) / times, 1e3 * asked / times
    begun = time.perf_counter()
    for _ in range(times):
        work()
    taken = 1e3 * (time.perf_counter() - begun) / times
    return taken, taken


def in_turns(
    bench: Bench, arms: Mapping[str, Callable[[], object]], *, turns: int, times: int = 1, reserve: float = 5.0
) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each arm over turns in a rotating order; fewer turns where `reserve` seconds are all that is left.

    An arm that fails when it is warmed up is left out.
    """
    alive = [arm for arm, work in arms.items() if bench.attempt(arm, lambda work=work: (work(), sync(bench.device)))]
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in alive}
    for turn in range(turns):
        if turn and bench.left < reserve:
            break
        for arm in [alive[(turn + at) % len(alive)] for at in range(len(alive))]:
            if (value := bench.attempt(arm, lambda arm=arm: timed(arms[arm], bench.device, times))) is None:
                alive.remove(arm)
            else:
                found[arm].append(value)
    return {
        arm: {
            "ms": statistics.median(value[0] for value in values),
            "ms_low": min(value[0] for value in values),
            "ms_high": max(value[0] for value in values),
            "host_ms": statistics.median(value[1] for value in values),
            "n": len(values),
            "calls": times,
        }
        for arm, values in found.items()
        if values
    }


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory that a call needs beyond what is held before it."""
    if device.type != "cuda":
        return None
    sync(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    work()
    sync(device)
    return float(torch.cuda.max_memory_allocated(device) - held) / 2**20


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether float32 matrix products may be TF32 inside; torch's default is no, and yes for convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- environment and ceilings -----------------------------------------------------------------------------------------------


def env(bench: Bench) -> None:
    """What is there, and the rates that every share of a roofline refers to."""
    for command in (
        ["nvidia-smi"],
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv"],
    ):
        if shutil.which(command[0]):
            print(subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout)
    packages = ("torch", "torchvision", "triton", "numpy", "pydantic", "pytest", "kornia", "lightly", "torchcodec", "PIL")
    versions = {name: getattr(module_of(name), "__version__", None) for name in packages}
    bench.say("versions", python=platform.python_version(), cores=os.cpu_count(), **versions)
    device = bench.device
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        bench.say(
            "device",
            name=card.name,
            capability=list(torch.cuda.get_device_capability(device)),
            multiprocessors=card.multi_processor_count,
            memory_gib=card.total_memory / 2**30,
            l2_mib=getattr(card, "L2_cache_size", 0) / 2**20,
            shared_optin_kib=getattr(card, "shared_memory_per_block_optin", 0) / 1024,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            gcc=shutil.which("gcc"),
        )
    bench.say("ceilings", **ceilings(bench))


def module_of(name: str) -> Any | None:
    """A package, None where it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(name)
    except Exception:  # noqa: BLE001 - a broken package counts as none
        return None


def ceilings(bench: Bench) -> dict[str, float]:
    """Bytes/s of a copy and FLOP/s of large products on random data, measured."""
    device, side = bench.device, bench.size(8192, 256)
    one = torch.rand(bench.size(2**30, 2**20), device=device)
    other = torch.empty_like(one)
    found = {"copy_tb_s": 2 * one.numel() * 4 / (1e9 * best(lambda: other.copy_(one), device))}
    del one, other
    for name, dtype, allowed in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        with tf32(allowed):
            found[f"{name}_tflop_s"] = 2 * side**3 / (1e9 * best(lambda a=left, b=right: a @ b, device))
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        batch = bench.size(256, 2)
        images = torch.randn(batch, 128, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        flop = 2 * 9 * 128 * images.numel()
        found[f"conv_{name}_tflop_s"] = flop / (1e9 * best(lambda x=images, w=weight: F.conv2d(x, w, padding=1), device))
    return found


def best(work: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a call over seven blocks of three."""
    work()
    return statistics.median(timed(work, device, 3)[0] for _ in range(7))


# --- smoke --------------------------------------------------------------------------------------------------------------------


def smoke(bench: Bench) -> None:
    """A few steps of every method by every engine and precision: finite losses that fall, and what kernel was chosen."""
    side, batch, bank = bench.size(64, 16), bench.size(64, 8), bench.size(8192, 64)
    for name in methods.names():
        first = {}
        for numerics in (REFERENCE, HALF_REFERENCE, FAST, HALF):
            words = f"{name}, {numerics.engine}, {numerics.precision}"

            def run(name: str = name, numerics: Numerics = numerics, words: str = words) -> None:
                method = method_of(bench, name, numerics, side=side, batch=batch, bank=bank, stem="small", classes=10)
                optimizer = loop.optimizer_of(method, optim_of(batch), numerics)
                views = [torch.randn(batch, 3, side, side, device=bench.device) for _ in range(2)]
                rows = torch.arange(batch, device=bench.device)
                given = Batch(views[0], views[1], rows, rows % 10, rows.flip(0))
                losses = [float(step_of(method, optimizer, given, numerics)) for _ in range(8)]
                first[words] = losses[0]
                fine = all(map(math.isfinite, losses))
                bench.say(words, ok=fine, first=losses[0], last=losses[-1], kernels=engine.kernels_of(method, numerics))

            torch.manual_seed(1)
            bench.attempt(words, run)
        want = first.get(f"{name}, reference, float32")
        if want:
            bench.say(
                f"{name}: first loss over the reference's, less 1", **{key: abs(value / want - 1) for key, value in first.items()}
            )


def optim_of(batch: int) -> Optim:
    """As the recipe, for one epoch."""
    return Optim(epochs=1, batch_size=batch, lr=0.01, schedule=Cosine(name="cosine"))


def method_of(
    bench: Bench,
    name: str,
    numerics: Numerics,
    *,
    side: int,
    batch: int,
    bank: int,
    arch: str = "resnet18",
    stem: str = "imagenet",
    layout: torch.memory_format = torch.channels_last,
    classes: int = 1,
    groups: int = 1,
    heads: str = "",
) -> Any:
    """A method as `pretrain` builds it, on random weights that depend on nothing but its sizes."""
    module = methods.load(name)
    options = dict(OPTIONS.get(name, {}))
    if "bank_size" in module.Config.model_fields:
        options["bank_size"] = bank
    if heads and name == "isd":
        options["heads"] = heads
    shape = (
        BackboneConfig(arch="resnet-narrow", width=4)
        if bench.rehearse
        else BackboneConfig.model_validate({"arch": arch, "stem": stem})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        setting = Setting(classes, batch, **engine.setting_of(numerics))
        method = module.Method(module.Config.model_validate(options), lambda: backbones.build(shape, side), setting)
    set_bn_groups(method, groups)
    return method.to(device=bench.device, memory_format=layout).train()


def step_of(method: Any, optimizer: Any, batch: Batch, numerics: Numerics) -> Tensor:
    """One step without the loop; its loss, still on the device."""
    bf16 = numerics.precision == "bf16"
    with torch.autocast(batch.view_student.device.type, dtype=torch.bfloat16, enabled=bf16):
        out = method(batch)
    optimizer.zero_grad(set_to_none=True)
    out.loss.backward()
    optimizer.step()
    return out.loss.detach()


# --- tests --------------------------------------------------------------------------------------------------------------------

TESTS = (
    "tests/conformance/test_cuda.py",
    "tests/parity/test_bank_attention.py",
    "tests/parity/test_bank_triton.py",
    "tests/data/test_loader.py",
    "tests/data/test_decoder.py",
    "tests/conformance/test_engine.py",
)


def tests(bench: Bench) -> None:
    """The tests that a CUDA device alone can run; each file apart, the compilers' last."""
    root = Path(__file__).parents[1]
    found = importlib.util.find_spec("tests")
    if found is not None and found.origin is not None and not Path(found.origin).is_relative_to(root):
        (root / "tests" / "__init__.py").touch()  # another package of this name would take its place
    mark = "not gpu and not slow" if bench.rehearse else "gpu"
    files = TESTS[:1] if bench.rehearse else TESTS
    spread = ["-p", "xdist.plugin", "-n", str(bench.size(6, 2))] if module_of("xdist") else []
    options = [
        "-m",
        mark,
        "-q",
        "-ra",
        "--durations=15",
        "--tb=short",
        "-W",
        "default",
        "-o",
        "minversion=8",
        "-p",
        "no:cacheprovider",
    ]
    # other packages' plugins of pytest, of which a machine may have any number, stay out
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    log = bench.out / "tests.txt"
    command = [sys.executable, "-m", "pytest", *options, *spread, *files]
    with log.open("w") as stream:
        stream.write(f"{' '.join(command)}\n")
        stream.flush()
        done = subprocess.run(command, cwd=root, stdout=stream, stderr=subprocess.STDOUT, check=False, env=environment)
    lines = log.read_text("utf-8", "replace").splitlines()
    bad = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    bench.say("pytest", code=done.returncode, last=lines[-1][:200] if lines else "", bad=bad)


# --- the bank's loss ----------------------------------------------------------------------------------------------------------


def plain_isd_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
    """The published form: a copy of the bank, two B x K matrices of logits."""
    anchors_KD = bank_KD.clone().detach()
    near_student, near_teacher = student_BD @ anchors_KD.T, teacher_BD @ anchors_KD.T
    near_student /= tau_student
    near_teacher /= tau_teacher
    return F.kl_div(F.log_softmax(near_student, dim=1), F.softmax(near_teacher, dim=1), reduction="batchmean")


def plain_moco_loss(student_BD: Tensor, teacher_BD: Tensor, bank_KD: Tensor, tau: float) -> Tensor:
    """The published form: a copy of the bank, B x (1 + K) logits."""
    anchors_KD = bank_KD.clone().detach()
    positive = torch.einsum("bd,bd->b", student_BD, teacher_BD)[:, None]
    logits = torch.cat([positive, student_BD @ anchors_KD.T], dim=1)
    logits /= tau
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def moco_arms(student: Tensor, teacher: Tensor, bank: Tensor, tau: float) -> dict[str, Callable[[], Tensor]]:
    """MoCo's loss and gradient, plain, ours, and lightly's with its own bank, into which it pushes at each call."""

    def work(function: Callable[..., Tensor], *rest: Any) -> Tensor:
        point = student.clone().requires_grad_()
        function(point, teacher, *rest).backward()
        assert point.grad is not None
        return point.grad

    half = bank.half()
    arms = {
        "plain": lambda: work(plain_moco_loss, bank, tau),
        "attention, float32 bank": lambda: work(attended_moco_loss, bank, tau),
        "attention, float16 bank": lambda: work(attended_moco_loss, half, tau),
    }
    lightly = module_of("lightly.loss")
    if lightly is not None:
        theirs = lightly.NTXentLoss(tau, memory_bank_size=tuple(bank.shape)).to(bank.device)
        theirs.memory_bank.bank.copy_(bank)
        arms["lightly"] = lambda: work(theirs)
    return arms


def exact_moco_gradient(student: Tensor, teacher: Tensor, bank: Tensor, tau: float, batch: int) -> Tensor:
    """((p_0 - 1) k + p X) / (B tau) in float64."""
    rows, asked, taught = bank.double(), student.double(), teacher.double()
    near = torch.cat([(asked * taught).sum(1, keepdim=True), asked @ rows.T], dim=1) / tau
    p = torch.softmax(near, dim=1)
    return ((p[:, :1] - 1) * taught + p[:, 1:] @ rows) / (batch * tau)


def loss(bench: Bench) -> None:
    """Loss and gradient of 256 images on a bank of 128,000 rows: the plain formula and ours, for each D."""
    device, batch, rows, tau = bench.device, bench.size(256, 8), bench.size(128_000, 512), 0.02
    for features in (128, 512):
        draws = torch.Generator(device).manual_seed(0)
        student, teacher, bank = (
            F.normalize(torch.randn(count, features, device=device, generator=draws)) for count in (batch, batch, rows)
        )
        half, checked = bank.half(), min(16, batch)
        want = exact_gradient(student[:checked], teacher[:checked], bank, tau, batch)

        def work(function: Callable[..., Tensor], given: Tensor, student: Tensor = student, teacher: Tensor = teacher) -> Tensor:
            point = student.clone().requires_grad_()
            function(point, teacher, given, tau, tau).backward()
            assert point.grad is not None
            return point.grad

        def plain_tf32(work: Callable[..., Tensor] = work, bank: Tensor = bank) -> Tensor:
            with tf32(True):
                return work(plain_isd_loss, bank)

        def chunked(work: Callable[..., Tensor] = work, half: Tensor = half) -> Tensor:
            with replaced(bank_attention, "kernel_of", lambda rows: "chunked"):
                return work(attended_isd_loss, half)

        arms: dict[str, Callable[[], Tensor]] = {
            "plain": lambda work=work, bank=bank: work(plain_isd_loss, bank),
            "plain, TF32": plain_tf32,
            "attention, float32 bank": lambda work=work, bank=bank: work(attended_isd_loss, bank),
            "attention, float16 bank": lambda work=work, half=half: work(attended_isd_loss, half),
            "chunked, float16 bank": chunked,
        }
        why = bank_attention.why_not_triton(half)
        bench.say(
            f"D {features}: kernel",
            float16=bank_attention.kernel_of(half),
            float32=bank_attention.kernel_of(bank),
            why_not_triton=why,
        )
        report(bench, f"D {features}", arms, want, checked, 8.0 * batch * rows * features)
        if features == 128:
            made = bench.attempt("MoCo", lambda given=(student, teacher, bank): moco_arms(*given, 0.2))
            want = exact_moco_gradient(student[:checked], teacher[:checked], bank, 0.2, batch)
            report(bench, f"MoCo, D {features}", made or {}, want, checked, 4.0 * batch * rows * features)


def report(bench: Bench, what: str, arms: dict[str, Callable[[], Tensor]], want: Tensor, checked: int, flop: float) -> None:
    """Times, errors and memory of arms that give a gradient; the first is the baseline."""
    errors = {arm: bench.attempt(f"{what}: {arm}", lambda work=work: far(work()[:checked], want)) for arm, work in arms.items()}
    peaks = {arm: bench.attempt(f"{what}: {arm}", lambda work=work: peak_mib(work, bench.device)) for arm, work in arms.items()}
    found = in_turns(bench, arms, turns=bench.size(11, 2), times=bench.size(5, 1), reserve=3.0)
    base = found.get("plain", {}).get("ms")
    for arm, values in found.items():
        faster = base / values["ms"] if base else None
        rate = flop / (1e9 * values["ms"])
        bench.say(f"{what}: {arm}", **values, faster=faster, gradient_error=errors[arm], peak_mib=peaks[arm], tflop_s=rate)


@contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value inside."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def far(found: Tensor, want: Tensor) -> float:
    """|found - want| / |want|."""
    return float((found.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


def exact_gradient(student: Tensor, teacher: Tensor, bank: Tensor, tau: float, batch: int) -> Tensor:
    """(p_s - p_t) X / (B tau) in float64."""
    rows = bank.double()
    p_s, p_t = (torch.softmax(asked.double() @ rows.T / tau, dim=1) for asked in (student, teacher))
    return (p_s - p_t) @ rows / (batch * tau)


def tune(bench: Bench) -> None:
    """The Triton kernel with other block sizes than the rule's, at D 512 and 128: a lead for the rule, which no timing decides."""
    if bench.device.type != "cuda":
        return
    batch, rows = 2 * 256, 128_000
    for features in (512, 128):
        draws = torch.Generator(bench.device).manual_seed(0)
        query = F.normalize(torch.randn(batch, features, device=bench.device, generator=draws)) / 0.02
        bank = F.normalize(torch.randn(rows, features, device=bench.device, generator=draws)).half()
        want = bank_attention.chunked(query, bank)
        tried = [
            (64, 32, 8, 3, 528),
            (64, 32, 8, 2, 528),
            (64, 32, 8, 3, 132),
            (64, 64, 8, 2, 528),
            (64, 64, 8, 2, 132),
            (64, 32, 4, 3, 528),
            (128, 32, 8, 2, 132),
            (128, 64, 8, 2, 132),
        ]
        if features == 128:
            tried = [(64, 64, 8, 3, 528), (64, 64, 4, 3, 528), (128, 64, 8, 3, 264), (128, 128, 8, 3, 132)]
        for block, tile, warps, stages, programs in tried:
            if bench.left < 6:
                return
            words = f"D {features}: block {block}, tile {tile}, warps {warps}, stages {stages}, programs {programs}"

            def run(
                block: int = block,
                tile: int = tile,
                warps: int = warps,
                stages: int = stages,
                programs: int = programs,
                words: str = words,
                query: Tensor = query,
                bank: Tensor = bank,
                want: Any = want,
            ) -> None:
                with (
                    replaced(bank_triton, "BLOCK", block),
                    replaced(bank_triton, "tile_of", lambda features: tile),
                    replaced(bank_triton, "_PROGRAMS", programs),
                    replaced(bank_triton, "OPTIONS", {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}),
                ):
                    found = bank_attention.by_triton(query, bank)
                    times = [timed(lambda: bank_attention.by_triton(query, bank), bench.device, 5)[0] for _ in range(5)]
                rate = 4.0 * batch * rows * bank.shape[1] / (1e9 * statistics.median(times))
                bench.say(
                    words,
                    ms=statistics.median(times),
                    tflop_s=rate,
                    mean_error=far(found[1], want[1]),
                    lse_error=far(found[0], want[0]),
                )

            bench.attempt(words, run)


# --- views --------------------------------------------------------------------------------------------------------------------


def pictures(bench: Bench, count: int, side: int) -> Tensor:
    """Smooth random colours with noise, uint8 on the device."""
    parts = []
    for start in range(0, count, 256):
        draws = torch.Generator(bench.device).manual_seed(start)
        many = min(256, count - start)
        smooth = F.interpolate(torch.rand(many, 3, 6, 6, device=bench.device, generator=draws), (side, side), mode="bicubic")
        noise = 0.05 * torch.randn(many, 3, side, side, device=bench.device, generator=draws)
        parts.append((255 * (smooth + noise)).clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def views(bench: Bench) -> None:
    """512 strong views at 224 px of images at 256 px: ours eager and compiled, with and without TF32, and kornia's."""
    count, side, large = bench.size(512, 6), bench.size(224, 16), bench.size(256, 20)
    pixels, sizes = pictures(bench, count, large), torch.full((count, 2), large)
    turn = [0]

    def ours(changes: tuple[augment.Change, ...] = augment.CHANGES) -> Tensor:
        turn[0] += 1
        drawn = augment.draw(sizes, STRONG, generator_of(0, "bench", turn[0]))
        return augment.normalise(augment.apply(pixels, drawn, STRONG, side, changes), MEAN, STD)

    def in_tf32(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            with tf32(True):
                return make()

        return work

    draws_only = augment.draw(sizes, STRONG, generator_of(0, "bench", 0))
    arms: dict[str, Callable[[], Any]] = {
        "ours, eager": ours,
        "ours, eager, TF32": in_tf32(ours),
        "draws alone": lambda: augment.draw(sizes, STRONG, generator_of(0, "bench", 0)),
        "crop alone": lambda: augment.resample(pixels, draws_only.crop, side),
    }
    if changes := compiled_changes(bench):
        arms["ours, compiled colours"] = lambda: ours(changes)
        arms["ours, compiled colours, TF32"] = in_tf32(lambda: ours(changes))
    kornia = bench.attempt("kornia", lambda: kornia_views(side))
    if kornia is not None:
        arms["kornia"] = lambda: kornia(pixels)
    few = slice(0, bench.size(64, 4))
    drawn = draws_only.at(torch.arange(len(sizes[few])))
    want = augment.apply(pixels[few].cpu(), drawn, STRONG, side)
    for allowed in (False, True):
        with tf32(allowed):
            for name, given in (("eager", augment.CHANGES), ("compiled", changes)):
                if given:
                    gap = (augment.apply(pixels[few], drawn, STRONG, side, given).cpu() - want).abs()
                    bench.say(
                        f"views: {name}, TF32 {allowed}: from the CPU's, in 0..1", most=float(gap.max()), mean=float(gap.mean())
                    )
    found = in_turns(bench, arms, turns=bench.size(9, 2), times=bench.size(4, 1))
    base = found.get("kornia", {}).get("ms")
    for arm, values in found.items():
        bench.say(f"{count} views: {arm}", **values, faster_than_kornia=base / values["ms"] if base else None)
    bench.attempt("syncs", lambda: say_syncs(bench, "views, eager", ours))
    bench.attempt("profile", lambda: profiled(bench, "views", arms.get("ours, compiled colours", ours)))


def compiled_changes(bench: Bench) -> tuple[augment.Change, ...]:
    """The colours as engine `fast` compiles them; none on a CPU."""
    return engine.changes_of(augment.CHANGES, bench.device, FAST) if bench.device.type == "cuda" else ()


def kornia_views(side: int) -> Callable[[Tensor], Tensor] | None:
    """kornia's operations of whole batches with the same odds and ranges; None without kornia."""
    kornia = module_of("kornia.augmentation")
    if kornia is None:
        return None
    assert STRONG.jitter is not None
    assert STRONG.blur is not None
    jitter, blur = STRONG.jitter, STRONG.blur
    taps = 2 * augment.radius_of(blur.sigma_max, side) + 1
    made = nn.Sequential(
        kornia.RandomResizedCrop((side, side), scale=(STRONG.crop_min, STRONG.crop_max), cropping_mode="resample"),
        kornia.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, p=jitter.p),
        kornia.RandomGrayscale(p=STRONG.grayscale),
        kornia.RandomGaussianBlur((taps, taps), (blur.sigma_min, blur.sigma_max), p=blur.p),
        kornia.RandomHorizontalFlip(p=STRONG.flip),
        kornia.Normalize(MEAN, STD),
    )
    return lambda pixels: made(pixels.float() / 255)


# --- training steps -----------------------------------------------------------------------------------------------------------


class Resident:
    """Batches of images that lie on the device as bytes; two strong views of each are made when a batch is asked for."""

    def __init__(
        self, pixels: Tensor, side: int, batch: int, changes: tuple[augment.Change, ...] = augment.CHANGES, steps: int = 1
    ) -> None:
        self.pixels, self.side, self.batch, self.changes, self.steps_per_epoch = pixels, side, batch, changes, steps
        self.sizes = torch.full((batch, 2), pixels.shape[-1])
        self.turn = 0

    def at(self, _step: int) -> Batch:
        """Other images and other draws at each call."""
        self.turn += 1
        draws, device = generator_of(0, "resident", self.turn), self.pixels.device
        index = torch.randint(len(self.pixels), (self.batch,), generator=draws)
        drawn = [augment.draw(self.sizes, STRONG, draws) for _ in range(2)]
        shuffle = torch.randperm(self.batch, generator=draws)
        index, shuffle = augment.to_device(index, device), augment.to_device(shuffle, device)
        pixels = self.pixels[index]
        made = [augment.normalise(augment.apply(pixels, each, STRONG, self.side, self.changes), MEAN, STD) for each in drawn]
        return Batch(made[0], made[1], index, torch.zeros_like(index), shuffle)


class Given:
    """The same batch at every step."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps_per_epoch = batch, steps

    def at(self, _step: int) -> Batch:
        """It."""
        return self.batch


class Arm:
    """One way of making steps: a method with its optimizer, and what drives them."""

    compilers = 0

    def __init__(
        self,
        bench: Bench,
        name: str,
        numerics: Numerics,
        *,
        compiled: bool = False,
        graph: bool = False,
        views: Callable[[], Tensor] | None = None,
        **shape: Any,
    ) -> None:
        self.bench, self.numerics, self.graph = bench, numerics, graph
        self.batch = shape["batch"]
        self.method = method_of(bench, name, numerics, **shape)
        self.optimizer = loop.optimizer_of(self.method, optim_of(self.batch), numerics)
        self.words = engine.kernels_of(self.method, numerics)
        if compiled and views is not None:
            first, Arm.compilers = Arm.compilers == 0, Arm.compilers + 1
            keep = nullcontext() if first else replaced(torch.compiler, "reset", lambda: None)
            with keep:  # what earlier arms compiled stays
                self.words += engine.compile_(dict(self.method.encoders), views, bench.device, numerics)
        self.hooks = loop.Hooks(
            save=lambda now: None, epoch=lambda row: None, tick=lambda step, loss: None, stopped=lambda: False
        )
        self._graph: Any = None

    def run(self, source: Any, steps: int) -> float | None:
        """So many steps through the training loop, or as replays of one captured step; the mean loss, where the loop has it."""
        source.steps_per_epoch = steps
        if self.graph:
            self._replay(source, steps)
            return None
        progress = Progress()
        loop.train(
            self.method,
            self.optimizer,
            source,
            optim_of(self.batch),
            self.numerics,
            Efficiency(log_every=50),
            progress,
            self.hooks,
        )
        return progress.curve[0]["loss"]

    def losses(self, batch: Batch, steps: int) -> list[float]:
        """Of each of some steps on one batch."""
        if not self.graph:
            return [float(self._step(batch)) for _ in range(steps)]
        found = []
        for _ in range(steps):
            self._replay(Given(batch, 1), 1)
            found.append(float(self._loss))
        return found

    def _replay(self, source: Any, steps: int) -> None:
        for step in range(steps):
            batch = source.at(step)
            if self._graph is None:
                self._capture(batch)
            for name in ("view_student", "view_teacher", "index", "label", "shuffle"):
                getattr(self._static, name).copy_(getattr(batch, name))
            if self._graph is False:  # a rehearsal: the same step without a graph
                self._loss = self._step(self._static)
            else:
                self._graph.replay()

    def _capture(self, batch: Batch) -> None:
        """One whole step into a CUDA graph, everything but the views; three steps are made on the way."""
        self._static = Batch(
            *(getattr(batch, name).clone() for name in ("view_student", "view_teacher", "index", "label", "shuffle"))
        )
        if hasattr(self.method, "bank"):
            push_by_device(self.method.bank, self.batch)
        if self.bench.device.type != "cuda":
            for _ in range(3):
                self._step(self._static)
            self._graph = False
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step(self._static)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._step(self._static)
        self._graph = graph

    def _step(self, batch: Batch) -> Tensor:
        """One step; where one kernel for all weights does not take them, by an SGD that does."""
        try:
            return step_of(self.method, self.optimizer, batch, self.numerics)
        except RuntimeError as error:
            if "same dtype, device" not in str(error):
                raise
            self.words += f", no fused SGD ({error})"[:200]
            weights = [weight for weight in self.method.parameters() if weight.requires_grad]
            self.optimizer = SGD(weights, lr=0.01, momentum=0.9, weight_decay=1e-4)
            return step_of(self.method, self.optimizer, batch, self.numerics)


def push_by_device(bank: Any, batch: int) -> None:
    """The bank's oldest rows are found by a pointer on the device, as a captured step needs it."""
    place = torch.arange(batch, device=bank.rows.device) + bank.pointer

    @torch.no_grad()
    def push(embedding_BD: Tensor) -> None:
        bank.rows.index_copy_(0, place, embedding_BD.to(bank.rows.dtype))
        place.add_(batch).remainder_(len(bank.rows))

    bank.push = push


def flop_of(bench: Bench, **shape: Any) -> tuple[float, float]:
    """Of one step, both views: FLOP without the bank's loss, and elements that convolutions write in one pass of one view."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = {**shape, "bank": shape["batch"]}
    method = method_of(replace(bench, device=torch.device("cpu")), "isd", REFERENCE, **shape)
    written = [0]
    hooks = [
        part.register_forward_hook(lambda module, given, out: written.__setitem__(0, written[0] + out.numel()))
        for part in method.student.modules()
        if isinstance(part, nn.Conv2d)
    ]
    images = torch.rand(2, 3, shape["side"], shape["side"])
    with FlopCounterMode(display=False) as counter:
        embedding = method.predictor(method.student(images))
        embedding.sum().backward()
        with torch.no_grad():
            method.teacher(images)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops() / 2 * shape["batch"], written[0] / 2 * shape["batch"]


# Passes over each convolution's output that no engine of one operator at a time can save: the student's forward writes it, reads
# it for its statistics, reads it and writes what follows, which the next reads (5); back, the same in reverse and twice where the
# gradients of weights and inputs both read (8); the teacher's forward (5).
_PASSES = 18


def ladder(bench: Bench) -> None:
    """An ISD step of ResNet-18 at 224 px from bytes on the device, each rung with one thing more than the one before."""
    steps_report(
        bench,
        "ISD ResNet-18",
        arch="resnet18",
        side=bench.size(224, 16),
        batch=bench.size(256, 8),
        bank=bench.size(128_000, 64),
        full=True,
    )


def resnet50(bench: Bench) -> None:
    """The same of ResNet-50."""
    steps_report(
        bench,
        "ISD ResNet-50",
        arch="resnet50",
        heads="mlp",
        side=bench.size(224, 16),
        batch=bench.size(256, 8),
        bank=bench.size(128_000, 64),
        full=False,
    )


def small(bench: Bench) -> None:
    """ISD and MoCo, ResNet-18 with the small stem at 64 px."""
    for name in ("isd", "moco"):
        steps_report(
            bench,
            f"{name} ResNet-18 at 64 px, small stem",
            name=name,
            stem="small",
            heads="mlp",
            side=bench.size(64, 16),
            batch=bench.size(256, 8),
            bank=bench.size(16_384, 64),
            full=False,
        )


def steps_report(bench: Bench, what: str, *, full: bool, name: str = "isd", **shape: Any) -> None:
    """Build the rungs, compare their losses, time them in turns, and say all that of each."""
    device, side, batch = bench.device, shape["side"], shape["batch"]
    large = 256 if side == 224 else side
    pixels = pictures(bench, bench.size(4096, 16), large)
    eager = Resident(pixels, side, batch)
    changes = compiled_changes(bench) or augment.CHANGES
    fused = Resident(pixels, side, batch, changes)
    fixed = eager.at(0)
    wide = {"layout": torch.contiguous_format}
    lists: dict[str, tuple[Numerics, dict[str, Any]]] = {
        "reference": (REFERENCE, wide),
        "+ bf16": (HALF_REFERENCE, wide),
        "+ channels_last": (HALF_REFERENCE, {}),
        "+ attention": (HALF, {}),
        "+ compiled": (HALF, {"compiled": True}),
        "+ CUDA graph": (HALF, {"compiled": True, "graph": True}),
    }
    if not full:
        lists = {key: value for key, value in lists.items() if key in {"reference", "+ attention", "+ compiled", "+ CUDA graph"}}
    else:
        lists["+ cuDNN benchmark"] = (HALF, {"compiled": True, "graph": True, "benchmark": True})
        lists["compiled, 2 BatchNorm groups"] = (HALF, {"compiled": True, "groups": 2})
    flop, written = flop_of(bench, **shape)
    arms: dict[str, Callable[[], object]] = {}
    made: dict[str, Arm] = {}
    found: dict[str, list[float]] = {}
    steps = bench.size(10, 2)
    if full and name == "isd":
        bench.attempt(f"{what}: plain", lambda: arms.update({"plain": plain_arm(bench, shape, eager, steps, found, fixed)}))
    for rung, (numerics, extra) in lists.items():
        if bench.left < 0.35 * bench.seconds and made:
            bench.say(f"{what}: {rung}", failed="left out for want of time")
            continue

        def build(rung: str = rung, numerics: Numerics = numerics, extra: dict[str, Any] = extra) -> None:
            begun = time.monotonic()
            options = dict(extra)
            chosen = options.pop("benchmark", False)
            with torch.backends.cudnn.flags(enabled=True, benchmark=chosen, deterministic=False, allow_tf32=True):
                arm = Arm(bench, name, numerics, views=lambda: fixed.view_student, **{**shape, **options})
                if arm.graph:  # captured under these flags; it makes three steps more than it is asked for
                    found[rung] = [math.nan] * 3 + arm.losses(fixed, 3)
                else:
                    found[rung] = arm.losses(fixed, 6)
            source = fused if options.get("compiled") else eager
            made[rung] = arm
            arms[rung] = lambda: arm.run(source, steps)
            arms[f"{rung}, views given"] = lambda: arm.run(Given(fixed, steps), steps)
            sync(device)
            bench.say(f"{what}: {rung}: built", seconds=time.monotonic() - begun, kernels=arm.words, losses=found[rung])

        bench.attempt(f"{what}: {rung}", build)
    arms["views alone, eager"] = lambda: [eager.at(0) for _ in range(steps)]
    if changes is not augment.CHANGES:
        arms["views alone, compiled colours"] = lambda: [fused.at(0) for _ in range(steps)]
    times = in_turns(bench, arms, turns=bench.size(5, 2), reserve=0.25 * bench.seconds)
    base = times.get("reference", {}).get("ms")
    want = found.get("reference", [])
    for arm, values in times.items():
        rung = arm.removesuffix(", views given")
        features = made[rung].method.bank.rows.shape[1] if rung in made and hasattr(made[rung].method, "bank") else 0
        ours = flop + 8.0 * batch * shape["bank"] * features
        each = values["ms"] / steps
        away = [abs(one / two - 1) for one, two in zip(found.get(rung, []), want, strict=False) if two and math.isfinite(one)]
        bench.say(
            f"{what}: {arm}",
            ms=each,
            ms_low=values["ms_low"] / steps,
            ms_high=values["ms_high"] / steps,
            host_ms=values["host_ms"] / steps,
            n=values["n"],
            steps=steps,
            images_per_second=1e3 * batch / each,
            faster=base / values["ms"] if base else None,
            tflop_s=ours / (1e9 * each) if rung in made else None,
            bytes_floor_tb_s=_PASSES * written * (4 if rung in {"reference", "plain"} else 2) / (1e9 * each)
            if rung in made
            else None,
            loss_apart_by_step=away,
        )
    for rung, arm in made.items():
        peak = bench.attempt("peak", lambda arm=arm: peak_mib(lambda: arm.run(Given(fixed, 1), 1), device))
        bench.say(f"{what}: {rung}: memory", peak_mib=peak)
    ends = [rung for rung in ("reference", "+ attention", "+ compiled", "+ CUDA graph") if rung in made]
    for rung in ends if full else ends[-1:]:
        source = fused if rung in {"+ compiled", "+ CUDA graph"} else eager
        work = lambda arm=made[rung], source=source: arm.run(source, 2)  # noqa: E731
        bench.attempt("syncs", lambda work=work, rung=rung: say_syncs(bench, f"{what}: {rung}, 2 steps", work))
        bench.attempt("profile", lambda work=work, rung=rung: profiled(bench, f"{what}: {rung}, 2 steps", work))


def plain_arm(
    bench: Bench, shape: Mapping[str, Any], source: Resident, steps: int, found: dict[str, list[float]], fixed: Batch
) -> Callable[[], object]:
    """The published recipe in its straightforward form: contiguous float32, B x K logits, the teacher tensor by tensor, loss.item()."""
    method = method_of(bench, "isd", REFERENCE, **{**shape, "layout": torch.contiguous_format})
    optimizer = SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step(batch: Batch) -> float:
        config, bank, shuffle = method.config, method.bank, batch.shuffle
        student = F.normalize(method.predictor(method.student(batch.view_student)), dim=1)
        with torch.no_grad():
            for ours, theirs in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
                ours.data = ours.data * config.momentum + theirs.data * (1.0 - config.momentum)
            teacher = F.normalize(method.teacher(batch.view_teacher[shuffle]), dim=1)[shuffle.argsort()]
        loss = plain_isd_loss(student, teacher, bank.rows, config.tau_student, config.tau_teacher)
        bank.push(teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    found["plain"] = [step(fixed) for _ in range(6)]
    return lambda: [step(source.at(0)) for _ in range(steps)]


def warm(bench: Bench) -> None:
    """Compile what the timed steps will want, so that they find it in the compiler's cache."""
    if bench.device.type != "cuda":
        return
    orders = [
        ("isd", {"arch": "resnet18", "side": 224, "batch": 256, "bank": 1024}),
        ("isd", {"arch": "resnet18", "stem": "small", "heads": "mlp", "side": 64, "batch": 256, "bank": 1024}),
        ("isd", {"arch": "resnet50", "heads": "mlp", "side": 224, "batch": 256, "bank": 1024}),
        ("isd", {"arch": "resnet18", "side": 224, "batch": 256, "bank": 1024, "groups": 2}),
    ]
    changes = compiled_changes(bench)
    images, strength = torch.rand(51, 3, 224, 224, device=bench.device), torch.full((51, 1, 1, 1), 0.2, device=bench.device)
    for at, change in enumerate(changes):
        bench.attempt(f"warm: colour {at}", lambda change=change: change(images, strength))
    for name, shape in orders:
        words = f"warm: {name}, {', '.join(map(str, shape.values()))}"
        begun = time.monotonic()

        def run(name: str = name, shape: dict[str, Any] = shape) -> str:
            views = torch.rand(shape["batch"], 3, shape["side"], shape["side"], device=bench.device)
            return Arm(bench, name, HALF, compiled=True, views=lambda: views, **shape).words

        told = bench.attempt(words, run)
        bench.say(words, seconds=time.monotonic() - begun, compiled=told)


# --- what the host waits for, and where the time goes ---------------------------------------------------------------------------


def say_syncs(bench: Bench, what: str, work: Callable[[], object]) -> None:
    """Operations at which the host waited for the device, as torch's debug mode sees them, by the line that asked."""
    if bench.device.type != "cuda":
        return
    work()
    sync(bench.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    where: dict[str, int] = {}
    for each in caught:
        if "synchroniz" in str(each.message):
            place = f"{Path(each.filename).name}:{each.lineno}"
            where[place] = where.get(place, 0) + 1
    bench.say(f"{what}: waits", waits=sum(where.values()), where=where)


def profiled(bench: Bench, what: str, work: Callable[[], object]) -> None:
    """The 30 kernels that take most, to profile.txt, and a trace."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bench.device.type == "cuda"
    work()
    sync(bench.device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        work()
        sync(bench.device)
    rows = found.key_averages()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    with (bench.out / "profile.txt").open("a", encoding="utf-8") as stream:
        stream.write(f"=== {what}\n{rows.table(sort_by=order, row_limit=30, max_name_column_width=70)}\n\n")
    calls = {row.key: row.count for row in rows if row.key.startswith(("cuda", "cuLaunch", "Memcpy"))}
    kernels = [row for row in rows if str(getattr(row, "device_type", "")).endswith("CUDA")]
    busy = sum(row.self_device_time_total for row in kernels if not getattr(row, "is_user_annotation", False)) / 1e3
    bench.say(f"{what}: profile", device_ms=busy, calls=calls)
    if cuda and ("compiled" in what or "reference" in what) and "ResNet-18" in what:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            found.export_chrome_trace(str(trace))
            content = gzip.compress(trace.read_bytes(), 6)
        if len(content) < 8 * 2**20:
            name = "trace-compiled" if "compiled" in what else "trace-reference"
            (bench.out / f"{name}.json.gz").write_bytes(content)


# --- kNN ------------------------------------------------------------------------------------------------------------------------


def knn(bench: Bench) -> None:
    """The exact search as shipped and with larger blocks, on features that lie on the device, and a search by float16 candidates."""
    for features in (512, 2048):
        rows, asked = bench.size(1_281_167, 3000), bench.size(50_000, 200)
        bank, label, query = clustered(bench, rows, asked, features)
        few = query[: bench.size(4096, 100)]

        def ours(given: Tensor, block: tuple[int, int] | None = None, bank: Tensor = bank, label: Tensor = label) -> Tensor:
            if block is None:
                return search.nearest(bank, label, given, 20, bench.device)
            with (
                replaced(search, "QUERY_ROWS", block[0]),
                replaced(search, "BANK_ROWS", block[1]),
                replaced(search, "QUERY_BYTES", 2**30),
                replaced(search, "_ROWS", 8192),
            ):
                return search.nearest(bank, label, given, 20, bench.device)

        block = (bench.size(8192, 64), bench.size(32_768, 256))
        shipped = bench.attempt(f"kNN D {features}: as shipped", lambda: once(bench, lambda: ours(few)))
        large = bench.attempt(f"kNN D {features}: large blocks", lambda: once(bench, lambda: ours(query, block)))
        coarse = bench.attempt(
            f"kNN D {features}: float16 candidates", lambda: once(bench, lambda: by_candidates(bench, bank, query, 20))
        )
        flop = 2.0 * rows * features
        if shipped:
            bench.say(
                f"kNN D {features}: as shipped",
                queries=len(few),
                seconds=shipped[1],
                seconds_for_all=shipped[1] * asked / len(few),
            )
        if large:
            apart = differences(bank, few, shipped[0], large[0][: len(few)]) if shipped else {}
            bench.say(
                f"kNN D {features}: large blocks",
                queries=asked,
                seconds=large[1],
                tflop_s=flop * asked / large[1] / 1e12,
                **apart,
            )
        if coarse:
            (near, sure), taken = coarse
            apart = differences(bank, few, shipped[0], near[: len(few)]) if shipped else {}
            bench.say(
                f"kNN D {features}: float16 candidates",
                queries=asked,
                seconds=taken,
                certified=float(sure.float().mean()),
                **apart,
            )
        del bank, query, few, shipped, large, coarse


def once(bench: Bench, work: Callable[[], Any]) -> tuple[Any, float]:
    """A result and its seconds by the clock, after one call that is not timed where time allows."""
    begun = time.perf_counter()
    found = work()
    sync(bench.device)
    first = time.perf_counter() - begun
    if first > bench.left / 8:
        return found, first
    begun = time.perf_counter()
    found = work()
    sync(bench.device)
    return found, min(first, time.perf_counter() - begun)


def clustered(bench: Bench, rows: int, asked: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy copies of random centres, the bank sorted by class; features on the device, classes on the CPU."""
    draws = torch.Generator(bench.device).manual_seed(0)
    centre = torch.randn(1000, features, device=bench.device, generator=draws)
    label = torch.arange(rows) * 1000 // rows
    bank = torch.empty(rows, features, device=bench.device)
    for start in range(0, rows, 65_536):
        part = bank[start : start + 65_536]
        part.normal_(generator=draws).mul_(2).add_(centre[label[start : start + 65_536].to(bench.device)])
    wanted = torch.randint(0, 1000, (asked,), device=bench.device, generator=draws)
    return bank, label, torch.randn(asked, features, device=bench.device, generator=draws).mul_(2).add_(centre[wanted])


def differences(bank: Tensor, query: Tensor, one: Tensor, other: Tensor) -> dict[str, Any]:
    """Share of equal neighbours, and how many of the others are no near-ties in float64."""
    one, other = one.to(bank.device), other.to(bank.device)
    row, rank = (one != other).nonzero(as_tuple=True)
    row, rank = row[:20_000], rank[:20_000]
    unit = F.normalize(query[row].double(), dim=1)
    near, far_off = (F.normalize(bank[which[row, rank]].double(), dim=1) for which in (one, other))
    gap = ((unit * near).sum(1) - (unit * far_off).sum(1)).abs()
    return {"same": float((one == other).float().mean()), "unexplained": int((gap > 1e-5).sum())}


def by_candidates(bench: Bench, bank: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Nearest by float16 products, twice as many as asked for, then ordered by float32 ones; and of which queries that is certain.

    A sketch of a faster search, without the rule for ties. Certain: the k-th is further above the last candidate than the
    products of float16 unit vectors can be wrong.
    """
    extra, part_rows, query_rows = 2 * k, bench.size(65_536, 512), bench.size(8192, 128)
    unit_query = F.normalize(query, dim=1)
    near, sure = [], []
    for asked in unit_query.split(query_rows):
        half = asked.half()
        value = asked.new_full((len(asked), extra), -math.inf)
        place = torch.zeros(len(asked), extra, dtype=torch.int64, device=bank.device)
        for start in range(0, len(bank), part_rows):
            rows = F.normalize(bank[start : start + part_rows], dim=1).half()
            if bank.is_cuda:
                similar = torch.mm(half, rows.T, out_dtype=torch.float32)
            else:
                similar = half.float() @ rows.float().T
            groups = similar.shape[1] // 64
            if groups > extra and similar.shape[1] % 64 == 0:  # the best of each 64, then inside the best of these
                best_group = similar.view(len(asked), groups, 64).amax(2).topk(extra, dim=1, sorted=False).indices
                columns = (best_group[:, :, None] * 64 + torch.arange(64, device=bank.device)).flatten(1)
                top = similar.gather(1, columns).topk(extra, dim=1, sorted=False)
                found, column = top.values, columns.gather(1, top.indices)
            else:
                found, column = similar.topk(min(extra, similar.shape[1]), dim=1, sorted=False)
            value, order = torch.cat([value, found], 1).topk(extra, dim=1)
            place = torch.cat([place, column + start], 1).gather(1, order)
        exact = torch.cat(
            [
                (F.normalize(bank[at], dim=2) @ one[:, :, None])[:, :, 0]
                for at, one in zip(place.split(1024), asked.split(1024), strict=True)
            ]
        )
        ordered, order = exact.topk(k, dim=1)
        near.append(place.gather(1, order))
        sure.append(ordered[:, -1] > value[:, -1] + 2e-3)
    return torch.cat(near), torch.cat(sure)


# --- JPEGs ------------------------------------------------------------------------------------------------------------------------


def loader(bench: Bench) -> None:
    """Images from files to tensors: PIL with two strong views in worker processes, and our pack by threads."""
    from benchmarks import loader as made
    from isd_repro.config import params
    from isd_repro.data.store import Store, StoreWriter, convert

    workers, count, batch = os.cpu_count() or 1, bench.size(1024, 12), bench.size(256, 6)
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="isd-jpegs-") as name:
        folder = Path(name)
        (folder / "train" / "a").mkdir(parents=True)
        begun = time.perf_counter()
        distinct = bench.size(64, 4)
        contents = []
        for number in range(distinct):
            buffer = io.BytesIO()
            made.picture(np.random.default_rng(number), 500, 375).save(buffer, "JPEG", quality=95)
            contents.append(buffer.getvalue())
        for number in range(count):
            (folder / "train" / "a" / f"{number:06d}.JPEG").write_bytes(contents[number % distinct])
        settings = params.Store(resize="short-side", side=256, jpeg_quality=90)
        (folder / "pack").mkdir()

        images = [convert(Image.open(io.BytesIO(content)), settings) for content in contents]
        with StoreWriter(folder / "pack", settings) as writer:
            for number in range(count):
                writer.append(images[number % distinct])
            info = writer.finish()
        store = Store(folder / "pack", info, workers)
        bench.say(
            "JPEGs",
            seconds_to_make=time.perf_counter() - begun,
            cores=workers,
            original=sum(map(len, contents)) / distinct,
            packed=info.bytes / count,
        )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))

        def ours() -> int:
            return sum(len(store.read(index)[0]) for index in order.split(batch))

        def rate(what: str, work: Callable[[], int]) -> None:
            work()
            taken, images = [], 0
            for _ in range(bench.size(3, 1)):
                begun = time.perf_counter()
                images = work()
                sync(bench.device)
                taken.append(time.perf_counter() - begun)
            bench.say(what, images_per_second=images / statistics.median(taken), images=images, n=len(taken))

        bench.attempt("pack of JPEGs, decoded by the CPU", lambda: rate("pack of JPEGs, decoded by the CPU", ours))
        bench.attempt("PIL in worker processes", lambda: pil_rate(bench, folder / "train", workers, batch))


def pil_rate(bench: Bench, root: Path, workers: int, batch: int) -> None:
    """Two strong views of each image by torchvision's transforms in a DataLoader, as published code does it."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from benchmarks import plain

    view = plain.transform(STRONG, bench.size(224, 16), MEAN, STD)
    data = ImageFolder(str(root), TwoViews(view))
    reader = DataLoader(
        data, batch_size=batch, shuffle=True, num_workers=bench.size(workers, 1), drop_last=True, multiprocessing_context="fork"
    )
    begun, images = 0.0, 0
    for turn in range(bench.size(3, 2)):
        for (one, _), _ in reader:
            images += len(one)
        if turn == 0:  # the first is for the workers to start and files to be read
            begun, images = time.perf_counter(), 0
    bench.say(
        "PIL in worker processes, two strong views",
        images_per_second=images / (time.perf_counter() - begun),
        images=images,
        workers=workers,
    )


class TwoViews:
    """Both views of an image."""

    def __init__(self, view: Callable[[Any], Tensor]) -> None:
        self.view = view

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        return self.view(image), self.view(image)


# --- resume -----------------------------------------------------------------------------------------------------------------------


def resume(bench: Bench) -> None:
    """Whether a run gives the same bits again, and whether it does after a resume, by engine and by cuDNN's setting; and the price."""
    side, batch, bank = bench.size(64, 16), bench.size(128, 8), bench.size(8192, 64)
    pixels = pictures(bench, bench.size(1024, 16), side)

    def source_at(turn: int) -> Resident:
        source = Resident(pixels, side, batch)
        source.turn = turn
        return source

    kinds = [("reference, float32", REFERENCE, False), ("fast, bf16", HALF, False)]
    if bench.device.type == "cuda":
        kinds.append(("fast, bf16, compiled", HALF, True))
    for words, numerics, compiled in kinds:
        for deterministic in (False, True):
            what = f"resume: {words}, cuDNN deterministic {deterministic}"

            def run(
                what: str = what, numerics: Numerics = numerics, compiled: bool = compiled, deterministic: bool = deterministic
            ) -> None:
                with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=deterministic, allow_tf32=True):
                    arm = Arm(
                        bench,
                        "isd",
                        numerics,
                        compiled=compiled,
                        views=lambda: source_at(0).at(0).view_student,
                        side=side,
                        batch=batch,
                        bank=bank,
                        stem="small",
                    )

                    def back(content: bytes) -> None:
                        checkpoint.take(content, "it", arm.method, arm.optimizer, bench.device)

                    def now() -> bytes:
                        return checkpoint.dump("it", arm.method, arm.optimizer, Progress())

                    start = now()
                    arm.run(source_at(0), 12)
                    first = tensors_of(arm)
                    back(start)
                    arm.run(source_at(0), 12)
                    again = tensors_of(arm)
                    back(start)
                    arm.run(source_at(0), 5)
                    middle = now()
                    arm.run(source_at(0), 3)  # elsewhere
                    back(middle)
                    arm.run(source_at(5), 7)
                    resumed = tensors_of(arm)
                    calls = bench.size(10, 1)
                    each = statistics.median(
                        timed(lambda: arm.run(source_at(0), calls), bench.device)[0] / calls for _ in range(3)
                    )
                bench.say(what, again=apart(first, again), resumed=apart(first, resumed), ms=each)

            bench.attempt(what, run)


def tensors_of(arm: Arm) -> dict[str, Tensor]:
    """Copies of a method's state."""
    return {name: value.clone() for name, value in arm.method.state_dict().items() if isinstance(value, Tensor)}


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Whether two states are equal bit for bit, and how far they are apart where not."""
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    most = max((float((ours[name].double() - theirs[name].double()).abs().max()) for name in unequal), default=0.0)
    return {"equal": not unequal, "unequal": len(unequal), "of": len(ours), "most": most}


# --- the commands ---------------------------------------------------------------------------------------------------------------


def command(bench: Bench) -> None:
    """What a user types: prepare, pretrain with a stop and a resume in the middle, extract and knn, on a folder of images.

    The images are those that the environment variable GPU_DAY_IMAGES names (a tar of train/<class>/ and val/<class>/), else noise.
    """
    with tempfile.TemporaryDirectory(prefix="isd-commands-") as name:
        place = Path(name)
        images = image_folder(bench, place / "images")
        large = [
            path.name for path in sorted((images / "train").iterdir(), key=lambda path: (-len(list(path.iterdir())), path.name))
        ]
        rare = min(len(list((images / "train" / name).iterdir())) for name in large)
        epochs, batch = bench.size(int(os.environ.get("GPU_DAY_EPOCHS", "8")), 2), bench.size(64, 8)
        (place / "params.yaml").write_text(json.dumps(profile(large, rare, epochs, batch, bench.size(64, 16), bench.rehearse)))
        environment = {**os.environ, "GPU_DAY_ROOT": str(images), "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

        def call(*words: str) -> tuple[int, float]:
            begun = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "isd_repro", *words], cwd=place, env=environment, check=False)
            bench.say(f"command: {' '.join(words)}", code=done.returncode, seconds=time.monotonic() - begun)
            return done.returncode, time.monotonic() - begun

        call("prepare", "unbalanced")
        began = time.monotonic()
        first = subprocess.Popen([sys.executable, "-m", "isd_repro", "pretrain", "isd"], cwd=place, env=environment)
        while first.poll() is None and not any(place.glob(".state/*/checkpoint.pt")):
            time.sleep(0.1)
        first.terminate()
        bench.say("command: pretrain isd, asked to stop after an epoch", code=first.wait(), seconds=time.monotonic() - began)
        for run in ("isd", "moco"):
            call("pretrain", run)
            for path in place.rglob(f"runs/{run}/metrics.jsonl"):
                rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
                speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
                losses = [row["loss"] for row in rows if "loss" in row]
                bench.say(
                    f"command: {run}: speed", images_per_second=statistics.median(speeds), loss=losses[-1], epochs=len(losses)
                )
            for path in place.rglob(f"records/{run}/pretrain.json"):
                record = json.loads(path.read_text("utf-8"))
                bench.say(f"command: {run}: attempts", attempts=record.get("attempts"), warnings=record.get("warnings"))
        call("pretrain", "untrained")
        call("extract", "isd", "moco", "untrained")
        call("knn", "isd", "moco", "untrained")
        for path in sorted(place.rglob("records/*/knn.json")):
            scores = json.loads(path.read_text("utf-8"))["scores"]
            top1 = {f"{each['encoder']} {each['metric']} {each['group']}": 100 * each["correct"] / each["n"] for each in scores}
            bench.say(f"command: {path.parent.name}: top-1, percent", **top1)


def image_folder(bench: Bench, folder: Path) -> Path:
    """The images that the environment names, or some of noise."""
    given = os.environ.get("GPU_DAY_IMAGES")
    if given and not bench.rehearse:
        with tarfile.open(given) as archive:
            archive.extractall(folder, filter="data")
        return folder
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    for split, count in (("train", bench.size(100, 12)), ("val", bench.size(50, 4))):
        for cls in range(bench.size(38, 6)):
            (folder / split / f"c{cls:02d}").mkdir(parents=True)
            for number in range(count + (8 if cls < 2 and split == "train" else 0)):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(folder / split / f"c{cls:02d}" / f"{number}.png")
    return folder


def profile(large: list[str], rare: int, epochs: int, batch: int, side: int, toy: bool) -> dict[str, Any]:
    """ISD and MoCo by a profile's recipe of unbalanced classes, `large` by size first, engine `fast` and bf16."""
    view = {"crop_min": 0.2, "flip": 0.5}
    strong = {**view, "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}, "grayscale": 0.2}
    data = {"subset": "unbalanced", "image_size": side, "crop_ratio": 1.0, "view_student": strong, "view_teacher": strong}
    optim = {
        "epochs": epochs,
        "batch_size": batch,
        "lr": 0.03,
        "sgd_momentum": 0.9,
        "weight_decay": 1e-4,
        "schedule": {"name": "cosine"},
    }
    run = {
        "backbone": {"arch": "resnet-narrow", "width": 4} if toy else {"arch": "resnet18", "stem": "small"},
        "data": data,
        "optim": optim,
        "numerics": {"seed": 0, "bn_groups": 2, "precision": "float32" if toy else "bf16", "engine": "fast"},
    }
    bank = 4 * batch if toy else 1024
    return {
        "profile": "gpu-day",
        "report": {"title": "A day on a GPU", "caption": "Commands that ran.", "reference": "untrained"},
        "efficiency": {"log_every": 20, "checkpoint_every": 1},
        "subsets": {
            "unbalanced": {
                "source": {"name": "image-folder", "dataset": "images at hand", "root_env": "GPU_DAY_ROOT"},
                "rule": {
                    "name": "unbalanced",
                    "large": 2 if toy else 8,
                    "rare_images": 8 if toy else 38,
                    "large_classes": large[: 2 if toy else 8],
                },
                "search_per_class": rare,
                "store": {"resize": "square", "size": 64},
            }
        },
        "runs": {
            "untrained": {**run, "label": "Untrained", "method": {"name": "supervised"}, "optim": {**optim, "epochs": 0}},
            "moco": {
                **run,
                "label": "MoCo v2",
                "method": {"name": "moco", "tau": 0.2, "momentum": 0.99, "bank_size": bank, "dim": 128},
            },
            "isd": {
                **run,
                "label": "ISD",
                "data": {**data, "view_teacher": view},
                "method": {
                    "name": "isd",
                    "tau_student": 0.1,
                    "tau_teacher": 0.01,
                    "momentum": 0.99,
                    "bank_size": bank,
                    "heads": "mlp",
                },
            },
        },
    }


STEPS: dict[str, Callable[[Bench], None]] = {
    "env": env,
    "tests": tests,
    "warm": warm,
    "smoke": smoke,
    "loss": loss,
    "views": views,
    "ladder": ladder,
    "knn": knn,
    "small": small,
    "resnet50": resnet50,
    "resume": resume,
    "loader": loader,
    "command": command,
    "tune": tune,
}
