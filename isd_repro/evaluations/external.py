"""Command `evaluate`: evaluates any checkpoint on labelled images with the paper's protocols.

It opens the checkpoint as a `Subject` and calls the same evaluations as the stages of a run. Features are cached for later calls.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from rich.console import Console

from isd_repro import checkpoints, evaluations
from isd_repro.checkpoints import Checkpoint
from isd_repro.config.fields import Count, Frozen, Many, Positive, Words
from isd_repro.config.layout import state_root
from isd_repro.data import eval_loader, image_folder
from isd_repro.data.eval_loader import Frame
from isd_repro.data.image_folder import ImageSet
from isd_repro.data.manifests import check_shared
from isd_repro.evaluations import feature_cache, stage, summary
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.features import group_size
from isd_repro.evaluations.subject import SplitFeatures, Subject
from isd_repro.provenance import describe
from isd_repro.records import EvaluationRecord, ExternalRecord, write_record
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, Preempted, printable
from isd_repro.runtime.progress import Progress

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.449,), (0.226,)  # their means, for an encoder of grey images whose file states none
_SIZE, _CROP_RATIO = 224, 0.875
_ONCE = "once-"  # folders of features that are not kept
LEAST, MOST = 8, 4096  # pixels of a side: less leaves no image, more no memory for a block of 256
_UNSEEN = {"ckpt", "data", "prepared", "listed", "options", "cache", "workers", "label", "out", "per_class", "as_json"}


class _Values(Frozen):
    """Options that have a range."""

    image_size: Annotated[int, Field(ge=LEAST, le=MOST)] | None
    crop_ratio: Annotated[float, Field(gt=0, le=1)] | None
    mean: Many[float] | None
    std: Many[Positive] | None
    workers: Count | None
    label: Annotated[Words, Field(pattern=r"^[^\n]*\S[^\n]*$")] | None


@dataclass(frozen=True)
class Request:
    """The options of the command.

    Attributes:
        ckpt: the checkpoint.
        data: a folder or zip of images; None if `prepared` is given.
        prepared: a prepared subset of the pipeline.
        listed: a list of training images, which determines classes and groups.
        protocol: the name of an evaluation, or `all`.
        options: the given options of the evaluations, by name (`--k`); see `OPTIONS` in docs/new-evaluation.md.
        which, arch, teacher_bn, key, prefix, padding, drop_unknown: as for `checkpoints.load`.
        image_size, crop_ratio, mean, std: in pixels; a fraction; per channel on the scale 0..1. None means the file's values, or
            ImageNet's if it states none.
        allow_shared_images: continue even if many queries are copies of training or search images.
        cache: keep features for the next evaluation.
        workers: threads that decode images; their number changes no result.
        label: of the row in tables; None means the record's name.
        out: file to which the record is written; None writes none.
        per_class: also print the accuracy of each class.
        as_json: print only JSON on standard output.
    """

    ckpt: Path
    data: Path | None = None
    prepared: Path | None = None
    listed: Path | None = None
    protocol: str = "knn"
    options: Mapping[str, Any] = field(default_factory=dict)
    which: Literal["student", "teacher", "both"] = "student"
    arch: str = "auto"
    teacher_bn: Literal["own", "student"] = "own"
    key: str | None = None
    prefix: str | None = None
    padding: Literal["1", "2", "same"] | None = None
    drop_unknown: bool = False
    allow_shared_images: bool = False
    image_size: int | None = None
    crop_ratio: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    cache: bool = True
    workers: int | None = None
    label: str | None = None
    out: Path | None = None
    per_class: bool = False
    as_json: bool = False

    def check(self) -> None:
        """Raise `ConfigError` if options contradict each other, a value is out of range, or `--out` cannot be written."""
        if (self.data is None) == (self.prepared is None):
            hint = "--data takes a folder, --prepared one of the pipeline's"
            raise ConfigError("give the images with either --data or --prepared", hint)
        if self.data is None and (self.listed or self.workers is not None):
            which = "--list" if self.listed else "--workers"
            raise ConfigError(f"{which} has no effect with --prepared", f"omit {which}, or give --data")
        try:
            _Values.model_validate({key: getattr(self, key) for key in _Values.model_fields})
        except ValidationError as error:
            first = error.errors()[0]
            option = f"--{str(first['loc'][0]).replace('_', '-')}"
            raise ConfigError(f"{option} {first['input']!r}: {first['msg']}", f"omit {option} to use the default") from error
        _ = self.settings, self.name  # which say what is wrong with them
        if self.out is not None:
            hint = "--out names a file; `report` reads records/<name>/external.json"
            try:
                if self.out.exists() and not self.out.is_file():
                    raise ConfigError(f"--out {self.out}: is not a file", hint)
                if self.out.exists() and any(one and one.exists() and self.out.samefile(one) for one in (self.ckpt, self.listed)):
                    raise ConfigError(f"--out {self.out}: is the file that is being read", hint)
                files.check_writable(self.out.parent)  # before the work, not after it
            except OSError as error:
                raise ConfigError(f"--out {self.out}: {error.filename}: {error.strerror}", hint) from error

    @property
    def kinds(self) -> tuple[str, ...]:
        """The evaluations to run, in the order of their files."""
        known = evaluations.of_any_checkpoint()
        if self.protocol == "all":
            return tuple(kind for kind in known if getattr(evaluations.load(kind), "IN_ALL", False))
        if self.protocol not in known:
            raise ConfigError(f"--protocol {self.protocol}: no such evaluation", f"there are {', '.join(known)}, and all")
        return (self.protocol,)

    @property
    def settings(self) -> Frozen:
        """Every evaluation's Config, with the options that are given."""
        for option in self.options:
            if not any(option in getattr(evaluations.load(kind), "OPTIONS", ()) for kind in self.kinds):
                raise ConfigError(f"{option} has no effect with --protocol {self.protocol}", f"omit {option}")
        return evaluations.settings({kind: evaluations.with_options(kind, self.options) for kind in self.kinds})

    @property
    def name(self) -> str:
        """The record's name: its folder if `report` will look there, otherwise the checkpoint's file name in valid characters."""
        own = self.out.resolve().parent.name if self.out is not None and self.out.name == "external.json" else ""
        text = re.sub(r"[^a-z0-9.-]+", "-", (own or self.ckpt.name.split(".")[0]).lower()).lstrip("-.") or "checkpoint"
        if own and text != own:
            raise ConfigError(f"{self.out}: {own!r} is not a valid record name", "use small letters, digits, dots and hyphens")
        return text

    @property
    def command(self) -> str:
        """The command that gives the same numbers; paths are shortened to file names, because folders differ between machines."""
        places = {"ckpt": self.ckpt, "data": self.data, "prepared": self.prepared, "list": self.listed}
        given: list[tuple[str, Any]] = [(f"--{name}", path.name) for name, path in places.items() if path is not None]
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name not in _UNSEEN and value != one.default:
                text = ",".join(map(str, value)) if isinstance(value, tuple) else value
                given.append((f"--{one.name.replace('_', '-')}", text))
        for option, value in self.options.items():
            given += [(option, each) for each in (value if isinstance(value, tuple) else (value,))]
        return " ".join(["isd-repro evaluate", *(name if value is True else f"{name} {value}" for name, value in given)])


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Parse an option's value such as `0.485,0.456,0.406`; `ConfigError` if it is not a list of numbers."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text}: not numbers", "give one for each channel, as 0.485,0.456,0.406") from error


