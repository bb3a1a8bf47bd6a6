"""Other data sets: are the images and labels those of the record, and do the classifiers give its predictions again?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from isd_repro.config.params import Transfer, TransferName
from isd_repro.data import transfer_sets
from isd_repro.data.eval_loader import Frame
from isd_repro.data.transfer_sets import Division, Opened, TransferImages
from isd_repro.evaluations import replay
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.records import ManifestIdentity, TargetEvaluation
from isd_repro.report.evaluation import Evaluation
from isd_repro.report.records import RunRecords
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.stages.verify.again import Subject, compare
from isd_repro.stages.verify.walk import RESTORE, Walk

_BLOCK = 256  # images asked for at a time


@dataclass(frozen=True, eq=False)
class Target:
    """A data set that is here and is the record's; `label` is of all its images, int64, N."""

    opened: Opened
    label: Tensor
    division: Division


def declared(walk: Walk, name: str, found: RunRecords) -> None:
    """What the project's table of sets says of each, against the record: neither images nor encoder are needed."""
    for key, one in (found.transfer.sets if found.transfer else {}).items():
        spec = transfer_sets.SETS.get(cast("TransferName", key))
        if spec is None or not isinstance(one.record, TargetEvaluation):
            continue  # a set that the settings do not name, which is a fault of its own
        stated, rule = one.record.manifest, one.record.manifest.rule
        facts = (
            ("manifest.dataset", stated.dataset, spec.title),
            ("metric", one.record.metric, spec.metric),
            ("manifest.rule.source", rule.get("source"), f"torchvision.datasets.{spec.reader}"),
            ("manifest.rule.seed", rule.get("seed"), walk.params.evaluation.transfer.seed),
        )
        for field, ours, theirs in facts:
            if ours != theirs:
                path = walk.layout.record(name, "transfer")
                walk.fault(path, f"{key}: {field}", ours, f"{theirs}, as docs/transfer.md lists it", RESTORE, name)


def of_run(walk: Walk, name: str, found: RunRecords) -> dict[TransferName, Target]:
    """The sets of a run's record whose images, division and labels are what the record says."""
    right: dict[TransferName, Target] = {}
    for key, one in (found.transfer.sets if found.transfer else {}).items():
        target = _read(walk, name, cast("TransferName", key), one)
        if target is not None:
            right[cast("TransferName", key)] = target
    return right


def _read(walk: Walk, name: str, key: TransferName, one: Evaluation) -> Target | None:
    """A set whose identity, division and labels are the record's."""
    path = walk.layout.record(name, "transfer")
    try:
        found = _opened(walk, name, key, one.record.manifest.rule.get("seed", 0))
    except DataError as error:
        walk.fault(path, f"{key}: images", error.message, "those that the run was asked", error.hint, name)
        return None
    if found is None:
        return None
    target, here = found
    if here != one.record.manifest:
        ours, theirs = one.record.manifest.model_dump(mode="json"), here.model_dump(mode="json")
        field = next(field for field in ("sha256", *ours) if ours[field] != theirs[field])
        said = f"{theirs[field]}, as the images below {target.opened.spec.root_env} say"
        hint = "these are other images or classes than the run was asked: name the folder that it saw, or restore the record"
        walk.fault(path, f"{key}: manifest.{field}", ours[field], said, hint, name)
        return None
    truth = target.label[target.division.test]
    if not one.label.equal(truth):
        at = int((one.label != truth).nonzero()[0])
        found_here, said = (target.opened.classes[int(label[at])] for label in (one.label, truth))
        walk.fault(path, f"{key}: labels[{at}]", found_here, f"{said}, as the set's images say", RESTORE, name)
        return None
    return target


def _opened(walk: Walk, name: str, key: TransferName, seed: int) -> tuple[Target, ManifestIdentity] | None:
    """A set with every image read, once for all runs that see it alike; None, with a note, where it is not here."""
    config = walk.params.runs[name]
    frame, channels = Frame(config.data.image_size, 1.0, config.data.mean, config.data.std), config.backbone.channels
    if (key, channels, seed) in walk.targets:
        kept: tuple[Target, ManifestIdentity] = walk.targets[key, channels, seed]
        return kept
    try:
        opened = transfer_sets.open_set(key)
    except UserError as error:
        walk.note(f"transfer set {key} is not here, so its images and labels are not read: {error.message}")
        return None
    with _reader(opened, frame, channels) as images, walk.progress.task(f"images of {key}") as bar:
        bar.begin(len(images))
        for block in torch.arange(len(images)).split(_BLOCK):
            images(block)
            bar.advance(len(block))
    division = transfer_sets.divide(key, opened.part, images.label, seed)
    found = Target(opened, images.label, division), transfer_sets.identity(key, images, opened, division, seed)
    walk.targets[key, channels, seed] = found
    return found


@contextmanager
def _reader(opened: Opened, frame: Frame, channels: int) -> Iterator[TransferImages]:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield TransferImages(opened, frame, channels, pool)


def again(walk: Walk, subject: Subject, sets: dict[TransferName, Target]) -> None:
    """Features and classifiers of every set anew, where they are asked for."""
    if not walk.asked.linear or subject.found.transfer is None:
        return
    settings = Transfer.model_validate(subject.found.transfer.record.settings)
    for key, target in sets.items():
        record = subject.found.transfer.sets[key].record
        assert isinstance(record, TargetEvaluation)
        with (
            _reader(target.opened, subject.frame, subject.identity.backbone.channels) as images,
            walk.progress.task(f"{subject.name}: transfer to {key}: images") as bar,
        ):
            bar.begin(len(images))
            where = (target.division.train, target.division.val, target.division.test)
            classes, device = len(target.opened.classes), best_device()
            try:
                given = replay.transfer(
                    subject.encoders, images, target.label, where, classes, record.metric, settings, device, bar.advance
                )
            except DataError as error:
                path = walk.layout.encoder(subject.name)
                walk.fault(path, f"features of {key}", error.message, "finite features", error.hint, subject.name)
                continue
        compare(walk, subject.name, record, given)
