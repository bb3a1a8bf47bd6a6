"""Stage `few_label`: a run's encoders, features and a few labelled images in, a record of its linear scores out."""

from __future__ import annotations

import time
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from isd_repro.config.layout import Layout
from isd_repro.config.params import Linear, Params
from isd_repro.config.reader import find_run
from isd_repro.data import eval_loader
from isd_repro.data.eval_loader import Frame, StoreReader
from isd_repro.data.labelled import Labelled, labelled, percent
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.evaluations import few_label as protocol
from isd_repro.evaluations import linear, summary
from isd_repro.evaluations import scores as shown
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import check_manifest, load_encoders
from isd_repro.evaluations.extract import load_features
from isd_repro.evaluations.linear import Outcome, Task
from isd_repro.provenance import describe, shown_provenance
from isd_repro.records import EvaluationRecord, Score, pack_labels, score_groups, write_record
from isd_repro.runtime.files import sha256_file
from isd_repro.runtime.progress import Progress
from isd_repro.tracking import names, open_stage


def few_label(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Train and score a linear head on every encoder of a run, once for each share of labelled images.

    Raises:
        ConfigError: no such run, or settings called `paper` that are not the paper's.
        DataError: a file or a list is missing, damaged, or made from other images or another encoder.
        UserError: a head diverged.
    """
    started = time.monotonic()
    run = find_run(params, name)
    settings, few = params.evaluation.linear, params.evaluation.few_label
    linear.check_protocol(settings)
    encoder_sha256 = sha256_file(layout.encoder(name))
    features = load_features(layout.features(name), encoder_sha256)
    encoders, identity = load_encoders(layout.encoder(name))
    prepared = open_prepared(layout.prepared(run.data.subset), layout.verified)
    check_manifest(layout.encoder(name), identity.manifest, prepared.identity.sha256)
    parts = {percent(fraction): labelled(prepared, fraction, few) for fraction in few.fractions}
    reader, frame = StoreReader(prepared.store), Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    device, progress = best_device(), Progress(console)
    found: dict[tuple[str, str], Tensor] = {}
    best: dict[str, dict[str, int]] = {}
    for share, part in parts.items():
        progress.say(f"{name} few labels: {len(part.at)} images, {share} %, {part.source}")
        task = Task(
            search={encoder: rows[part.at] for encoder, rows in features.search.items()},
            query=features.query,
            query_label=features.query_label,
            classes=len(prepared.identity.classes),
            train_batches=eval_loader.augmented(reader, part.split, frame, settings, device),
        )
        outcomes = _train(f"{name} few labels, {share} %: epochs", encoders, task, settings, device, progress)
        best[share] = {encoder: out.best_epoch for encoder, out in outcomes.items()}
        for encoder, out in outcomes.items():
            found |= {(encoder, metric): kept for metric, kept in protocol.answers(out, features.query_label, share).items()}
    stated = _settings(params, parts)
    scores = _score(found, features.query_label, prepared)
    record = EvaluationRecord(
        kind="few_label",
        profile=params.profile,
        run=name,
        protocol=f"linear, {settings.protocol}, on the labelled images alone",
        settings={**stated, "best_epoch": best},
        manifest=prepared.identity,
        encoder_sha256=encoder_sha256,
        features_sha256=sha256_file(layout.features(name)),
        scores=tuple(scores),
        labels=pack_labels(features.query_label),
        predictions={"/".join(key): pack_labels(predicted) for key, predicted in found.items()},
        provenance=describe(time.monotonic() - started),
    )
    write_record(layout.record(name, "few_label"), record)
    tracked = names.evaluation_identity(encoder_sha256, stated)
    config = {**stated, **shown_provenance()}
    with open_stage("few_label", name, params, layout, identity=tracked, config=config) as tracker:
        tracker.log({"epoch": run.optim.epochs, **shown.row(scores)})
        tracker.log_table(summary.class_key(record), *summary.class_rows(record))
    for score in scores:
        progress.say(shown.line(name, score))


def _train(
    title: str, encoders: dict[str, nn.Module], task: Task, settings: Linear, device: torch.device, progress: Progress
) -> dict[str, Outcome]:
    with progress.task(title) as bar:
        bar.begin(settings.epochs)
        return linear.train(encoders, task, settings, device, lambda _: bar.advance())


def _settings(params: Params, parts: dict[str, Labelled]) -> dict[str, Any]:
    """All that two runs must share to stand in one table; the labelled images by their hash."""
    few = params.evaluation.few_label
    return {
        **params.evaluation.linear.model_dump(mode="json"),
        "fractions": list(few.fractions),
        "draw_seed": few.seed,
        "labelled": {share: part.facts() for share, part in parts.items()},
    }


def _score(found: dict[tuple[str, str], Tensor], label: Tensor, prepared: Prepared) -> list[Score]:
    groups = prepared.groups(label)
    rows: list[Score] = []
    for (encoder, metric), predicted in found.items():
        rows += score_groups(cast("Literal['student', 'teacher']", encoder), metric, predicted, label, groups)
    return rows
