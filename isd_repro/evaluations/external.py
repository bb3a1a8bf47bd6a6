"""Command `evaluate`: evaluates any checkpoint on labelled images with the paper's protocols.

It opens the checkpoint as a `Subject` and calls the same evaluations as the stages of a run; features are kept for the next time.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from isd_repro import checkpoints, evaluations
from isd_repro.checkpoints import Checkpoint
from isd_repro.config.layout import state_root
from isd_repro.data import eval_loader, image_folder
from isd_repro.data.eval_loader import Frame
from isd_repro.data.image_folder import ImageSet
from isd_repro.evaluations import feature_cache, stage, summary
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.features import BLOCK
from isd_repro.evaluations.subject import Outcome, SplitFeatures, Subject
from isd_repro.provenance import describe
from isd_repro.records import EvaluationRecord, ExternalRecord, unpack_labels, write_record
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, Preempted, printable
from isd_repro.runtime.progress import Progress

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.449,), (0.226,)  # their means, for an encoder of grey images that says nothing of its own
_SIZE, _CROP_RATIO = 224, 0.875
_KINDS = ("knn", "linear")  # what the command has options for
_ONCE = "once-"  # folders of features that are not kept

LEAST, MOST = 8, 4096  # pixels of a side: less leaves no image, more no memory for a block of 256
_NAME_MAX = 200  # bytes; beside it a file of the same name and 20 more is written first


@dataclass(frozen=True)
class Request:
    """What is asked; the options of the command.

    Attributes:
        ckpt: the checkpoint.
        data: a folder or zip of images, or None with `prepared`.
        prepared: a prepared subset of the pipeline.
        listed: one of the authors' lists, which names classes and groups.
        which, arch, teacher_bn, key, prefix, padding, drop_unknown: as `checkpoints.load` takes them.
        image_size, crop_ratio, mean, std: None takes what the file says, else ImageNet's.
        seeds: heads of the paper's protocol for each encoder, from seeds 0 to seeds - 1.
        epochs: None is the paper's 40; fewer is a shortened protocol and named so.
        cache: keep features for the next evaluation.
        allow_shared: go on where many queries are copies of training or search images.
        workers: threads that decode; changes no number.
    """

    ckpt: Path
    data: Path | None = None
    prepared: Path | None = None
    listed: Path | None = None
    protocol: Literal["knn", "linear", "all"] = "knn"
    which: Literal["student", "teacher", "both"] = "student"
    arch: str = "auto"
    teacher_bn: Literal["own", "student"] = "own"
    key: str | None = None
    prefix: str | None = None
    padding: Literal["1", "2", "same"] | None = None
    drop_unknown: bool = False
    image_size: int | None = None
    crop_ratio: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    ks: tuple[int, ...] = (1, 20)
    seeds: int = 1
    epochs: int | None = None
    cache: bool = True
    allow_shared: bool = False
    workers: int | None = None
    label: str | None = None
    out: Path | None = None
    per_class: bool = False
    as_json: bool = False

    def check(self) -> None:
        """`ConfigError` where options contradict each other, a value is out of its range, or `--out` cannot be written."""
        if (self.data is None) == (self.prepared is None):
            raise ConfigError(
                "give the images with either --data or --prepared", "--data takes a folder, --prepared one of the pipeline's"
            )
        if self.listed is not None and self.data is None:
            raise ConfigError("--list goes with --data", "a prepared folder already says which classes are large")
        self._check_view()
        self._check_counts()
        if self.label is not None and (not self.label.strip() or "\n" in self.label or printable(self.label) != self.label):
            raise ConfigError("--label: is empty or contains invisible characters", "give a visible text on one line")
        if self.out is not None:
            self._check_out(self.out)

    def _check_view(self) -> None:
        if self.image_size is not None and not LEAST <= self.image_size <= MOST:
            raise ConfigError(f"--image-size {self.image_size}: must be {LEAST} to {MOST}", "give a side in pixels")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ConfigError(f"--crop-ratio {self.crop_ratio}: must be above 0 and at most 1", "the paper's is 0.875")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise ConfigError("--mean: every value must be a finite number", "ImageNet's is 0.485,0.456,0.406")
        if self.std is not None and not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ConfigError("--std: every value must be a finite number above 0", "ImageNet's is 0.229,0.224,0.225")

    def _check_counts(self) -> None:
        """Numbers in their range, and none for a protocol that is not run."""
        if not self.ks or min(self.ks) < 1 or self.seeds < 1 or (self.epochs is not None and self.epochs < 1):
            raise ConfigError("--k, --linear-seeds and --linear-epochs must be 1 or more", "omit them to use the paper's values")
        if len(set(self.ks)) < len(self.ks):
            raise ConfigError(f"--k: {', '.join(map(str, self.ks))} repeats a number", "give each number once")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers}: must be 1 or more", "omit it to use all cores")
        unused = {
            "--k": self.protocol == "linear" and self.ks != Request.ks,
            "--linear-seeds": self.protocol == "knn" and self.seeds != 1,
            "--linear-epochs": self.protocol == "knn" and self.epochs is not None,
            "--workers": self.data is None and self.workers is not None,
        }
        for option in (name for name, wrong in unused.items() if wrong):
            where = "--prepared, which is not decoded" if option == "--workers" else f"--protocol {self.protocol}"
            raise ConfigError(
                f"{option} has no effect with {where}", f"omit {option}, or request the evaluation that it belongs to"
            )

    def _check_out(self, out: Path) -> None:
        """Before the work, not after it: that the record can be written where it shall be, and takes no input's place."""
        hint = "--out names a file; `report` reads records/<name>/external.json"
        try:
            found = out.stat()
        except (FileNotFoundError, NotADirectoryError):
            found = None
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}", hint) from error
        if found is not None and not stat.S_ISREG(found.st_mode):
            what = "is a folder" if stat.S_ISDIR(found.st_mode) else "is a pipe or a device, not a file"
            raise ConfigError(f"--out {out}: {what}", hint)
        for given in (self.ckpt, self.data, self.listed):
            if found is not None and given is not None and given.exists() and out.samefile(given):
                raise ConfigError(f"--out {out}: is the file that is being read", hint)
        if len(os.fsencode(out.name)) > _NAME_MAX:
            raise ConfigError(f"--out: its name has more than {_NAME_MAX} bytes", hint)
        folder = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "cannot be written to" if folder.is_dir() else "is not a folder"
            raise ConfigError(f"--out {out}: {folder} {what}", "give another folder, or allow writing to this one")
        _ = self.name  # which says where it is none

    @property
    def name(self) -> str:
        """The record's folder where `report` will look for it, else the checkpoint's name made fit to be one."""
        own = self.out.resolve().parent.name if self.out is not None and self.out.name == "external.json" else ""
        text = re.sub(r"[^a-z0-9.-]+", "-", (own or self.ckpt.name.split(".")[0]).lower()).lstrip("-.") or "checkpoint"
        if own and text != own:
            raise ConfigError(f"{self.out}: {own!r} is not a valid record name", "use small letters, digits, dots and hyphens")
        return text

    @property
    def command(self) -> str:
        """The command that asks for the same numbers, without folders, which differ from machine to machine."""
        words = ["isd-repro evaluate", f"--ckpt {self.ckpt.name}"]
        places = {"data": self.data, "prepared": self.prepared, "list": self.listed}
        words += [f"--{name} {path.name}" for name, path in places.items() if path is not None]
        plain = Request(self.ckpt)
        options = {"protocol": "protocol", "which": "which", "arch": "arch", "teacher_bn": "teacher-bn"}
        options |= {"key": "key", "prefix": "prefix", "padding": "padding"}
        options |= {"image_size": "image-size", "crop_ratio": "crop-ratio", "seeds": "linear-seeds", "epochs": "linear-epochs"}
        words += [
            f"--{option} {getattr(self, key)}" for key, option in options.items() if getattr(self, key) != getattr(plain, key)
        ]
        words += ["--drop-unknown"] if self.drop_unknown else []
        words += ["--allow-shared-images"] if self.allow_shared else []
        lists = {"mean": self.mean, "std": self.std}
        words += [f"--{name} {','.join(map(str, values))}" for name, values in lists.items() if values is not None]
        words += [f"--k {k}" for k in self.ks] if self.ks != plain.ks else []
        return " ".join(words)


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """`0.485,0.456,0.406` as numbers; `ConfigError` where it is none."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text}: not numbers", "give one for each channel, as 0.485,0.456,0.406") from error


# --- the command ------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(request: Request, console: Console) -> None:
    """Score a checkpoint; tables or JSON on standard output, progress and notes on `console`.

    Raises:
        ConfigError: options that contradict each other, or a k above the number of search images.
        DataError: the checkpoint or the images are missing, damaged, or not what they must be; features that are not finite.
        UserError: another process extracts the same features; a linear head diverged.
        Preempted: a signal asked to stop; finished features are kept.
    """
    started = time.monotonic()
    request.check()
    checkpoint = checkpoints.load(
        request.ckpt,
        request.which,
        arch=request.arch,
        teacher_bn=request.teacher_bn,
        key=request.key,
        prefix=request.prefix,
        padding=request.padding,
        drop_unknown=request.drop_unknown,
    )
    progress = Progress(console)
    frame = frame_of(request, checkpoint)
    encoders = f"{checkpoint.arch}, layout {checkpoint.layout}, {', '.join(checkpoint.encoders)}"
    progress.say(f"{request.ckpt.name}: {encoders}, sha256 {checkpoint.sha256[:16]}")
    with ExitStack() as stack:
        root = stack.enter_context(_cache(request))
        opened = stack.enter_context(_images(request, checkpoint.channels, progress))
        place = str(request.data or request.prepared)
        copies = opened.prepared.manifest.check_shared(place, "give --allow-shared-images", allowed=request.allow_shared)
        notes = [
            *checkpoint.notes,
            *opened.notes,
            *filter(None, [copies]),
            *_about(opened, frame),
            *_hints(request, checkpoint, frame),
        ]
        for note in notes:
            progress.say(note)
        features = _Features(root, request, checkpoint, opened, frame)
        subject = _subject(request, checkpoint, opened, frame, features, progress)
        found: list[EvaluationRecord] = []
        for kind in reversed(_KINDS) if request.protocol == "all" else (request.protocol,):  # the long one says first how long
            config = getattr(subject.settings, kind)
            asked, outcome = stage.settings(kind, subject, config), evaluations.load(kind).evaluate(subject, config)
            assert isinstance(outcome, Outcome)
            for note in outcome.notes:
                progress.say(note)
            notes += outcome.notes
            record = stage.record_of(kind, subject, outcome, asked, features.digest, time.monotonic() - started)
            assert isinstance(record, EvaluationRecord)
            found.insert(0, record)
    whole = ExternalRecord(
        name=request.name,
        label=request.label or request.name,
        file=printable(request.ckpt.name),
        sha256=checkpoint.sha256,
        layout=checkpoint.layout,
        arch=checkpoint.arch,
        teacher_bn=request.teacher_bn,
        transform={**asdict(frame), "channels": checkpoint.channels, "dtype": "float32", "pixels": opened.pixels},
        command=printable(request.command),
        warnings=tuple(features.warnings),
        evaluations=tuple(found),
        provenance=describe(time.monotonic() - started),
    )
    if request.out is not None:
        write_record(request.out, whole)
        progress.say(f"record written to {request.out}")
    _print(request, whole, notes)


def _subject(
    request: Request, checkpoint: Checkpoint, opened: ImageSet, frame: Frame, features: _Features, progress: Progress
) -> Subject:
    settings = evaluations.settings({"knn": {"k": request.ks}})
    linear = evaluations.load("linear")
    head = linear.shortened(request.epochs).model_copy(update={"seeds": request.seeds, "clean": True, "top5": True})
    return Subject(
        name=request.name,
        profile="external",
        encoders=checkpoint.encoders,
        sha256=checkpoint.sha256,
        frame=frame,
        channels=checkpoint.channels,
        manifest=opened.prepared.identity,
        settings=settings.model_copy(update={"linear": head}),
        progress=progress,
        open_images=lambda: (opened.prepared, opened.reader),
        read_features=features.read,
    )


class _Features:
    """The checkpoint's features in the cache, computed where they are not there."""

    def __init__(self, root: Path, request: Request, checkpoint: Checkpoint, opened: ImageSet, frame: Frame) -> None:
        self.warnings: list[str] = []  # what a reader of the numbers should know
        self._root, self._opened, self._frame = root, opened, frame
        self._identities: dict[str, dict[str, object]] = {
            name: {
                "encoder_sha256": checkpoint.sha256,
                "encoder": name,
                "arch": checkpoint.arch,
                "place": [request.key, request.prefix, request.padding],
                "teacher_bn": request.teacher_bn if name == "teacher" else "own",
                "manifest": opened.prepared.identity.sha256,
                "transform": {**asdict(frame), "pixels": opened.pixels, "group": BLOCK},
                "dtype": "float32",
                "arithmetic": {"device": best_device().type, "torch": torch.__version__},
            }
            for name in checkpoint.encoders
        }

    @property
    def digest(self) -> str:
        """Sha256 over all rows."""
        return feature_cache.digest(self._root, self._identities)

    def read(self, subject: Subject) -> SplitFeatures:
        """Both splits' features by encoder, memory-mapped."""
        splits = {"search": subject.split("search"), "query": subject.split("query")}
        kept, total = 0, sum(map(len, splits.values()))

        def keep(_: str, count: int) -> None:
            nonlocal kept
            kept += count
            bar.advance(count)

        def half(count: int) -> None:
            """Of the work on these images: their views, or the encoder's forward."""
            bar.advance(count / 2)

        with subject.progress.task("extracting features") as bar:
            views = {
                name: (eval_loader.centred(self._opened.reader, split.index, self._frame, subject.device, half), len(split))
                for name, split in splits.items()
            }
            bar.begin(total)
            found = feature_cache.stream(
                self._root, subject.encoders, self._identities, views, subject.device, lambda _, count: half(count), keep
            )
        if kept:
            subject.progress.say(f"features of {kept} of {total} images were there from before")
        for name, rows in found["search"].items():
            if feature_cache.same(rows):
                what = "features of all images are the same (collapsed), so its numbers are those of chance"
                self.warnings.append(f"{name}: {what}")
                subject.progress.say(self.warnings[-1])
        return found


