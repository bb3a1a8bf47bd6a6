"""What an encoder answers now on its run's own images, against every stored prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isd_repro.config.layout import Layout
from isd_repro.config.params import FewLabel, Linear
from isd_repro.data import eval_loader
from isd_repro.data.eval_loader import Frame, StoreReader
from isd_repro.data.labelled import Labelled, labelled, percent
from isd_repro.data.manifests import Prepared, Split
from isd_repro.evaluations import replay
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import EncoderIdentity
from isd_repro.evaluations.extract import load_features
from isd_repro.evaluations.heads import duration, pace
from isd_repro.evaluations.linear import OnEpoch, TrainBatches
from isd_repro.evaluations.replay import Answers, Replay
from isd_repro.provenance import describe
from isd_repro.records import CurveRecord, EvaluationRecord, unpack_labels
from isd_repro.report.records import RunRecords
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.stages.verify.walk import RESTORE, Walk


@dataclass(frozen=True)
class Subject:
    """A run whose encoder file is here and is the one that its records name."""

    name: str
    found: RunRecords
    encoders: Mapping[str, nn.Module]
    identity: EncoderIdentity

    @property
    def frame(self) -> Frame:
        """How its encoders see an image."""
        one = self.identity
        return Frame(one.image_size, one.crop_ratio, one.mean, one.std)


def own_images(walk: Walk, subject: Subject, opened: Prepared) -> None:
    """Features and nearest neighbours anew, and the linear heads where they are asked for, each prediction compared."""
    name, found = subject.name, subject.found
    few = _labelled(walk, subject, opened) if found.few_label else {}
    ks = tuple(found.knn.record.settings["k"]) if found.knn else (1,)
    try:
        given = neighbours(walk, f"{name}: features", subject.encoders, subject.frame, opened, ks)
    except (ConfigError, DataError) as error:
        walk.fault(walk.layout.encoder(name), "features", error.message, "features that can be searched", error.hint, name)
        return
    _note_features(walk, subject, given)
    if found.knn is not None:
        compare(walk, name, found.knn.record, Answers(given.predictions))
    if not walk.asked.linear:
        return
    search, reader = opened.split("search"), StoreReader(opened.store)
    heads = _Heads(walk, subject, given, reader, opened.split("query").label, len(opened.identity.classes))
    if found.linear is not None:
        compare(walk, name, found.linear.record, heads.linear(found.linear.record, search))
    if found.few_label is not None and few:
        compare(walk, name, found.few_label.record, heads.few_labels(found.few_label.record, few))


def neighbours(
    walk: Walk, title: str, encoders: Mapping[str, nn.Module], frame: Frame, opened: Prepared, ks: tuple[int, ...]
) -> Replay:
    """Features of both splits, and what their nearest neighbours answer. Raises as `replay.neighbours`."""
    device, reader = best_device(), StoreReader(opened.store)
    splits = {"search": opened.split("search"), "query": opened.split("query")}
    views = {which: (eval_loader.centred(reader, split.index, frame, device), len(split)) for which, split in splits.items()}
    with walk.progress.task(title) as bar:
        bar.begin(sum(len(split) for split in splits.values()))
        return replay.neighbours(encoders, views, splits["search"].label, ks, device, bar.advance)


# --- heads --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """What the linear heads of one run share."""

    walk: Walk
    subject: Subject
    given: Replay
    reader: StoreReader
    label: torch.Tensor  # of the queries
    classes: int

    def linear(self, record: EvaluationRecord, search: Split) -> Answers:
        """The heads of stage `linear`."""
        settings = _settings(record)
        batches = eval_loader.augmented(self.reader, search, self.subject.frame, settings, best_device())
        with self._timed("linear", settings, batches, len(search)) as advance:
            return replay.heads(
                self.subject.encoders, self.given, self.label, self.classes, batches, settings, best_device(), advance
            )

    def few_labels(self, record: EvaluationRecord, few: Mapping[str, Labelled]) -> Answers:
        """Those of stage `few_label`, of every share."""
        settings, found = _settings(record), Answers({})
        for share, part in few.items():
            batches = eval_loader.augmented(self.reader, part.split, self.subject.frame, settings, best_device())
            with self._timed(f"few labels, {share} %", settings, batches, len(part.at)) as advance:
                one = replay.few_labels(
                    self.subject.encoders,
                    self.given,
                    part.at,
                    share,
                    self.label,
                    self.classes,
                    batches,
                    settings,
                    best_device(),
                    advance,
                )
            found.predictions.update(one.predictions)
            found.choices.update(one.choices)
        return found

    def _timed(self, what: str, settings: Linear, batches: TrainBatches, count: int) -> _Bar:
        """Say how long it will take, then show it."""
        expected = pace(self.subject.encoders, batches, best_device()) * settings.epochs * count
        title = f"{self.subject.name}: {what}"
        self.walk.progress.say(f"{title} again, {settings.epochs} epochs, about {duration(expected)}")
        return _Bar(self.walk, f"{title}: epochs", settings.epochs)


class _Bar:
    """A bar of epochs."""

    def __init__(self, walk: Walk, title: str, epochs: int) -> None:
        self._task, self._epochs = walk.progress.task(title), epochs

    def __enter__(self) -> OnEpoch:
        bar = self._task.__enter__()
        bar.begin(self._epochs)
        return lambda row: bar.advance()

    def __exit__(self, *error: Any) -> None:
        self._task.__exit__(*error)


def _settings(record: EvaluationRecord) -> Linear:
    return Linear.model_validate({key: value for key, value in record.settings.items() if key in Linear.model_fields})


def _labelled(walk: Walk, subject: Subject, opened: Prepared) -> dict[str, Labelled]:
    """The labelled images by share, held against what the record says of them; nothing where they are not to be had."""
    assert subject.found.few_label is not None
    record, name = subject.found.few_label.record, subject.name
    path, found = walk.layout.record(name, "few_label"), {}
    for fraction in record.settings["fractions"]:
        share = percent(fraction)
        said = record.settings["labelled"][share]
        wanted = walk.params.evaluation.few_label.lists_env if said["source"] != "drawn" else ""
        settings = FewLabel(lists_env=wanted, seed=record.settings["draw_seed"])
        try:
            part = labelled(opened, fraction, settings)
        except DataError as error:
            walk.note(f"{name}: the labelled images ({share} %) cannot be read: {error.message}")
            return {}
        if part.source != said["source"]:
            where = f"set {wanted}" if wanted else "evaluation.few_label.lists_env names no variable"
            walk.note(f"{name}: list {said['source']} is not here ({where}), so few labels are not re-evaluated")
            return {}
        wrong = [key for key, value in part.facts().items() if said.get(key) != value]
        for key in wrong:
            truth = f"{part.facts()[key]}, as the images and the draw say"
            walk.fault(path, f"settings.labelled.{share}.{key}", said.get(key), truth, RESTORE, name)
        if wrong:
            return {}
        found[share] = part
    return found


# --- comparison ---------------------------------------------------------------------------------------------------------


def _note_features(walk: Walk, subject: Subject, given: Replay) -> None:
    path = walk.layout.features(subject.name)
    if path.is_file():
        try:
            stored = load_features(path, next(iter(subject.found.parts.values())).encoder_sha256)
        except DataError:
            return  # named before
        far = replay.farthest(given, stored)
        if far is None or far > 0:
            what = "have another form" if far is None else f"differ by {far:.2g} at most"
            walk.notes.append(f"{subject.name}: features computed here {what} from {walk.shown(path)}")


def compare(walk: Walk, name: str, record: EvaluationRecord, given: Answers) -> None:
    """Every stored prediction and choice against the encoder's; what another arithmetic explains leaves the verdict alone."""
    classes, place = record.manifest.classes, place_of(walk.layout, name, record)
    same, alike = same_arithmetic(record), True
    for key, packed in sorted(record.predictions.items()):
        stored, now = unpack_labels(packed), given.predictions.get(key)
        encoder, metric = key.split("/")
        if now is None:
            said = f"none: the encoder file has no {key}"
            walk.fault(place.file, f"{place.prefix}predictions[{key!r}]", "predictions", said, "restore it", name)
        elif stored.equal(now):
            walk.replayed.add((name, encoder, metric + place.suffix))
            continue
        elif len(stored) == len(now):
            other = (stored != now).nonzero()[:, 0]
            at, share = int(other[0]), len(other) / len(now)
            said = f"{len(other)} of {len(now)} predictions differ"
            if not same and share <= replay.TOLERATED:
                stays = "this machine or torch is not the record's, so it stays recomputed"
                walk.notes.append(f"{name}: {place.prefix}{said} in {key}; {stays}")
            else:
                truth = f"{classes[int(now[at])]}, as the encoder here answers ({said})"
                what = f"{place.prefix}predictions[{key!r}][{at}]"
                walk.fault(place.file, what, classes[int(stored[at])], truth, RESTORE, name)
        alike = False
    for path, value in given.choices.items():
        stated = _at(record.settings, path)
        if alike and stated != value:
            what = f"{place.prefix}settings.{'.'.join(path)}"
            walk.fault(place.file, what, stated, f"{value}, as the encoder here gives", RESTORE, name)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def same_arithmetic(record: EvaluationRecord | CurveRecord) -> bool:
    """Whether this machine can be expected to give a record's bits."""
    here = describe(0.0)
    return replay.same_arithmetic(here.machine, here.versions, record.provenance)


@dataclass(frozen=True)
class Place:
    """Where an evaluation stands: its file, what its keys begin with there, and what its metrics end with in a report."""

    file: Path
    prefix: str = ""
    suffix: str = ""


def place_of(layout: Layout, name: str, record: EvaluationRecord) -> Place:
    """A run's own evaluations have files of their own; those on other data sets share one."""
    path, key = layout.record(name, record.kind), record.manifest.subset
    return Place(path, f"{key}: ", f"-{key}") if record.kind == "transfer" else Place(path)