# --- the command ------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(request: Request, console: Console) -> None:
    """Score a checkpoint. Tables or JSON go to standard output, progress and notes to `console`.

    Raises:
        ConfigError: options contradict each other, or k is above the number of search images.
        DataError: the checkpoint or the images are missing, damaged or of the wrong form, or features are not finite.
        UserError: another process extracts the same features, or a linear head diverged.
        Preempted: a signal asked the command to stop; finished features are kept.
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
        manifest = opened.prepared.manifest
        copies = check_shared(
            manifest.shared,
            len(manifest.query),
            place=str(request.data or request.prepared),
            allow="give --allow-shared-images",
            allowed=request.allow_shared_images,
        )
        notes = [*checkpoint.notes, *opened.notes, *filter(None, [copies]), *_about(request, checkpoint, opened, frame)]
        for note in notes:
            progress.say(note)
        transform = {**asdict(frame), "pixels": opened.pixels}
        identities: dict[str, feature_cache.Identity] = {
            name: {
                "encoder_sha256": checkpoint.sha256,
                "encoder": name,
                "arch": checkpoint.arch,
                "place": [request.key, request.prefix, request.padding],
                "teacher_bn": request.teacher_bn if name == "teacher" else "own",
                "manifest": manifest.sha256,
                "transform": {**transform, "group": group_size(frame.size, best_device()), "resize": 2},
                "dtype": "float32",
                "arithmetic": {"device": best_device().type, "torch": torch.__version__},
            }
            for name in checkpoint.encoders
        }
        subject = Subject(
            name=request.name,
            profile="external",
            encoders=checkpoint.encoders,
            sha256=checkpoint.sha256,
            frame=frame,
            channels=checkpoint.channels,
            manifest=opened.prepared.identity,
            settings=request.settings,
            progress=progress,
            open_images=lambda: (opened.prepared, opened.reader),
            read_features=lambda subject: _features(subject, root, identities),
        )
        found: dict[str, EvaluationRecord] = {}
        for kind in sorted(request.kinds, key=evaluations.trains, reverse=True):  # the long ones say first how long
            config = getattr(subject.settings, kind)
            asked, outcome = stage.settings(kind, subject, config), evaluations.load(kind).evaluate(subject, config)
            for note in outcome.notes:
                progress.say(note)
            notes += outcome.notes
            digest = feature_cache.digest(root, identities)
            record = stage.record_of(kind, subject, outcome, asked, digest, time.monotonic() - started)
            assert isinstance(record, EvaluationRecord)
            found[kind] = record
        same = [name for name, rows in subject.features["search"].items() if feature_cache.same(rows)]
    collapsed = "features of all images are the same (collapsed), so its numbers are those of chance"
    warnings = tuple(f"{name}: {collapsed}" for name in same)
    for warning in warnings:
        progress.say(warning)
    whole = ExternalRecord(
        name=request.name,
        label=request.label or request.name,
        file=printable(request.ckpt.name),
        sha256=checkpoint.sha256,
        layout=checkpoint.layout,
        arch=checkpoint.arch,
        teacher_bn=request.teacher_bn,
        transform={**transform, "channels": checkpoint.channels, "dtype": "float32"},
        command=printable(request.command),
        warnings=warnings,
        evaluations=tuple(found[kind] for kind in request.kinds),
        provenance=describe(time.monotonic() - started),
    )
    if request.out is not None:
        write_record(request.out, whole)
        progress.say(f"record written to {request.out}")
    _print(request, whole, notes)


def _features(subject: Subject, root: Path, identities: Mapping[str, feature_cache.Identity]) -> SplitFeatures:
    """Features of both splits by encoder, memory-mapped, read from the cache or computed."""
    splits = {"search": subject.split("search"), "query": subject.split("query")}
    kept, total = 0, sum(map(len, splits.values()))

    def keep(count: int) -> None:
        nonlocal kept
        kept += count
        bar.advance(count)

    def half(count: int) -> None:
        """Count half of the work on these images: making their views, or the encoder's forward pass."""
        bar.advance(count / 2)

    with subject.progress.task("extracting features") as bar:
        views = {
            name: (eval_loader.centred(subject.reader, split.index, subject.frame, subject.device, half), len(split))
            for name, split in splits.items()
        }
        bar.begin(total)
        found = feature_cache.stream(root, subject.encoders, identities, views, subject.device, half, keep)
    if kept:
        subject.progress.say(f"features of {kept} of {total} images were there from before")
    return found


