"""What a day on a GPU checks beside the comparisons: environment, tests, every method, the commands, resume, and a profile."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, peers, training_step
from benchmarks.training_step import FAST, HALF, Trainer, Variant
from isd_repro import methods
from isd_repro.config.params import Numerics
from isd_repro.nn import engine
from isd_repro.train import checkpoint
from isd_repro.train.checkpoint import RunProgress

ROOT = Path(__file__).parents[1]
SMALL = training_step.Sizes(stem="small", batch=64, side=64, bank=8192, steps=10)


@dataclass(frozen=True)
class Context:
    """What a check is given: `say` takes a finding's name and values, `out` is a folder for files."""

    say: Callable[..., None]
    out: Path
    toy: bool

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails inside is a finding and stops nothing."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - one of many findings
            traceback.print_exc()
            self.say(name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def sizes(self, sizes: training_step.Sizes) -> training_step.Sizes:
        """These, or toys."""
        return training_step.toy(sizes) if self.toy else sizes


def environment(context: Context) -> None:
    """What the machine has, and the rates that every floor refers to."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False, timeout=20)
    names = ("torch", "torchvision", "triton", "numpy", "pydantic", "pytest", "kornia", "lightly")
    versions = {name: getattr(peers.module(name), "__version__", None) for name in names}
    context.say("versions", python=platform.python_version(), cores=os.cpu_count(), **versions)
    device = harness.device_of()
    if device.type == "cuda":
        card, cudnn = torch.cuda.get_device_properties(device), torch.backends.cudnn.version()
        found = {"memory_gib": card.total_memory / 2**30, "multiprocessors": card.multi_processor_count}
        context.say("device", card=card.name, **found, cuda=torch.version.cuda, cudnn=cudnn, gcc=shutil.which("gcc"))
    rates = {"copy_tb_s": harness.copy_rate(device) / 1e12}
    for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if device.type == "cuda" else 2]:
        name = str(dtype).removeprefix("torch.")
        rates[f"{name}_tflop_s"] = harness.multiply_rate(device, dtype) / 1e12
        rates[f"{name}_convolution_tflop_s"] = harness.convolve_rate(device, dtype) / 1e12
    with harness.tf32():
        rates["tf32_tflop_s"] = harness.multiply_rate(device) / 1e12
    context.say("rates", **rates)


def smoke(context: Context) -> None:
    """Eight steps of every method by every engine and precision: finite losses, and the kernel that was chosen."""
    sizes, device = context.sizes(SMALL), harness.device_of()
    for name in methods.names():
        first: dict[str, float] = {}
        for numerics in (Numerics(), Numerics(precision="bf16"), FAST, HALF):
            words = f"{name}, {numerics.engine}, {numerics.precision}"
            with context.attempt(words):
                torch.manual_seed(1)
                trainer = Trainer(replace(sizes, method=name), Variant(numerics), training_step.images_of(sizes))
                views = [torch.randn(sizes.batch, 3, sizes.side, sizes.side, device=device) for _ in range(2)]
                batch = training_step.batch_of(trainer.images, views)
                losses = [float(training_step.step_of(trainer.method, trainer.optimizer, batch, numerics)) for _ in range(8)]
                if not all(map(math.isfinite, losses)):
                    raise ValueError(f"losses are not finite: {losses}")
                first[words] = losses[0]
                context.say(words, first=losses[0], last=losses[-1], kernels=engine.kernels_of(trainer.method, numerics))
        if first:
            want = next(iter(first.values()))
            apart = {key.partition(", ")[2]: abs(value - want) for key, value in first.items()}
            context.say(f"{name}: first loss from the reference's", **apart)


def tests(context: Context) -> None:
    """The tests that need a CUDA device, and for a toy those of one file that need none."""
    found = importlib.util.find_spec("tests")
    if found is not None and found.origin is not None and not Path(found.origin).is_relative_to(ROOT):
        (ROOT / "tests" / "__init__.py").touch()  # an installed package of this name would take its place
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    mark, files = ("not gpu and not slow", [str(ROOT / "tests/conformance/test_cuda.py")]) if context.toy else ("gpu", files)
    spread = ["-p", "xdist.plugin", "-n", "2" if context.toy else "6"] if peers.module("xdist") else []
    options = ["-m", mark, "-q", "-ra", "--tb=short", "-W", "default", "-o", "minversion=8", "-p", "no:cacheprovider"]
    # plugins of pytest that the machine happens to have stay out
    given = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    log = context.out / "tests.txt"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "pytest", *options, *spread, *files]
        done = subprocess.run(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, check=False, env=given)
    lines = log.read_text("utf-8", "replace").splitlines()
    context.say("pytest", code=done.returncode, last=lines[-1][:200] if lines else "")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            context.say("test", failed=line[:300])


def compile_(context: Context) -> None:
    """Compile what the comparisons will want, so that they find it in the compiler's cache."""
    if harness.device_of().type != "cuda":
        return
    for name, sizes in training_step.CUDA.items():
        with context.attempt(name):
            began = time.monotonic()
            trainer = Trainer(context.sizes(sizes), Variant(HALF, compiled=True), training_step.images_of(context.sizes(sizes)))
            trainer()
            context.say(name, seconds=time.monotonic() - began, compiled=trainer.words)


def resume(context: Context) -> None:
    """Whether a run gives the same bits again, and after a resume, by engine and by cuDNN's deterministic mode; and its price.

    One network has ImageNet's stem, because only that has a large convolution and max pooling.
    """
    small, device = replace(SMALL, batch=128), harness.device_of()
    kinds = {
        "reference, float32": (small, Variant()),
        "reference, float32, ImageNet's stem": (replace(small, stem="imagenet"), Variant()),
        "fast, bf16": (small, Variant(HALF)),
    }
    if device.type == "cuda":
        kinds["fast, bf16, compiled"] = small, Variant(HALF, compiled=True)
    for words, (wanted, variant) in kinds.items():
        sizes = context.sizes(wanted)
        for deterministic in (False, True):
            name = f"{words}, cuDNN deterministic {deterministic}"
            flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=deterministic, allow_tf32=True)
            with context.attempt(name), flags:
                trainer = Trainer(sizes, variant, training_step.images_of(sizes))

                def train(first: int, steps: int, trainer: Trainer = trainer) -> dict[str, Tensor]:
                    trainer.images.step = first
                    trainer.train(steps, lambda: training_step.batch_of(trainer.images, trainer.views()))
                    return {key: value.clone() for key, value in trainer.method.state_dict().items()}

                def point(trainer: Trainer = trainer) -> bytes:
                    return checkpoint.dump("it", trainer.method, trainer.optimizer, RunProgress())

                def back(content: bytes, trainer: Trainer = trainer) -> None:
                    checkpoint.take(content, "it", trainer.method, trainer.optimizer, device)

                start = point()
                whole = train(0, 12)
                back(start)
                again = train(0, 12)
                back(start)
                train(0, 5)
                middle = point()
                train(99, 3)
                back(middle)
                resumed = train(5, 7)
                seconds = min(harness.seconds_of(lambda: train(0, 10), device) / 10 for _ in range(3))
                context.say(name, again=_apart(whole, again), resumed=_apart(whole, resumed), ms_of_a_step=1e3 * seconds)


