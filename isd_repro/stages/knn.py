"""Stage `knn`: a run's features in, a record of its nearest-neighbour scores out."""

from __future__ import annotations

import time
from typing import Literal, cast

from rich.console import Console

from isd_repro import artifacts
from isd_repro.artifacts import EvaluationRecord, Score
from isd_repro.config import Layout, find_run
from isd_repro.data.prepared import open_prepared
from isd_repro.evals import knn as search
from isd_repro.evals import scores as shown
from isd_repro.evals.arithmetic import best_device
from isd_repro.evals.encoders import check_manifest
from isd_repro.evals.extract import load_features
from isd_repro.params import Params
from isd_repro.tracking import open_tracker


def knn(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Classify the queries of a run by their nearest search images, for every k and encoder.

    Raises:
        ConfigError: no such run, or a k above the number of search images.
        DataError: a file is missing, damaged, or made from other images or another encoder.
    """
    started = time.monotonic()
    run = find_run(params, name)
    encoder_sha256 = artifacts.sha256_file(layout.encoder(name))
    path = layout.features(name)
    features = load_features(path, encoder_sha256)
    prepared = open_prepared(layout.prepared(run.data.subset))
    check_manifest(path, features.identity["manifest"], prepared.identity.sha256)
    settings = params.evaluation.knn
    label = features.query_label
    groups = prepared.groups(label)
    device = best_device()
    scores: list[Score] = []
    predictions: dict[str, str] = {}
    for encoder in features.search:
        found = search.predict(features.search[encoder], features.search_label, features.query[encoder], settings.k, device)
        for k, predicted in found.items():
            predictions[f"{encoder}/{k}-NN"] = artifacts.pack_labels(predicted)
            scores += artifacts.score(cast("Literal['student', 'teacher']", encoder), f"{k}-NN", predicted, label, groups)
    record = EvaluationRecord(
        kind="knn",
        profile=params.profile,
        run=name,
        protocol=f"{', '.join(f'{k}-NN' for k in settings.k)} exact float32, ties by lowest label",
        settings=settings.model_dump(mode="json"),
        manifest=prepared.identity,
        encoder_sha256=encoder_sha256,
        features_sha256=artifacts.sha256_file(path),
        scores=tuple(scores),
        labels=artifacts.pack_labels(label),
        predictions=predictions,
        provenance=artifacts.provenance(time.monotonic() - started),
    )
    artifacts.write_record(layout.record(name, "knn"), record)
    names = {"run_id": f"{params.profile}-{name}-knn", "group": f"{params.profile}-{name}", "job_type": "knn"}
    with open_tracker(None, tracking=params.tracking, layout_root=layout.root, config=record.settings, **names) as tracker:
        tracker.log({"epoch": run.optim.epochs, **shown.row(scores)})
    for score in scores:
        console.print(shown.line(name, score), highlight=False, soft_wrap=True)
