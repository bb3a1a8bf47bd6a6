"""Stage `linear`: a run's encoders, features and labelled images in, a record of its linear scores out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from isd_repro import artifacts
from isd_repro.artifacts import EvaluationRecord, Score
from isd_repro.config import Layout, find_run
from isd_repro.data import images
from isd_repro.data.images import Frame, StoreReader
from isd_repro.data.prepared import Prepared, open_prepared
from isd_repro.evals import linear as protocol
from isd_repro.evals import scores as shown
from isd_repro.evals.arithmetic import best_device
from isd_repro.evals.encoders import EncoderIdentity, check_manifest, load_encoders
from isd_repro.evals.extract import load_features
from isd_repro.evals.linear import Outcome, Task, TrainBatches
from isd_repro.params import Linear, Params
from isd_repro.protocols import Tracker
from isd_repro.tracking import open_tracker


def linear(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Train and score a linear head on every encoder of a run.

    Raises:
        ConfigError: no such run, or settings called `paper` that are not the paper's.
        DataError: a file is missing, damaged, or made from other images or another encoder.
        UserError: a head diverged.
    """
    started = time.monotonic()
    run = find_run(params, name)
    settings = params.evaluation.linear
    protocol.check_protocol(settings)
    encoder_sha256 = artifacts.sha256_file(layout.encoder(name))
    features = load_features(layout.features(name), encoder_sha256)
    encoders, identity = load_encoders(layout.encoder(name))
    prepared = open_prepared(layout.prepared(run.data.subset))
    check_manifest(layout.encoder(name), identity.manifest, prepared.identity.sha256)
    device = best_device()
    task = Task(
        search=features.search,
        query=features.query,
        query_label=features.query_label,
        classes=len(prepared.identity.classes),
        train_batches=augmented(prepared, identity, settings, device),
    )
    config = settings.model_dump(mode="json")
    names = {"run_id": f"{params.profile}-{name}-linear", "group": f"{params.profile}-{name}", "job_type": "linear"}
    bar = Progress(console=console, disable=not console.is_terminal)
    with bar, open_tracker(None, tracking=params.tracking, layout_root=layout.root, config=config, **names) as tracker:
        outcomes = protocol.train(encoders, task, settings, device, _reporter(name, settings, tracker, bar, console))
        scores = _score(outcomes, features.query_label, prepared.groups(features.query_label))
        tracker.log({"epoch": settings.epochs, **shown.row(scores)})
    record = EvaluationRecord(
        kind="linear",
        profile=params.profile,
        run=name,
        protocol=settings.protocol,
        settings={**config, "best_epoch": {encoder: out.best_epoch for encoder, out in outcomes.items()}},
        manifest=prepared.identity,
        encoder_sha256=encoder_sha256,
        features_sha256=artifacts.sha256_file(layout.features(name)),
        scores=tuple(scores),
        labels=artifacts.pack_labels(features.query_label),
        predictions={
            f"{encoder}/{metric}": artifacts.pack_labels(predicted)
            for encoder, out in outcomes.items()
            for metric, predicted in _metrics(out).items()
        },
        provenance=artifacts.provenance(time.monotonic() - started),
    )
    artifacts.write_record(layout.record(name, "linear"), record)
    for score in scores:
        console.print(shown.line(name, score), highlight=False, soft_wrap=True)


def augmented(prepared: Prepared, identity: EncoderIdentity, settings: Linear, device: torch.device) -> TrainBatches:
    """Batches of augmented labelled images: all of them once an epoch, a pure function of (seed, epoch)."""
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    return images.augmented(StoreReader(prepared.store), prepared.split("search"), frame, settings, device)


def _reporter(name: str, settings: Linear, tracker: Tracker, bar: Progress, console: Console) -> protocol.OnEpoch:
    task = bar.add_task(f"{name} linear", total=settings.epochs)

    def on_epoch(row: Mapping[str, float]) -> None:
        tracker.log(row)
        bar.update(task, completed=row["epoch"])
        if not console.is_terminal:
            values = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
            console.print(f"{name} linear epoch {int(row['epoch'])}/{settings.epochs} {values}", highlight=False, soft_wrap=True)

    return on_epoch


def _metrics(outcome: Outcome) -> dict[str, Tensor]:
    return {"linear-last": outcome.last, "linear-best": outcome.best}


def _score(outcomes: Mapping[str, Outcome], label: Tensor, groups: Mapping[str, Tensor]) -> list[Score]:
    found: list[Score] = []
    for encoder, outcome in outcomes.items():
        for metric, predicted in _metrics(outcome).items():
            found += artifacts.score(cast("Literal['student', 'teacher']", encoder), metric, predicted, label, groups)
    return found