# --- what is evaluated, and on what -------------------------------------------------------------------------------------


def frame_of(request: Request, checkpoint: Checkpoint) -> Frame:
    """The view that the encoder gets: options first, then the file's own word, then the paper's values."""
    usual = IMAGENET if checkpoint.channels == 3 else GREY
    mean, std = request.mean or checkpoint.mean or usual[0], request.std or checkpoint.std or usual[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != checkpoint.channels:
            message = f"--{name} has {len(values)} values, the encoder sees {checkpoint.channels} channels"
            raise ConfigError(message, "give one value for each channel")
    size = request.image_size or checkpoint.image_size or _SIZE
    ratio = request.crop_ratio or checkpoint.crop_ratio or _CROP_RATIO
    if size / ratio > MOST:
        message = f"--image-size {size} with --crop-ratio {ratio:g}: a short side above {MOST} pixels"
        raise ConfigError(message, "give a smaller size or a larger ratio")
    return Frame(size, ratio, tuple(mean), tuple(std))


@contextmanager
def _images(request: Request, channels: int, progress: Progress) -> Iterator[ImageSet]:
    if request.prepared is not None:
        yield image_folder.open_packed(request.prepared, channels, state_root() / "verified")
        return
    assert request.data is not None
    with ExitStack() as stack:
        bar = stack.enter_context(progress.task("hashing images"))
        opened = image_folder.open_folder(
            request.data, channels, workers=request.workers, listed=request.listed, begin=bar.begin, advance=bar.advance
        )
        found = stack.enter_context(opened)
        bar.close()
        yield found


def _about(opened: ImageSet, frame: Frame) -> Iterator[str]:
    identity = opened.prepared.identity
    sizes = f"{identity.search} labelled images to search or fit, {identity.query} queries, {len(identity.classes)} classes"
    yield f"images: {identity.dataset}, {sizes}, manifest {identity.sha256[:16]}"
    yield f"view: short side to {frame.short_side}, central {frame.size} x {frame.size}"
    small = int((opened.reader.sizes.amin(dim=1) < frame.short_side).sum())
    if small:
        yield f"{small} of {len(opened.reader.sizes)} images have a short side below {frame.short_side} and are enlarged to it"


def _hints(request: Request, checkpoint: Checkpoint, frame: Frame) -> Iterator[str]:
    stated = request.image_size or checkpoint.image_size
    if stated is None and ("-small" in checkpoint.arch or "narrow" in checkpoint.arch):
        yield (
            f"the encoder has a stem for small images and gets {frame.size} pixels; "
            "--image-size gives the size that it was trained at"
        )
    if request.epochs is not None:
        yield _shortened(request.epochs)


def _shortened(epochs: int) -> str:
    return f"linear probes of {epochs} epochs, where the paper's protocol has 40"


@contextmanager
def _cache(request: Request) -> Iterator[Path]:
    """Where features lie; outside DVC, as all resume state. An interrupted evaluation that keeps them can go on."""
    root = state_root() / "features"
    files.sweep(root, _ONCE)
    if not request.cache:
        with files.temporary(root / f"{_ONCE}{secrets.token_hex(4)}") as once:
            yield once
        return
    try:
        yield root
    except KeyboardInterrupt as error:
        message = "stopped; the features that were finished are kept"
        raise Preempted(message, "run the same command again: it goes on with them") from error


# --- what comes out -----------------------------------------------------------------------------------------------------


def _print(request: Request, record: ExternalRecord, notes: Sequence[str]) -> None:
    scores = [score for one in record.evaluations for score in one.scores]
    manifest = record.evaluations[0].manifest
    predictions = {key: unpack_labels(text) for one in record.evaluations for key, text in one.predictions.items()}
    label = unpack_labels(record.evaluations[0].labels)
    first = {key: rows for key, rows in predictions.items() if not key.endswith("-top5")}
    classes = summary.per_class(first, label, manifest.classes) if request.per_class else []
    if request.as_json:
        about = record.model_dump(mode="json", exclude={"evaluations", "kind"})
        about |= {
            "images": manifest.model_dump(mode="json"),
            "scores": [{**score.model_dump(mode="json"), "top1": score.top1} for score in scores],
            "settings": {one.kind: one.settings for one in record.evaluations},
            "protocols": {one.kind: one.protocol for one in record.evaluations},
            "notes": [*notes, *record.warnings],
            **({"per_class": classes} if request.per_class else {}),
        }
        sys.stdout.write(json.dumps(about, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return
    out = Console(file=sys.stdout, highlight=False)
    title = f"{record.label}: {record.arch} ({record.layout}) on {manifest.dataset}, percent of queries [95 % Wilson interval]"
    title += f"; {_shortened(request.epochs)}" if request.epochs is not None else ""
    tables = [(title, summary.score_table(scores, intervals=True))]
    tables += [("By class, top-1 in percent", summary.class_table(classes))] if classes else []
    summary.show(out, tables)
    chance = 100 / len(manifest.classes)
    out.print(
        f"Chance is {chance:.2f} % top-1 ({len(manifest.classes)} classes). Intervals are over the queries, for this encoder."
    )
