"""Printed results of an evaluation: lines, tables by encoder and group, and accuracy per class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest
from torch import Tensor

from isd_repro.records import EvaluationRecord, Score, TargetEvaluation, unpack_labels
from isd_repro.runtime.errors import printable

WORDS = {
    "linear-best": "linear, best epoch (chosen on the queries)",
    "linear-last": "linear, last epoch",
    "linear-clean": "linear, clean (chosen on held-out train images)",
}
_TOP5 = "-top5"


def line(run: str, score: Score) -> str:
    """One plain line: `isd student 1-NN all 78.3 % (n=1000)`."""
    return f"{run} {score.encoder} {score.metric} {score.group} {score.top1:.1f} % (n={score.n})"


def row(scores: Iterable[Score]) -> dict[str, float]:
    """Top-1 accuracy in percent under `<encoder>/<metric>/<group>`."""
    return {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in scores}


def score_table(scores: Sequence[Score], *, intervals: bool = False) -> Table:
    """One row for each encoder and metric, one column for each group, in percent, with 95 % Wilson intervals on request."""

    def cell(score: Score | None) -> str:
        if score is None or not intervals:
            return f"{score.top1:.2f}" if score else ""
        found = binomtest(score.correct, score.n).proportion_ci(method="wilson")
        return f"{score.top1:.2f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"

    groups = list(dict.fromkeys(score.group for score in scores))
    found = {(score.encoder, score.metric, score.group): score for score in scores}
    sizes = {score.group: score.n for score in scores}
    table = _table()
    for head in ("encoder", "metric"):
        table.add_column(head, no_wrap=True)
    for group in groups:
        table.add_column(f"{group} (n={sizes[group]})", justify="right", no_wrap=True)
    for encoder, metric in dict.fromkeys((score.encoder, score.metric) for score in scores):
        row_of = [found.get((encoder, metric, group)) for group in groups]
        table.add_row(encoder, words(metric), *(Text(cell(score)) for score in row_of))
    return table


def words(metric: str) -> str:
    """A metric as a reader is told it; every metric is top-1 unless it says otherwise."""
    base = metric.removesuffix(_TOP5)
    return WORDS.get(base, base) + (", top-5" if metric != base else "")


def per_class(predictions: Mapping[str, Tensor], label: Tensor, classes: Sequence[str]) -> list[dict[str, object]]:
    """Accuracy in percent of every class that has queries: class, n, and a value by `<encoder>/<metric>`."""
    rows: list[dict[str, object]] = []
    for cls, name in enumerate(classes):
        mask = label == cls
        count = int(mask.sum())
        if count:
            shares = {key: 100.0 * int((found[mask] == cls).sum()) / count for key, found in predictions.items()}
            rows.append({"class": name, "n": count, **shares})
    return rows


def class_key(record: EvaluationRecord) -> str:
    """What a tracker calls the table of `class_rows`; a run has one for each target data set."""
    return f"per-class-{record.manifest.subset}" if isinstance(record, TargetEvaluation) else "per-class"


def class_rows(record: EvaluationRecord) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of a record's accuracy class by class, recomputed from its predictions."""
    predictions = {key: unpack_labels(text) for key, text in sorted(record.predictions.items())}
    rows = per_class(predictions, unpack_labels(record.labels), record.manifest.classes)
    return ["class", "n", *predictions], [list(row.values()) for row in rows]


def class_table(rows: Sequence[Mapping[str, object]]) -> Table:
    """What `per_class` gives, as a table."""
    table = _table()
    for at, head in enumerate(rows[0]):
        table.add_column(Text(head), justify="left" if at == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(f"{value:.1f}" if isinstance(value, float) else printable(str(value))) for value in row.values()))
    return table


def show(out: Console, tables: Iterable[tuple[str, Table]]) -> None:
    """Print tables under their titles; in a pipe nothing is cut and nothing is coloured."""
    for title, table in tables:
        if not out.is_terminal:
            wide = out.options.update(width=10_000, max_width=10_000)
            out.width = max(out.width, Measurement.get(out, wide, table).maximum)
        out.print(printable(title), style="bold", markup=False, soft_wrap=True)
        out.print(table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)