# --- what is evaluated, and on what -------------------------------------------------------------------------------------


def frame_of(request: Request, checkpoint: Checkpoint) -> Frame:
    """The evaluation view: from the options, otherwise from the file, otherwise the paper's values."""
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
    with (
        progress.task("hashing images") as bar,
        image_folder.open_folder(
            request.data, channels, workers=request.workers, listed=request.listed, begin=bar.begin, advance=bar.advance
        ) as found,
    ):
        bar.close()
        yield found


def _about(request: Request, checkpoint: Checkpoint, opened: ImageSet, frame: Frame) -> Iterator[str]:
    identity = opened.prepared.identity
    sizes = f"{identity.search} labelled images to search or fit, {identity.query} queries, {len(identity.classes)} classes"
    yield f"images: {identity.dataset}, {sizes}, manifest {identity.sha256[:16]}"
    yield f"view: short side to {frame.short_side}, central {frame.size} x {frame.size}"
    if small := int((opened.reader.sizes.amin(dim=1) < frame.short_side).sum()):
        yield f"{small} of {len(opened.reader.sizes)} images have a short side below {frame.short_side} and are enlarged to it"
    stated = request.image_size or checkpoint.image_size
    if stated is None and ("-small" in checkpoint.arch or "narrow" in checkpoint.arch):
        hint = "--image-size gives the size that it was trained at"
        yield f"the encoder has a stem for small images and gets {frame.size} pixels; {hint}"


@contextmanager
def _cache(request: Request) -> Iterator[Path]:
    """The folder of cached features, outside DVC like all resume state; with it an interrupted evaluation can continue."""
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
        raise Preempted(message, "run the same command again; it continues with them") from error


# --- what comes out -----------------------------------------------------------------------------------------------------


def _print(request: Request, record: ExternalRecord, notes: Sequence[str]) -> None:
    scores = [score for one in record.evaluations for score in one.scores]
    manifest = record.evaluations[0].manifest
    classes = summary.per_class(record.evaluations) if request.per_class else []
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
    summary.show_scores(out, title, scores)
    if classes:
        summary.show_classes(out, classes)
    for one in record.evaluations:
        text = f"{evaluations.title(one.kind)}: {one.protocol}. {evaluations.note(one.kind)}"
        out.print(printable(text.strip()), markup=False, soft_wrap=True)
    chance = f"Chance is {100 / len(manifest.classes):.2f} % top-1 ({len(manifest.classes)} classes)."
    out.print(f"{chance} Intervals are over the queries, for this encoder.")
