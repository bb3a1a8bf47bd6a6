"""Tables of the protocols that have a stage of their own: few labels, and transfer to other data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from isd_repro.config.params import Params
from isd_repro.records import TargetEvaluation
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.evaluation import RECORDED, Evaluation
from isd_repro.report.records import Records, RunRecords
from isd_repro.report.tables import ENCODERS, mark_best, score_cell, with_n

_FEW = "top-1, last epoch", "top-5, last epoch", "top-1, best epoch", "top-5, best epoch"
METRIC = "transfer"
_TRANSFER_NOTE = (
    "Logistic regression on the features of the frozen encoder. The strength of its regularisation is chosen on validation"
    " images for each run and data set; it is then fitted on train and validation images together and answers the test images"
    " once."
)


def protocol_tables(params: Params, records: Records) -> list[Table]:
    """Every table that the profile's lists of runs ask for; none where they are empty."""
    return [*_few_label_tables(params, records), *_transfer_tables(params, records)]


# --- few labels -------------------------------------------------------------------------------------------------------


def _few_label_tables(params: Params, records: Records) -> list[Table]:
    """One table for each subset and encoder; the teacher's only where some run has one."""
    tables = []
    for subset in dict.fromkeys(params.runs[name].data.subset for name in params.few_label_runs):
        found = [records.runs[name] for name in params.few_label_runs if params.runs[name].data.subset == subset]
        for encoder in ENCODERS:
            if encoder == "teacher" and not _has_teacher(found):
                continue
            columns, by_column = [], []
            for fraction in params.evaluation.few_label.fractions:
                share = f"{round(100 * fraction, 10):g}"
                for metric, head in zip(("last", "last-top5", "best", "best-top5"), _FEW, strict=True):
                    columns.append(Column(_share_head(found, share), head))
                    by_column.append(mark_best([score_cell(run, encoder, f"few-{share}pct-{metric}", "all") for run in found]))
            rows = tuple(
                Row(params.runs[run.run].label, tuple(column[at] for column in by_column), run.run)
                for at, run in enumerate(found)
            )
            title = f"Few labels: {subset}, {encoder}"
            notes = tuple(_few_notes(found))
            tables.append(
                Table(f"few-label-{subset}-{encoder}", title, "Run", tuple(columns), rows, notes=notes, main=encoder == "student")
            )
    return tables


def _has_teacher(found: Sequence[RunRecords]) -> bool:
    return any(key[0] == "teacher" for run in found if run.few_label for key in run.few_label.scores)


def _share_head(found: Sequence[RunRecords], share: str) -> str:
    """`10 % of labels (1,900 images)`, the number where a record states it."""
    sizes = {run.few_label.record.settings["labelled"][share]["images"] for run in found if run.few_label}
    return f"{share} % of labels" + (f" ({text.count(*sizes)} images)" if len(sizes) == 1 else "")


def _few_notes(found: Sequence[RunRecords]) -> list[str]:
    stated = [run.few_label.record for run in found if run.few_label]
    if not stated:
        return ["A linear classifier on the frozen encoder, learnt from the labelled images alone."]
    labelled = stated[0].settings["labelled"]
    sources = {
        "drawn by class" if part["source"] == "drawn" else f"the published list {part['source']}" for part in labelled.values()
    }
    return [
        f"A linear classifier on the frozen encoder, learnt from the labelled images alone: {text.listing(sorted(sources))}.",
        f"n = {text.count(stated[0].manifest.query)} queries.",
        f"Protocol: {stated[0].protocol}.",
        "The best epoch is chosen on the queries that it is scored on, so it is optimistic.",
    ]


# --- transfer ---------------------------------------------------------------------------------------------------------