def _apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Whether two states are equal bit for bit, and how far apart they are if not."""
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    most = max((float((ours[name].double() - theirs[name].double()).abs().max()) for name in unequal), default=0.0)
    return f"{len(unequal)} of {len(ours)} tensors differ, by {most:.2g} at most" if unequal else "equal bit for bit"


def profile_(context: Context) -> None:
    """Where a step's time goes and what the host waits for: the 30 most expensive kernels go to profile.txt."""
    cuda = harness.device_of().type == "cuda"
    sizes = context.sizes(replace(training_step.CUDA["step-224"], steps=2))
    images = training_step.images_of(sizes)
    ladder = training_step.ladder(harness.device_of())
    works: dict[str, Callable[[], object]] = {"views": images.batched}
    works |= {name: Trainer(sizes, ladder[name], images) for name in training_step.SHORT if name in ladder}
    for name, work in works.items():
        with context.attempt(name):
            work()
            where = _waits(work) if cuda else {}
            with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
                work()
            rows = found.key_averages()
            order = "self_device_time_total" if cuda else "self_cpu_time_total"
            with (context.out / "profile.txt").open("a", encoding="utf-8") as stream:
                stream.write(f"=== {name}\n{rows.table(sort_by=order, row_limit=30, max_name_column_width=70)}\n\n")
            calls = {row.key: row.count for row in rows if row.key.startswith(("cuda", "cuLaunch", "Memcpy"))}
            context.say(name, waits=sum(where.values()), where=where, calls=calls)


