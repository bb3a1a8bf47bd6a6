"""Stage `transfer`: a run's encoders and other data sets in, a record of its classifiers on their features out.

Finished data sets lie in `.state/` until all are there, so an interrupted stage goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params, TransferName
from isd_repro.config.reader import find_run, fingerprint
from isd_repro.data import manifests, transfer_sets
from isd_repro.data.eval_loader import Frame
from isd_repro.data.transfer_sets import TransferImages
from isd_repro.evaluations import summary
from isd_repro.evaluations import transfer as protocol
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import EncoderIdentity, check_manifest, load_encoders
from isd_repro.evaluations.extract import features
from isd_repro.provenance import describe, remember_code, shown_provenance, source_hash
from isd_repro.records import (
    Score,
    TargetEvaluation,
    TargetsRecord,
    mean_per_class,
    pack_labels,
    read_record,
    score_groups,
    write_record,
)
from isd_repro.runtime.errors import ConfigError
from isd_repro.runtime.files import sha256_file
from isd_repro.runtime.progress import Progress
from isd_repro.tracking import names, open_stage

METRIC = "transfer"
PROTOCOL = "logistic regression on L2-normalised, standardised features; C chosen on validation images, retrained with them"
_SCORES: Mapping[transfer_sets.Metric, protocol.Score] = {
    "top1": lambda predicted, label: 100.0 * float((predicted == label).double().mean()),
    "mean-per-class": mean_per_class,
}


@dataclass(frozen=True)
class _Asked:
    """What every set of one run shares."""

    name: str
    params: Params
    encoders: Mapping[str, nn.Module]
    identity: EncoderIdentity
    encoder_sha256: str
    device: torch.device
    progress: Progress


def transfer(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Score every encoder of a run on every target set of the profile.

    Raises:
        ConfigError: no such run, or no target sets.
        DataError: a file or a target set is missing or damaged; the encoder was made from other images than are prepared.
        UserError: a target set needs a package that is not installed.
    """
    remember_code()
    run = find_run(params, name)
    settings = params.evaluation.transfer
    if not settings.sets:
        raise ConfigError("evaluation.transfer.sets is empty", "name the target data sets; docs/transfer.md lists them")
    encoders, identity = load_encoders(layout.encoder(name))
    manifest = manifests.read_header(layout.prepared(run.data.subset)).identity
    check_manifest(layout.encoder(name), identity.manifest, manifest.sha256)
    for key in settings.sets:  # all of them, before the first is worked on
        transfer_sets.root_of(key)
    sha256 = sha256_file(layout.encoder(name))
    asked = _Asked(name, params, encoders, identity, sha256, best_device(), Progress(console))
    stated = settings.model_dump(mode="json")
    parts = {"transfer": stated, "encoder": sha256, "source": source_hash(), "profile": params.profile, "run": name}
    done = layout.state(fingerprint(parts))
    evaluations = tuple(_kept(done / f"{key}.json", key, asked) for key in settings.sets)
    record = TargetsRecord(
        kind="transfer",
        profile=params.profile,
        run=name,
        protocol=PROTOCOL,
        settings=stated,
        manifest=manifest,
        encoder_sha256=sha256,
        evaluations=evaluations,
        provenance=describe(sum(one.provenance.seconds for one in evaluations)),
    )
    write_record(layout.record(name, "transfer"), record)
    tracked = names.evaluation_identity(sha256, stated)
    config = {**stated, **shown_provenance()}
    with open_stage("transfer", name, params, layout, identity=tracked, config=config) as tracker:
        tracker.log({"epoch": run.optim.epochs, **{key: value for one in evaluations for key, value in one.row().items()}})
        for one in evaluations:
            tracker.log_table(summary.class_key(one), *summary.class_rows(one))
    shutil.rmtree(done, ignore_errors=True)


def _kept(path: Path, key: TransferName, asked: _Asked) -> TargetEvaluation:
    """What an interrupted stage has left of a set, else the set evaluated and left there."""
    if path.is_file():
        evaluation = read_record(path, TargetEvaluation)
    else:
        evaluation = _evaluate(key, asked)
        write_record(path, evaluation)
    for line in _lines(evaluation):
        asked.progress.say(line)
    return evaluation


def _evaluate(key: TransferName, asked: _Asked) -> TargetEvaluation:
    """One target set: every image is read once for all encoders."""
    started = time.monotonic()
    settings = asked.params.evaluation.transfer
    opened = transfer_sets.open_set(key)
    one = asked.identity
    frame = Frame(one.image_size, one.crop_ratio, one.mean, one.std)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        images = TransferImages(opened, frame, one.backbone.channels, pool)
        with asked.progress.task(f"{asked.name} {key}: images") as bar:
            bar.begin(len(images))
            found = features(asked.encoders, images, len(images), asked.device, bar.advance)
    division = transfer_sets.divide(key, opened.part, images.label, settings.seed)
    label = images.label[division.test]
    scores: list[Score] = []
    predictions: dict[str, Tensor] = {}
    chosen: dict[str, Any] = {}
    for encoder, rows in found.items():
        answer = protocol.answer(
            (rows[division.train], images.label[division.train]),
            (rows[division.val], images.label[division.val]),
            rows[division.test],
            len(opened.classes),
            _SCORES[opened.spec.metric],
            settings,
            asked.device,
        )
        predictions[f"{encoder}/{METRIC}"] = answer.predicted
        scores += score_groups(
            cast("Literal['student', 'teacher']", encoder), METRIC, answer.predicted, label, {"all": torch.ones_like(label) > 0}
        )
        chosen[encoder] = _facts(answer)
    return TargetEvaluation(
        kind="transfer",
        profile=asked.params.profile,
        run=asked.name,
        protocol=PROTOCOL,
        settings={"chosen": chosen},
        manifest=transfer_sets.identity(key, images, opened, division, settings.seed),
        encoder_sha256=asked.encoder_sha256,
        features_sha256=_digest(found),
        scores=tuple(scores),
        labels=pack_labels(label),
        predictions={key: pack_labels(predicted) for key, predicted in predictions.items()},
        provenance=describe(time.monotonic() - started),
        metric=opened.spec.metric,
        mean_per_class={key: mean_per_class(predicted, label) for key, predicted in predictions.items()},
    )


def _facts(answer: protocol.Answer) -> dict[str, Any]:
    """A choice as the record keeps it; `edge` says that the grid may have been too narrow."""
    scores = answer.choice.validation
    return {
        "c": answer.choice.c,
        "edge": scores.index(max(scores)) in (0, len(scores) - 1),
        "validation": max(scores),
        "unsolved": answer.choice.unsolved,
        "iterations": answer.iterations,
        "solved": answer.solved,
    }


def _digest(found: Mapping[str, Tensor]) -> str:
    """Sha256 over the features of all images by encoder."""
    hasher = hashlib.sha256()
    for encoder, rows in sorted(found.items()):
        hasher.update(f"{encoder}\n".encode() + rows.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def _lines(one: TargetEvaluation) -> list[str]:
    """One plain line for each encoder: both numbers, and the choice."""
    lines = []
    for score in one.scores:
        chosen = one.settings["chosen"][score.encoder]
        other = one.mean_per_class[f"{score.encoder}/{score.metric}"]
        how = f"C {chosen['c']:.3g} with {chosen['validation']:.1f} % of validation images"
        what = f"top-1 {score.top1:.1f} %, mean per class {other:.1f} % (n={score.n})"
        lines.append(f"{one.run} {score.encoder} {one.manifest.subset} {what}; {how}")
    return lines
