"""Stage `linear`: a run's encoders, features and labelled images in, a record of its linear scores out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, cast

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from isd_repro.config.layout import Layout
from isd_repro.config.params import Linear, Params
from isd_repro.config.reader import find_run
from isd_repro.data import eval_loader
from isd_repro.data.eval_loader import Frame, StoreReader
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.evaluations import linear as protocol
from isd_repro.evaluations import scores as shown
from isd_repro.evaluations import summary
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import EncoderIdentity, check_manifest, check_run, load_encoders
from isd_repro.evaluations.extract import Features, load_features
from isd_repro.evaluations.linear import Outcome, Task, TrainBatches
from isd_repro.interfaces import Tracker
from isd_repro.provenance import describe, shown_provenance
from isd_repro.records import EvaluationRecord, Score, pack_labels, score_groups, write_record
from isd_repro.runtime import ranks
from isd_repro.runtime.files import sha256_file
from isd_repro.tracking import names, open_stage


def linear(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Train and score a linear head on every encoder of a run.

    Several ranks share the forward passes and their views; rank 0 writes.

    Raises:
        ConfigError: no such run, or settings called `paper` that are not the paper's.
        DataError: a file is missing, damaged, or made from other images or another encoder.
        UserError: a head diverged.
    """
    started = time.monotonic()
    run = find_run(params, name)
    settings = params.evaluation.linear
    protocol.check_protocol(settings)
    hashes = tuple(sha256_file(path) for path in (layout.encoder(name), layout.features(name)))
    features = load_features(layout.features(name), hashes[0])
    encoders, identity = load_encoders(layout.encoder(name))
    check_run(layout.encoder(name), identity, name)
    with ranks.first_alone():
        prepared = open_prepared(layout.prepared(run.data.subset), layout.verified)
    check_manifest(layout.encoder(name), identity.manifest, prepared.identity.sha256)
    device = best_device()
    task = Task(
        search=features.search,
        query=features.query,
        query_label=features.query_label,
        classes=len(prepared.identity.classes),
        train_batches=augmented(prepared, identity, settings, device),
    )
    if ranks.rank() > 0:
        protocol.train(encoders, task, settings, device)
        return
    config = settings.model_dump(mode="json")
    made_of = names.evaluation_identity(hashes[0], config)
    shown_config = {**config, **shown_provenance()}
    bar = Progress(console=console, disable=not console.is_terminal)
    with bar, open_stage("linear", name, params, layout, identity=made_of, config=shown_config) as tracker:
        reporter = _Reporter(name, settings, tracker, bar, console)
        outcomes = protocol.train(encoders, task, settings, device, reporter)
        record = _record(name, params, prepared, hashes, features, outcomes, time.monotonic() - started)
        write_record(layout.record(name, "linear"), record)
        tracker.log({**reporter.last, **shown.row(record.scores)})  # over the last epoch's row, which it repeats
        tracker.log_table("per-class", *summary.class_rows(record))
    for score in record.scores:
        console.print(shown.line(name, score), highlight=False, soft_wrap=True)


def augmented(prepared: Prepared, identity: EncoderIdentity, settings: Linear, device: torch.device) -> TrainBatches:
    """Batches of augmented labelled images: all of them once an epoch, a pure function of (seed, epoch)."""
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    return eval_loader.augmented(StoreReader(prepared.store), prepared.split("search"), frame, settings, device)


class _Reporter:
    """Logs and shows every epoch, and remembers the last one's row."""

    def __init__(self, name: str, settings: Linear, tracker: Tracker, bar: Progress, console: Console) -> None:
        self.last: dict[str, float] = {}
        self._name, self._epochs, self._tracker, self._bar, self._console = name, settings.epochs, tracker, bar, console
        self._task = bar.add_task(f"{name} linear", total=settings.epochs)

    def __call__(self, row: Mapping[str, float]) -> None:
        self.last = dict(row)
        self._tracker.log(row)
        self._bar.update(self._task, completed=row["epoch"])
        if not self._console.is_terminal:
            values = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
            line = f"{self._name} linear epoch {int(row['epoch'])}/{self._epochs} {values}"
            self._console.print(line, highlight=False, soft_wrap=True)


def _record(
    name: str,
    params: Params,
    prepared: Prepared,
    hashes: tuple[str, ...],
    features: Features,
    outcomes: Mapping[str, Outcome],
    seconds: float,
) -> EvaluationRecord:
    settings = params.evaluation.linear
    best = {encoder: out.best_epoch for encoder, out in outcomes.items()}
    return EvaluationRecord(
        kind="linear",
        profile=params.profile,
        run=name,
        protocol=settings.protocol,
        settings={**settings.model_dump(mode="json"), "best_epoch": best},
        manifest=prepared.identity,
        encoder_sha256=hashes[0],
        features_sha256=hashes[1],
        scores=tuple(_score(outcomes, features.query_label, prepared.groups(features.query_label))),
        labels=pack_labels(features.query_label),
        predictions={
            f"{encoder}/{metric}": pack_labels(predicted)
            for encoder, out in outcomes.items()
            for metric, predicted in _metrics(out).items()
        },
        provenance=describe(seconds),
    )


def _metrics(outcome: Outcome) -> dict[str, Tensor]:
    return {"linear-last": outcome.last, "linear-best": outcome.best}


def _score(outcomes: Mapping[str, Outcome], label: Tensor, groups: Mapping[str, Tensor]) -> list[Score]:
    found: list[Score] = []
    for encoder, outcome in outcomes.items():
        for metric, predicted in _metrics(outcome).items():
            found += score_groups(cast("Literal['student', 'teacher']", encoder), metric, predicted, label, groups)
    return found
