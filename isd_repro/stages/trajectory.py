"""Stage `trajectory`: the encoders kept during a run's training in, their nearest-neighbour scores by epoch out.

Student and teacher over training is the paper's second figure (paper.md 4, teacher vs student curve). Finished points lie in
`.state/` until all are there, so an interrupted stage goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Literal, cast

from rich.console import Console
from rich.progress import Progress, TaskID

from isd_repro.config.layout import Layout, snapshots_in
from isd_repro.config.params import Knn, Params
from isd_repro.config.reader import find_run, fingerprint
from isd_repro.data.eval_loader import Frame, StoreReader, centred
from isd_repro.data.manifests import Prepared, open_prepared
from isd_repro.evaluations import knn as search
from isd_repro.evaluations import scores as shown
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import check_manifest, check_run, load_encoders
from isd_repro.evaluations.extract import features
from isd_repro.provenance import describe, remember_code, shown_provenance, source_hash
from isd_repro.records import CurvePoint, CurveRecord, Score, read_record, score_groups, write_record
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.tracking import names, open_stage


def trajectory(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Score every snapshot of a run, and its final encoders, by their nearest neighbours.

    Raises:
        ConfigError: no such run, or a k above the number of search images.
        DataError: a file is missing, damaged, of another run, or made from other images; or no snapshot was kept.
    """
    remember_code()
    started = time.monotonic()
    run = find_run(params, name)
    prepared = open_prepared(layout.prepared(run.data.subset), layout.verified)
    settings = params.evaluation.knn
    files = _files(name, run.optim.epochs, layout)
    sums = {epoch: sha256_file(path) for epoch, path in files.items()}
    parts = {"trajectory": sums, "manifest": prepared.identity.sha256, "k": list(settings.k), "source": source_hash()}
    done = layout.state(fingerprint(parts))
    points = []
    with Progress(console=console, disable=not console.is_terminal) as bar:
        images = len(prepared.manifest.search) + len(prepared.manifest.query)
        task = bar.add_task(f"{name} trajectory", total=len(files) * images)
        for epoch, path in files.items():
            kept = done / f"{epoch}.json"
            if kept.is_file():
                point = read_record(kept, CurvePoint)
                bar.advance(task, images)
            else:
                scores = _score(path, name, prepared, settings, bar, task)
                point = CurvePoint(epoch=epoch, encoder_sha256=sums[epoch], scores=tuple(scores))
                write_record(kept, point)
            points.append(point)
            for score in point.scores:
                console.print(f"epoch {epoch} {shown.line(name, score)}", highlight=False, soft_wrap=True)
    record = CurveRecord(
        kind="trajectory",
        profile=params.profile,
        run=name,
        protocol=f"{', '.join(f'{k}-NN' for k in settings.k)} exact float32, ties by lowest label",
        settings=settings.model_dump(mode="json"),
        manifest=prepared.identity,
        points=tuple(points),
        provenance=describe(time.monotonic() - started),
    )
    write_record(layout.record(name, "trajectory"), record)
    identity = names.evaluation_identity(sums[run.optim.epochs], record.settings)
    config = {**record.settings, **shown_provenance()}
    with open_stage("trajectory", name, params, layout, identity=identity, config=config) as tracker:
        for point in points:
            tracker.log({"epoch": point.epoch, **shown.row(point.scores)})
    shutil.rmtree(done, ignore_errors=True)


def _files(name: str, epochs: int, layout: Layout) -> dict[int, Path]:
    """Encoder files by epoch, the final one last."""
    folder = layout.snapshots(name)
    found = snapshots_in(folder)
    if not found:
        raise DataError(f"{folder}: no snapshot in it", "set efficiency.snapshot_every and run `pretrain` again")
    return {**found, epochs: layout.encoder(name)}


def _score(path: Path, run: str, prepared: Prepared, settings: Knn, bar: Progress, task: TaskID) -> list[Score]:
    """Extract and search with the encoders of one file."""
    encoders, identity = load_encoders(path)
    check_run(path, identity, run)
    check_manifest(path, identity.manifest, prepared.identity.sha256)
    device = best_device()
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    reader = StoreReader(prepared.store)
    splits = {"search": prepared.split("search"), "query": prepared.split("query")}
    rows = {
        which: features(encoders, centred(reader, split.index, frame, device), len(split), device, partial(bar.advance, task))
        for which, split in splits.items()
    }
    label = splits["query"].label
    groups = prepared.groups(label)
    scores: list[Score] = []
    for encoder, bank in rows["search"].items():
        found = search.predict(bank, splits["search"].label, rows["query"][encoder], settings.k, device)
        for k, predicted in found.items():
            scores += score_groups(cast("Literal['student', 'teacher']", encoder), f"{k}-NN", predicted, label, groups)
    return scores