def _waits(work: Callable[[], object]) -> dict[str, int]:
    """How often the host waited for the device, by the line that made it wait, as torch's debug mode sees it."""
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
    return where


# --- the commands ---------------------------------------------------------------------------------------------------------


def commands(context: Context) -> None:
    """What a user types on a folder of images: prepare, pretrain with a stop and a resume in the middle, extract and knn.

    The images are those of the tar that GPU_DAY_IMAGES names (train/<class>/ and val/<class>/), else noise.
    """
    with _profile_folder(context) as (place, images):
        call = _caller(context, place, images)
        (place / "params.yaml").write_text(json.dumps(_profile(images, toy=context.toy, epochs=8)))
        call("prepare", "unbalanced")
        call("pretrain", "isd", stop=True)
        for stage in ("pretrain", "extract", "knn"):
            call(stage, "isd", "moco", "untrained")
        _tell_scores(context, place)


def claim(context: Context) -> None:
    """ISD and MoCo v2 on unbalanced classes at ResNet-18, 64 px: longer and longer trainings, as the time allows.

    One seed and settings of no protocol: it says how long a test of the claim would take, and nothing about the claim.
    """
    if not os.environ.get("GPU_DAY_IMAGES") and not context.toy:
        context.say("left out", why="GPU_DAY_IMAGES names no images")
        return
    with _profile_folder(context) as (place, images):
        call, took, before, an_epoch = _caller(context, place, images), 0.0, 0, 0.0
        for epochs in (1,) if context.toy else (5, 25, 100):
            if time.monotonic() + took + an_epoch * (epochs - before) > harness.Clock.end:
                context.say(f"{epochs} epochs", left_out="not enough time")
                return
            began, profile = time.monotonic(), _profile(images, toy=context.toy, epochs=epochs)
            (place / "params.yaml").write_text(json.dumps(profile))
            if not before:
                call("prepare", "unbalanced")
            for stage in ("pretrain", "extract", "knn"):
                call(stage, "isd", "moco")
            speeds = _tell_scores(context, place, f"{epochs} epochs, ")
            took, before = time.monotonic() - began, epochs
            an_epoch = _train_images(images, profile) * sum(1 / speed for speed in speeds)


def _train_images(images: Path, profile: dict[str, Any]) -> int:
    """Images of the unbalanced train split."""
    rule = profile["subsets"]["unbalanced"]["rule"]
    classes = [path for path in (images / "train").iterdir() if path.name not in rule["large_classes"]]
    large = sum(len(list((images / "train" / name).iterdir())) for name in rule["large_classes"])
    return large + len(classes) * int(rule["rare_images"])


@contextmanager
def _profile_folder(context: Context) -> Iterator[tuple[Path, Path]]:
    """A folder for a profile, and its images."""
    with tempfile.TemporaryDirectory(prefix="isd-commands-") as name:
        yield Path(name), _image_folder(Path(name) / "images", toy=context.toy)


def _caller(context: Context, place: Path, images: Path) -> Callable[..., None]:
    """Runs a command in the folder of a profile and tells how it ended."""
    given = {**os.environ, "GPU_DAY_ROOT": str(images), "WANDB_MODE": "disabled"}
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

    def call(*words: str, stop: bool = False) -> None:
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "isd_repro", *words], cwd=place, env=given)
        while stop and process.poll() is None and not any(place.glob(".state/*/checkpoint.pt")):
            time.sleep(0.1)
        if stop:
            process.terminate()
        code, what = process.wait(), " ".join(words) + (", asked to stop after an epoch" if stop else "")
        context.say(what, code=code, seconds=time.monotonic() - began)
        if code != (75 if stop else 0):
            context.say(what, failed=f"it ended with {code}")

    return call