def _transfer_tables(params: Params, records: Records) -> list[Table]:
    """The student's table and, where some run has one, the teacher's; one column a data set, and their mean."""
    if not params.transfer_runs:
        return []
    found = [records.runs[name] for name in params.transfer_runs]
    keys = params.evaluation.transfer.sets
    titles: dict[str, tuple[str, str]] = {key: (key, "") for key in keys}
    for run in found:
        for key, one in run.transfer.sets.items() if run.transfer else ():
            titles[key] = one.record.manifest.dataset, reported(one)
    tables = []
    for encoder in ENCODERS:
        stated = {key[0] for run in found if run.transfer for one in run.transfer.sets.values() for key in one.scores}
        if encoder == "teacher" and encoder not in stated:
            continue
        by_column = [mark_best([transfer_cell(run, encoder, key) for run in found]) for key in keys]
        heads = [with_n(titles[key][0], cells) for key, cells in zip(keys, by_column, strict=True)]
        columns = [Column(titles[key][1] or "Data set", head) for key, head in zip(keys, heads, strict=True)]
        if len(keys) > 1:
            means = [_mean_cell([column[at] for column in by_column]) for at in range(len(found))]
            by_column.append(mark_best(means))
            columns.append(Column("All", "mean"))
        rows = tuple(
            Row(params.runs[run.run].label, tuple(column[at] for column in by_column), run.run) for at, run in enumerate(found)
        )
        title = f"Transfer: linear classifiers on frozen features, {encoder}"
        notes = (_TRANSFER_NOTE, *_sizes(found))
        tables.append(Table(f"transfer-{encoder}", title, "Run", tuple(columns), rows, notes=notes, main=encoder == "student"))
    return tables


def _sizes(found: Sequence[RunRecords]) -> list[str]:
    """How many images of each data set taught, chose and were asked, so that a part of one is not taken for all of it."""
    manifests = {key: one.record.manifest for run in found for key, one in (run.transfer.sets.items() if run.transfer else ())}
    said = [
        f"{one.dataset}, {text.count(one.train)} images to train on, {text.count(one.search - one.train)} to validate,"
        f" {text.count(one.query)} to test"
        for one in manifests.values()
    ]
    return [f"Images that were here: {'; '.join(said)}."] if said else []


def reported(one: Evaluation) -> str:
    """Which of its two numbers the field reports for a target data set."""
    return "mean per class" if _per_class(one) else "top-1"


def _per_class(one: Evaluation) -> bool:
    return isinstance(one.record, TargetEvaluation) and one.record.metric == "mean-per-class"


def transfer_cell(run: RunRecords, encoder: str, key: str) -> Cell:
    """The number that the field reports for a data set, or the reason why there is none."""
    cell = Cell("none", (run.run,), encoder, f"{METRIC}-{key}", "all")
    if run.transfer is None:
        return replace(cell, kind="not run", detail="no transfer record")
    one = run.transfer.sets.get(key)
    if one is None:
        return replace(cell, kind="not run", detail="the transfer record has no such data set")
    score = one.scores.get((encoder, METRIC, "all"))
    if score is None:
        return replace(cell, detail=f"this method has no {encoder}")
    level = one.levels[encoder, METRIC, "all"]
    if not _per_class(one):
        low, high = intervals.wilson(score.correct, score.n)
        return replace(cell, kind="score", value=score.top1, correct=score.correct, n=score.n, low=low, high=high, level=level)
    assert isinstance(one.record, TargetEvaluation)
    mean, spread = one.record.mean_per_class[f"{encoder}/{METRIC}"], _spread(one, encoder)
    detail = (
        f"mean over {len(one.label.unique())} classes of the share answered rightly; {text.count(score.n)} queries;"
        " the interval is 1.96 standard deviations, each class binomial; verification: " + level
    )
    low, high = max(0.0, mean - 1.96 * spread), min(100.0, mean + 1.96 * spread)
    return replace(cell, kind="mean", value=mean, n=score.n, low=low, high=high, level=level, detail=detail)


def _spread(one: Evaluation, encoder: str) -> float:
    """Standard deviation of the mean over classes, in percent; each share's variance is that of a flat prior's posterior."""
    hits = one.predictions[f"{encoder}/{METRIC}"] == one.label
    n = torch.bincount(one.label).double()
    right = torch.bincount(one.label[hits], minlength=len(n)).double()[n > 0]
    n = n[n > 0]
    share = (right + 1) / (n + 2)
    return 100.0 * math.sqrt(float((share * (1 - share) / (n + 3)).sum())) / len(n)


def _mean_cell(cells: Sequence[Cell]) -> Cell:
    """The mean over all data sets of one run; nothing where one is missing."""
    values = [cell.value for cell in cells if cell.value is not None]
    blank = replace(cells[0], kind="not run", value=None, correct=None, n=None, low=None, high=None, level="", best=False)
    if len(values) < len(cells):
        return replace(blank, metric=METRIC, detail=f"{len(values)} of {len(cells)} data sets have a number")
    level = RECORDED if any(cell.level == RECORDED for cell in cells) else cells[0].level
    detail = f"mean of the {len(cells)} numbers to the left"
    return replace(blank, kind="mean", metric=METRIC, value=sum(values) / len(values), level=level, detail=detail)
