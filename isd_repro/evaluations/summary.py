"""Printed results of an evaluation: lines, tables by encoder and group, and accuracy per class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console

from isd_repro import evaluations
from isd_repro.records import EvaluationRecord, Score, TargetEvaluation, unpack_labels
from isd_repro.runtime.terminal import show_table


def line(run: str, score: Score) -> str:
    """One plain line: `isd student 1-NN all 78.3 % (n=1000)`."""
    return f"{run} {score.encoder} {score.metric} {score.group} {score.top1:.1f} % (n={score.n})"


def row(scores: Iterable[Score]) -> dict[str, float]:
    """Top-1 accuracy in percent under `<encoder>/<metric>/<group>`."""
    return {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in scores}


def show_scores(out: Console, title: str, scores: Sequence[Score]) -> None:
    """A row for each encoder and metric, a column for each group, in percent, with 95 % Wilson intervals."""
    sizes = {score.group: score.n for score in scores}
    found: dict[tuple[str, str, str], Score] = {(score.encoder, score.metric, score.group): score for score in scores}

    def cell(encoder: str, metric: str, group: str) -> str:
        score = found.get((encoder, metric, group))
        if score is None:
            return ""
        low, high = score.interval
        return f"{score.top1:.2f} [{low:.1f}, {high:.1f}]"

    rows = [
        [encoder, evaluations.head(metric), *(cell(encoder, metric, group) for group in sizes)]
        for encoder, metric in dict.fromkeys((score.encoder, score.metric) for score in scores)
    ]
    show_table(out, ["encoder", "metric", *(f"{group} (n={n})" for group, n in sizes.items())], rows, title, left=2)


def per_class(records: Sequence[EvaluationRecord], *, top5: bool = False) -> list[dict[str, object]]:
    """Accuracy in percent of every class that has queries: class, n, and a value by `<encoder>/<metric>`.

    Recomputed from the predictions of records of the same queries.
    """
    label = unpack_labels(records[0].labels)
    texts = {key: text for one in records for key, text in sorted(one.predictions.items()) if top5 or not key.endswith("-top5")}
    predictions = {key: unpack_labels(text) for key, text in texts.items()}
    rows: list[dict[str, object]] = []
    for cls, name in enumerate(records[0].manifest.classes):
        mask = label == cls
        if count := int(mask.sum()):
            shares = {key: 100.0 * int((found[mask] == cls).sum()) / count for key, found in predictions.items()}
            rows.append({"class": name, "n": count, **shares})
    return rows


def class_key(record: EvaluationRecord) -> str:
    """What a tracker calls the table of `class_rows`; a run has one for each target data set."""
    return f"per-class-{record.manifest.subset}" if isinstance(record, TargetEvaluation) else "per-class"


def class_rows(record: EvaluationRecord) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of a record's accuracy class by class."""
    rows = per_class([record], top5=True)
    return list(rows[0]), [list(row.values()) for row in rows]


def show_classes(out: Console, rows: Sequence[Mapping[str, object]]) -> None:
    """What `per_class` gives, as a table."""
    cells = [[f"{value:.1f}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    show_table(out, list(rows[0]), cells, "By class, top-1 in percent")