def _tell_scores(context: Context, place: Path, prefix: str = "") -> list[float]:
    """Tell the last row of every run's curve, and its scores; images per second of each run."""
    speeds = []
    for path in sorted(place.rglob("runs/*/metrics.jsonl")):
        rows = [row for row in map(json.loads, path.read_text("utf-8").splitlines()) if "images_per_second" in row]
        if rows:
            speeds.append(max(float(rows[-1]["images_per_second"]), 1.0))
            context.say(f"{prefix}{path.parent.name}: curve", images_per_second=speeds[-1], loss=rows[-1].get("loss"))
    for path in sorted(place.rglob("records/*/knn.json")):
        scores = json.loads(path.read_text("utf-8"))["scores"]
        top1 = {f"{each['encoder']} {each['metric']} {each['group']}": 100 * each["correct"] / each["n"] for each in scores}
        context.say(f"{prefix}{path.parent.name}: top-1, percent", **top1)
    return speeds


def _image_folder(folder: Path, *, toy: bool) -> Path:
    """The images that the environment names, or some of noise."""
    given = os.environ.get("GPU_DAY_IMAGES")
    if given and not toy:
        with tarfile.open(given) as archive:
            archive.extractall(folder, filter="data")
        return folder
    draws = np.random.default_rng(0)
    for split, count in (("train", 12 if toy else 100), ("val", 4 if toy else 50)):
        for cls in range(6 if toy else 38):
            (folder / split / f"c{cls:02d}").mkdir(parents=True)
            for number in range(count + (8 if cls < 2 and split == "train" else 0)):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(folder / split / f"c{cls:02d}" / f"{number}.png")
    return folder


def _profile(images: Path, *, toy: bool, epochs: int) -> dict[str, Any]:
    """A small profile of unbalanced classes, engine `fast` with bf16: its largest classes stay, the others become rare."""
    counts = {path.name: len(list(path.iterdir())) for path in (images / "train").iterdir()}
    large = sorted(counts, key=lambda name: (-counts[name], name))[: 2 if toy else 8]
    view = {"crop_min": 0.2, "flip": 0.5}
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
    strong, batch = {**view, "jitter": jitter, "grayscale": 0.2}, 8 if toy else 64
    data = {"subset": "unbalanced", "image_size": 16 if toy else 64, "crop_ratio": 1.0}
    optim = {"batch_size": batch, "lr": 0.03, "sgd_momentum": 0.9, "weight_decay": 1e-4, "schedule": {"name": "cosine"}}
    run = {
        "backbone": {"arch": "resnet-narrow", "width": 4} if toy else {"arch": "resnet18", "stem": "small"},
        "data": {**data, "view_student": strong, "view_teacher": strong},
        "optim": {**optim, "epochs": epochs},
        "numerics": {"seed": 0, "bn_groups": 2, "precision": "float32" if toy else "bf16", "engine": "fast"},
    }
    bank = {"momentum": 0.99, "bank_size": 4 * batch}
    rule = {"name": "unbalanced", "large": len(large), "large_classes": large, "rare_images": 8 if toy else 38}
    return {
        "profile": "gpu-day",
        "report": {"title": "A day on a GPU", "caption": "Commands that ran.", "reference": "untrained"},
        "efficiency": {"log_every": 20, "checkpoint_every": 1},
        "subsets": {
            "unbalanced": {
                "source": {"name": "image-folder", "dataset": "images at hand", "root_env": "GPU_DAY_ROOT"},
                "rule": rule,
                "search_per_class": min(counts.values()),
                "store": {"resize": "square", "side": 64},
            }
        },
        "runs": {
            "untrained": {**run, "label": "Untrained", "method": {"name": "supervised"}, "optim": {**optim, "epochs": 0}},
            "moco": {**run, "label": "MoCo v2", "method": {"name": "moco", "tau": 0.2, "dim": 128, **bank}},
            "isd": {
                **run,
                "label": "ISD",
                "data": {**data, "view_student": strong, "view_teacher": view},
                "method": {"name": "isd", "tau_student": 0.1, "tau_teacher": 0.01, "heads": "mlp", **bank},
            },
        },
    }


CHECKS: dict[str, Callable[[Context], None]] = {
    "environment": environment,
    "tests": tests,
    "compile": compile_,
    "smoke": smoke,
    "resume": resume,
    "profile": profile_,
    "commands": commands,
    "claim": claim,
}
