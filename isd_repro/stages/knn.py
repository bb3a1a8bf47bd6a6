"""Stage `knn`: a run's features in, a record of its nearest-neighbour scores out."""

from __future__ import annotations

import time
from typing import Literal, cast

import torch
from rich.console import Console
from torch import Tensor

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.data import contact_sheet
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.evaluations import knn as search
from isd_repro.evaluations import scores as shown
from isd_repro.evaluations import summary
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import check_manifest
from isd_repro.evaluations.extract import Features, load_features
from isd_repro.provenance import describe, shown_provenance
from isd_repro.records import EvaluationRecord, Score, pack_labels, score_groups, write_record
from isd_repro.runtime.files import sha256_file
from isd_repro.tracking import names, open_stage

QUERIES, NEIGHBOURS = 8, 6  # rows of the picture, and images beside each query


def knn(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Classify the queries of a run by their nearest search images, for every k and encoder.

    Raises:
        ConfigError: no such run, or a k above the number of search images.
        DataError: a file is missing, damaged, or made from other images or another encoder.
    """
    started = time.monotonic()
    run = find_run(params, name)
    encoder_sha256 = sha256_file(layout.encoder(name))
    path = layout.features(name)
    features = load_features(path, encoder_sha256)
    prepared = open_prepared(layout.prepared(run.data.subset), layout.verified)
    check_manifest(path, features.identity["manifest"], prepared.identity.sha256)
    settings = params.evaluation.knn
    label = features.query_label
    groups = prepared.groups(label)
    device = best_device()
    scores: list[Score] = []
    predictions: dict[str, str] = {}
    near: dict[str, Tensor] = {}
    for encoder in features.search:
        near[encoder] = search.nearest(
            features.search[encoder], features.search_label, features.query[encoder], max(settings.k), device
        )
        for k in settings.k:
            predicted = search.vote(features.search_label[near[encoder][:, :k]])
            predictions[f"{encoder}/{k}-NN"] = pack_labels(predicted)
            scores += score_groups(cast("Literal['student', 'teacher']", encoder), f"{k}-NN", predicted, label, groups)
    record = EvaluationRecord(
        kind="knn",
        profile=params.profile,
        run=name,
        protocol=f"{', '.join(f'{k}-NN' for k in settings.k)} exact float32, ties by lowest label",
        settings=settings.model_dump(mode="json"),
        manifest=prepared.identity,
        encoder_sha256=encoder_sha256,
        features_sha256=sha256_file(path),
        scores=tuple(scores),
        labels=pack_labels(label),
        predictions=predictions,
        provenance=describe(time.monotonic() - started),
    )
    write_record(layout.record(name, "knn"), record)
    identity = names.evaluation_identity(record.encoder_sha256, record.settings)
    config = {**record.settings, **shown_provenance()}
    with open_stage("knn", name, params, layout, identity=identity, config=config) as tracker:
        tracker.log({"epoch": run.optim.epochs, **shown.row(scores)})
        for encoder in near:
            tracker.log_image(f"nearest-{encoder}", *_neighbours(encoder, near[encoder], features, prepared))
        tracker.log_table("per-class", *summary.class_rows(record))
    for score in scores:
        console.print(shown.line(name, score), highlight=False, soft_wrap=True)


def _neighbours(encoder: str, near: Tensor, features: Features, prepared: Prepared) -> tuple[Tensor, str]:
    """Some queries, one a row and spread over the classes, each before its nearest search images."""
    count = min(QUERIES, len(near))
    asked = torch.arange(count) * len(near) // count
    shown_near = near[asked, :NEIGHBOURS]
    query, found = prepared.split("query").index[asked], prepared.split("search").index[shown_near]
    pictures = prepared.store.read(torch.cat([query[:, None], found], dim=1).flatten())
    pixels = contact_sheet.thumbnails(*pictures)
    right = (features.search_label[shown_near] == features.query_label[asked, None]).long()
    marks = torch.cat([torch.full((count, 1), -1), right], dim=1)
    words = f"Queries (first column) and their nearest search images under the {encoder}; green has the query's class."
    return contact_sheet.sheet(list(pixels.unflatten(0, (count, -1))), marks), words
