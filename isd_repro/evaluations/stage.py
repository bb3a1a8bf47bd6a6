"""Stage `extract` and the stages of the evaluations, which turn a run's files into a features file or a record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from isd_repro import evaluations
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.evaluations import summary
from isd_repro.evaluations.features import Features, save_features
from isd_repro.evaluations.subject import Curve, Outcome, Subject, Targets, open_run
from isd_repro.provenance import describe, shown_provenance
from isd_repro.records import AnyEvaluation, CurveRecord, EvaluationRecord, TargetsRecord, pack_labels, score_groups, write_record
from isd_repro.runtime import ranks
from isd_repro.runtime.files import sha256_file
from isd_repro.runtime.progress import Progress
from isd_repro.tracking import RunTracker, names, open_stage


def run_evaluation(kind: str, name: str, params: Params, layout: Layout, console: Console) -> None:
    """Evaluate a run, write and log its record, and print its scores. Several ranks share the work, and rank 0 writes.

    Raises:
        ConfigError: there is no such run, or its settings contradict each other.
        DataError: a file is missing, damaged, of another run, or made from other images or by another encoder.
        UserError: the evaluation failed; see the evaluation.
    """
    started, progress = time.monotonic(), Progress(console)
    subject, config = open_run(name, params, layout, progress), getattr(params.evaluation, kind)
    asked = settings(kind, subject, config)
    if ranks.rank() > 0:
        evaluations.load(kind).evaluate(subject, config)
        return
    identity = names.evaluation_identity(subject.sha256, asked)
    shown = {**asked, **shown_provenance()}
    with open_stage(kind, name, params, layout, identity=identity, config=shown) as tracker:
        last: dict[str, float] = {"epoch": params.runs[name].optim.epochs}

        def log(row: Mapping[str, float]) -> None:
            last.clear()
            last.update(row)
            tracker.log(row)
            if not console.is_terminal:
                values = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch")
                progress.say(f"{name} {kind} epoch {int(row['epoch'])} {values}")

        subject.on_row = log
        outcome = evaluations.load(kind).evaluate(subject, config)
        features = sha256_file(layout.features(name)) if "features" in vars(subject) else None
        record = record_of(kind, subject, outcome, asked, features, time.monotonic() - started)
        write_record(layout.record(name, kind), record)
        _log(tracker, record, last)
        if isinstance(outcome, Outcome):
            for key, (pixels, caption) in outcome.pictures().items():
                tracker.log_image(key, pixels, caption)
    for score in record.scores if isinstance(record, EvaluationRecord) else ():
        progress.say(summary.line(name, score))
    subject.finish()


def settings(kind: str, subject: Subject, config: Any) -> dict[str, Any]:
    """What an evaluation is asked for, as its record says it: its settings, and what its file says of its `inputs`."""
    inputs = getattr(evaluations.load(kind), "inputs", None)
    return {**evaluations.asked(kind, subject.settings), **(inputs(subject, config) if inputs else {})}


def record_of(
    kind: str, subject: Subject, outcome: Outcome | Targets | Curve, asked: dict[str, Any], features: str | None, seconds: float
) -> AnyEvaluation:
    """The record of an evaluation; this is the only place that counts scores from predictions for a record."""
    protocol = evaluations.load(kind).protocol(subject.settings)
    about: dict[str, Any] = {"kind": kind, "profile": subject.profile, "run": subject.name, "protocol": protocol}
    about |= {"manifest": subject.manifest, "provenance": describe(seconds)}
    if isinstance(outcome, Curve):
        return CurveRecord(**about, settings=asked, points=outcome.points)
    about["encoder_sha256"] = subject.sha256
    if isinstance(outcome, Targets):
        about["provenance"] = describe(sum(one.provenance.seconds for one in outcome.evaluations))
        return TargetsRecord(**about, settings=asked, evaluations=outcome.evaluations)
    label = (subject.split("query").label if outcome.label is None else outcome.label).cpu().numpy()
    groups, found = subject.prepared.groups(label), outcome.arrays.items()
    return EvaluationRecord(
        **about,
        settings={**asked, **outcome.chosen},
        features_sha256=features,
        scores=tuple(score for key, rows in found for score in score_groups(key, rows, label, groups)),
        labels=pack_labels(label),
        predictions={key: pack_labels(rows) for key, rows in found},
    )


def _log(tracker: RunTracker, record: AnyEvaluation, last: Mapping[str, float]) -> None:
    """Log the scores together with the last row of the training, and the accuracy of each class."""
    if isinstance(record, CurveRecord):
        for point in record.points:
            tracker.log({"epoch": point.epoch, **summary.row(point.scores)})
        return
    if isinstance(record, TargetsRecord):
        each: tuple[EvaluationRecord, ...] = record.evaluations
        scores = {key: value for one in record.evaluations for key, value in one.row().items()}
    else:
        each, scores = (record,), summary.row(record.scores)
    tracker.log({**last, **scores})
    for one in each:
        tracker.log_table(summary.class_key(one), *summary.class_rows(one))


def extract(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Compute the features of a run's search and query images and write them to a file.

    With several ranks, each takes one block of images in turn; rank 0 writes.

    Raises:
        ConfigError: there is no such run.
        DataError: a file is missing, damaged, of another run, or made from other images.
    """
    started, progress = time.monotonic(), Progress(console)
    subject = open_run(name, params, layout, progress, anew=True)
    found = subject.features
    if ranks.rank() > 0:
        return
    search, query = subject.split("search"), subject.split("query")
    made_from = {"encoder_sha256": subject.sha256, "manifest": subject.manifest.sha256}
    made_by = {"run": name, "encoders": list(subject.encoders), "image_size": subject.frame.size, "normalised": False}
    kept = Features(dict(found["search"]), dict(found["query"]), search.label, query.label, made_by | made_from)
    save_features(layout.features(name), kept)
    seconds = time.monotonic() - started
    config = {**made_from, **shown_provenance()}
    row = {"epoch": params.runs[name].optim.epochs, "images": len(search) + len(query), "seconds": round(seconds, 3)}
    with open_stage("extract", name, params, layout, identity=subject.sha256, config=config) as tracker:
        tracker.log(row)
    counts = f"{len(search)} search and {len(query)} query images"
    progress.say(f"{name} {', '.join(subject.encoders)}: {counts} in {seconds:.1f} s")
