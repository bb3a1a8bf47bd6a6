"""Command `evaluate`: one checkpoint of any origin and labelled images in, the paper's numbers for it out."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor

from isd_repro import checkpoints
from isd_repro.checkpoints import Checkpoint
from isd_repro.config.layout import state_root
from isd_repro.config.params import Linear
from isd_repro.data import eval_loader, image_folder
from isd_repro.data.eval_loader import Frame
from isd_repro.data.image_folder import ImageSet
from isd_repro.evaluations import heads, knn, linear, stream, summary
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.extract import BLOCK
from isd_repro.evaluations.request import MOST, Request
from isd_repro.provenance import describe
from isd_repro.records import EvaluationRecord, ExternalRecord, Score, pack_labels, score_groups, write_record
from isd_repro.runtime import files
from isd_repro.runtime.errors import ConfigError, Preempted, printable
from isd_repro.runtime.progress import Progress

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0.449,), (0.226,)  # their means, for an encoder of grey images that says nothing of its own
_SIZE, _CROP_RATIO = 224, 0.875
_ONCE = "once-"  # folders of features that are not kept


@dataclass
class _Result:
    """What has been found so far."""

    label: Tensor
    notes: list[str]
    scores: dict[str, list[Score]] = field(default_factory=dict)  # by kind
    predictions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)
    features: str = ""  # sha256
    warnings: list[str] = field(default_factory=list)  # what the record's reader should know, too


def evaluate(request: Request, console: Console) -> None:
    """Score a checkpoint; tables or JSON on standard output, progress and notes on `console`.

    Raises:
        ConfigError: options that contradict each other, or a k above the number of search images.
        DataError: the checkpoint or the images are missing, damaged, or not what they must be; features that are not finite.
        UserError: another process extracts the same features; a linear head diverged.
        Preempted: a signal asked to stop; finished features are kept.
    """
    started = time.monotonic()
    request.check()
    checkpoint = checkpoints.load(request.ckpt, request.which, arch=request.arch, teacher_bn=request.teacher_bn)
    progress = Progress(console)
    frame = frame_of(request, checkpoint)
    encoders = f"{checkpoint.arch}, layout {checkpoint.layout}, {', '.join(checkpoint.encoders)}"
    progress.say(f"{request.ckpt.name}: {encoders}, sha256 {checkpoint.sha256[:16]}")
    with ExitStack() as stack:
        root = stack.enter_context(_cache(request))
        opened = stack.enter_context(_images(request, checkpoint.channels, progress))
        result = _Result(opened.prepared.split("query").label, [*checkpoint.notes, *opened.notes, *_about(opened, frame)])
        for note in result.notes:
            progress.say(note)
        _check_k(request, len(opened.prepared.manifest.search))
        plan = _plan(request, checkpoint, opened, frame, progress) if request.protocol != "knn" else None
        features = _features(root, request, checkpoint, opened, frame, progress, result)
        if request.protocol != "linear":
            _neighbours(request, features, opened, result)
        if plan is not None:
            _linear(request, checkpoint, features, opened, plan, progress, result)
        record = _record(request, checkpoint, opened, frame, result, time.monotonic() - started)
    if request.out is not None:
        write_record(request.out, record)
        progress.say(f"record written to {request.out}")
    _print(request, record, result)


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


def _check_k(request: Request, search: int) -> None:
    if request.protocol != "linear" and max(request.ks) > search:
        message = f"{max(request.ks)} neighbours asked of {search} labelled images"
        raise ConfigError(message, "give smaller numbers with --k, or more train images")


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


# --- features and scores ------------------------------------------------------------------------------------------------

_Features = dict[str, dict[str, Tensor]]  # by split and encoder


def _features(
    root: Path,
    request: Request,
    checkpoint: Checkpoint,
    opened: ImageSet,
    frame: Frame,
    progress: Progress,
    result: _Result,
) -> _Features:
    device = best_device()
    identities = {
        name: {
            "encoder_sha256": checkpoint.sha256,
            "encoder": name,
            "arch": checkpoint.arch,
            "teacher_bn": request.teacher_bn if name == "teacher" else "own",
            "manifest": opened.prepared.identity.sha256,
            "transform": {**asdict(frame), "pixels": opened.pixels, "block": BLOCK},
            "dtype": "float32",
            "arithmetic": {"device": device.type, "torch": torch.__version__},
        }
        for name in checkpoint.encoders
    }
    splits = {"search": opened.prepared.split("search"), "query": opened.prepared.split("query")}
    views = {name: (eval_loader.centred(opened.reader, split.index, frame, device), len(split)) for name, split in splits.items()}
    kept = 0

    def keep(_: str, count: int) -> None:
        nonlocal kept
        kept += count
        bar.advance(count)

    total = sum(len(split) for split in splits.values())
    with progress.task("extracting features") as bar:
        bar.begin(total)
        found = stream.stream(root, checkpoint.encoders, identities, views, device, lambda _, count: bar.advance(count), keep)
    if kept:
        progress.say(f"features of {kept} of {total} images were there from before")
    result.features = stream.digest(root, identities)
    for name, rows in found["search"].items():
        if stream.same(rows):
            result.warnings.append(f"{name}: features of all images are the same (collapsed), so its numbers are those of chance")
            progress.say(result.warnings[-1])
    return found


def _neighbours(request: Request, features: _Features, opened: ImageSet, result: _Result) -> None:
    split = opened.prepared.split("search")
    groups = opened.prepared.groups(result.label)
    scores: list[Score] = []
    kept: dict[str, Tensor] = {}
    for name, search in features["search"].items():
        found = knn.predict(search, split.label, features["query"][name], request.ks, best_device())
        for k, predicted in found.items():
            kept[f"{name}/{k}-NN"] = predicted
            scores += score_groups(_encoder(name), f"{k}-NN", predicted, result.label, groups)
    result.scores["knn"], result.predictions["knn"] = scores, kept
    result.settings["knn"] = {"k": list(request.ks)}
    result.protocols["knn"] = f"{', '.join(f'{k}-NN' for k in request.ks)} exact float32, ties by lowest label"


_Plan = tuple[Linear, linear.TrainBatches]


def _plan(request: Request, checkpoint: Checkpoint, opened: ImageSet, frame: Frame, progress: Progress) -> _Plan:
    """Settings and views of the linear protocol; says how long it will take, before anything that takes long."""
    settings = heads.shortened(request.epochs)
    split = opened.prepared.split("search")
    batches = eval_loader.augmented(opened.reader, split, frame, settings, best_device())
    pace = heads.pace(checkpoint.encoders, batches, best_device())
    progress.say(
        f"linear: {settings.epochs} epochs of {len(split)} images, about {heads.duration(pace * settings.epochs * len(split))}"
        f" at {1 / pace:.1f} images a second"
    )
    return settings, batches


def _linear(
    request: Request,
    checkpoint: Checkpoint,
    features: _Features,
    opened: ImageSet,
    plan: _Plan,
    progress: Progress,
    result: _Result,
) -> None:
    settings, batches = plan
    device = best_device()
    split = opened.prepared.split("search")
    asked = heads.Asked(
        search=features["search"],
        search_label=split.label,
        query=features["query"],
        query_label=result.label,
        classes=len(opened.prepared.identity.classes),
        batches=batches,
        order=lambda epoch: eval_loader.order(len(split), settings, epoch),
    )
    with progress.task("linear epochs") as bar:
        bar.begin(settings.epochs)
        answer = heads.run(checkpoint.encoders, asked, settings, request.seeds, device, lambda row: bar.advance(1))
    groups = opened.prepared.groups(result.label)
    scores: list[Score] = []
    for (name, metric), predicted in answer.predictions.items():
        scores += score_groups(_encoder(name), metric, predicted, result.label, groups)
    for (name, metric), among in answer.among.items():
        hit = torch.where((among == result.label[:, None]).any(dim=1), result.label, -1)
        scores += score_groups(_encoder(name), f"{metric}-top5", hit, result.label, groups)
    result.scores["linear"] = heads.ordered(scores)
    result.predictions["linear"] = {"/".join(key): predicted for key, predicted in answer.predictions.items()}
    result.settings["linear"] = {**settings.model_dump(mode="json"), **answer.facts}
    result.protocols["linear"] = settings.protocol
    result.notes += answer.notes
    for note in answer.notes:
        progress.say(note)


def _encoder(name: str) -> Literal["student", "teacher"]:
    return cast("Literal['student', 'teacher']", name)


# --- what comes out -----------------------------------------------------------------------------------------------------


def _record(
    request: Request, checkpoint: Checkpoint, opened: ImageSet, frame: Frame, result: _Result, seconds: float
) -> ExternalRecord:
    name = request.name
    provenance = describe(seconds)
    return ExternalRecord(
        name=name,
        label=request.label or name,
        file=printable(request.ckpt.name),
        sha256=checkpoint.sha256,
        layout=checkpoint.layout,
        arch=checkpoint.arch,
        teacher_bn=request.teacher_bn,
        transform={**asdict(frame), "channels": checkpoint.channels, "dtype": "float32", "pixels": opened.pixels},
        command=printable(request.command),
        warnings=tuple(result.warnings),
        evaluations=tuple(
            EvaluationRecord(
                kind=cast("Literal['knn', 'linear']", kind),
                profile="external",
                run=name,
                protocol=result.protocols[kind],
                settings=result.settings[kind],
                manifest=opened.prepared.identity,
                encoder_sha256=checkpoint.sha256,
                features_sha256=result.features,
                scores=tuple(scores),
                labels=pack_labels(result.label),
                predictions={key: pack_labels(found) for key, found in result.predictions[kind].items()},
                provenance=provenance,
            )
            for kind, scores in result.scores.items()
        ),
        provenance=provenance,
    )


def _print(request: Request, record: ExternalRecord, result: _Result) -> None:
    every: Mapping[str, Tensor] = {key: found for kind in result.predictions.values() for key, found in kind.items()}
    scores = [score for kind in result.scores.values() for score in kind]
    manifest = record.evaluations[0].manifest
    classes = summary.per_class(every, result.label, manifest.classes) if request.per_class else []
    if request.as_json:
        about = record.model_dump(mode="json", exclude={"evaluations", "kind"})
        about |= {
            "images": manifest.model_dump(mode="json"),
            "scores": [{**score.model_dump(mode="json"), "top1": score.top1} for score in scores],
            "settings": result.settings,
            "protocols": result.protocols,
            "notes": [*result.notes, *result.warnings],
            **({"per_class": classes} if request.per_class else {}),
        }
        sys.stdout.write(json.dumps(about, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return
    out = Console(file=sys.stdout, highlight=False)
    title = f"{record.label}: {record.arch} ({record.layout}) on {manifest.dataset}, percent of queries"
    tables = [(title, summary.score_table(scores))]
    tables += [("By class, top-1 in percent", summary.class_table(classes))] if classes else []
    summary.show(out, tables)
