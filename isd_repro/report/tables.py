"""The tables of our own runs.

A subset has one table (balanced: student, then teacher) or two (unbalanced, the paper's shape: all, rare and large queries;
the student's table, then the teacher's); runs that differ in their seed alone have a row of their mean below. Repeated draws of
one kind of subset become the paper's pivot, see `pivot`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from isd_repro.config.params import AllClasses, Balanced, Halves, ListFile, Params, Unbalanced
from isd_repro.records import PretrainRecord
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Row, Table
from isd_repro.report.pool import method_name, pool, repetitions
from isd_repro.report.records import RECORDED, External, Key, Records, RunRecords

ENCODERS = ("student", "teacher")
GROUPS = ("all", "rare", "large")


def runs_of(params: Params, subset: str) -> list[str]:
    """Runs that train on a subset, in the order of the params."""
    return [name for name, run in params.runs.items() if run.data.subset == subset]


def groups_of(params: Params, records: Records, subset: str) -> tuple[str, ...]:
    """Query groups that a subset's tables show."""
    manifests = [records.runs[name].manifest for name in runs_of(params, subset)]
    unbalanced = isinstance(params.subsets[subset].rule, Unbalanced | Halves | ListFile) or any(m.large for m in manifests if m)
    return GROUPS if unbalanced else GROUPS[:1]


def metrics_of(params: Params, found: Sequence[RunRecords], encoder: str) -> list[str]:
    """Metrics that a set of runs has a column for: nearest neighbours first, then linear where some run has it."""
    stated = {key[1] for run in found for part in (run.knn, run.linear) if part for key in part.scores if key[0] == encoder}
    planned = {f"{k}-NN" for k in params.evaluation.knn.k} if encoder == "student" or stated else set()

    def order(metric: str) -> tuple[int, int, str]:
        if metric.endswith("-NN"):
            return 0, int(metric.removesuffix("-NN")), ""
        known = ("linear-last", "linear-best", "linear-clean")
        return 1, known.index(metric) if metric in known else len(known), metric

    return sorted(planned | stated, key=order)


def head(metric: str) -> str:
    """A metric as a column head: `linear-last` is `linear, last epoch`, `few-10pct-best` `10 % of labels, best epoch`."""
    base = metric.removesuffix("-top5")
    if few := re.fullmatch(r"few-(.+)pct-(last|best)", base):
        base = f"{few[1]} % of labels, {few[2]} epoch"
    words = {"linear-last": "linear, last epoch", "linear-best": "linear, best epoch", "linear-clean": "linear, clean"}
    return words.get(base, base) + (", top-5" if metric.endswith("-top5") else "")


def score_cell(found: RunRecords, encoder: str, metric: str, group: str) -> Cell:
    """The cell of one number, or of the reason why there is none."""
    cell = Cell("none", (found.run,), encoder, metric, group)
    evaluation = found.evaluation(metric)
    known = [part for part in (found.knn, found.linear) if part]
    encoders = {*(found.pretrain.encoders if found.pretrain else ()), *(key[0] for part in known for key in part.scores)}
    if encoders and encoder not in encoders:
        return replace(cell, detail=f"this method has no {encoder}")
    if evaluation is None:
        return replace(cell, kind="not run", detail=f"no {cell.part} record")
    if group not in evaluation.masks:
        return replace(cell, detail=f"the subset has no {group} queries")
    score = evaluation.scores.get((encoder, metric, group))
    if score is None:
        return replace(cell, kind="not run", detail=f"the {cell.part} record has no such score")
    low, high = intervals.wilson(score.correct, score.n)
    level = evaluation.levels[encoder, metric, group]
    return replace(cell, kind="score", value=score.top1, correct=score.correct, n=score.n, low=low, high=high, level=level)


def mark_best(cells: Sequence[Cell]) -> list[Cell]:
    """Mark the largest of the checked values, ties included; a lone value has nothing to beat."""
    values = [cell.value for cell in cells if cell.value is not None and cell.level != RECORDED]
    if len(values) < 2:
        return list(cells)
    return [replace(cell, best=cell.value == max(values) and cell.level != RECORDED) for cell in cells]


def subset_tables(params: Params, records: Records, subset: str) -> list[Table]:
    """The tables of one subset."""
    names = runs_of(params, subset)
    found = [records.runs[name] for name in names]
    groups = groups_of(params, records, subset)
    externals = externals_of(params, records, subset)
    stated = [*found, *(external.found for external in externals)]
    metrics = {encoder: metrics_of(params, stated, encoder) for encoder in ENCODERS}
    dataset = params.subsets[subset].source.dataset
    notes = (describe(params, records, subset), *protocols(params, found))
    if len(groups) == 1:
        keys = [(encoder, metric, "all") for encoder in ENCODERS for metric in metrics[encoder]]
        columns = [Column(encoder.capitalize(), head(metric)) for encoder, metric, _ in keys]
        blank = Table(subset, f"{subset}: {dataset}", "Run", (), (), notes=notes)
        return [_table(params, found, externals, keys, columns, blank)]
    tables = []
    for encoder in ENCODERS:
        keys = [(encoder, metric, group) for group in groups for metric in metrics[encoder]]
        columns = [Column(group_head(found, group), head(metric)) for _, metric, group in keys]
        blank = Table(
            f"{subset}-{encoder}", f"{subset}, {encoder}: {dataset}", "Run", (), (), notes=notes, main=encoder == "student"
        )
        tables += [_table(params, found, externals, keys, columns, blank)] if keys else []
    return tables


def group_head(found: Iterable[RunRecords], group: str) -> str:
    """A group's name with its number of queries, where that is known and one."""
    parts = [part for run in found for part in (run.knn, run.linear) if part]
    sizes = {int(part.masks[group].sum()) for part in parts if group in part.masks}
    return f"{group.capitalize()} (n = {text.count(*sizes)})" if len(sizes) == 1 else group.capitalize()


def externals_of(params: Params, records: Records, subset: str) -> list[External]:
    """Evaluated checkpoints that answered the queries of this subset over its search set: those of the same manifest."""
    manifests = {run.manifest.sha256 for run in (records.runs[name] for name in runs_of(params, subset)) if run.manifest}
    return [external for external in records.externals if external.manifest.sha256 in manifests]


def _table(
    params: Params,
    found: Sequence[RunRecords],
    externals: Sequence[External],
    keys: Sequence[Key],
    columns: Sequence[Column],
    blank: Table,
) -> Table:
    by_column = [mark_best([score_cell(run, *key) for run in found]) for key in keys]
    rows = [Row(params.runs[run.run].label, tuple(column[at] for column in by_column), run.run) for at, run in enumerate(found)]
    rows += [Row(external.label, tuple(_external_cell(external, key) for key in keys)) for external in externals]
    seeds = [names for names in repetitions(params, [run.run for run in found]) if len(names) > 1]
    of_run = {row.run: row.cells for row in rows}
    pooled = [[pool([of_run[name][at] for name in names], "seeds") for names in seeds] for at in range(len(keys))]
    best = [mark_best(column) for column in pooled]
    labels = [f"{method_name(params, names[0])}, {len(names)} seeds" for names in seeds]
    foot = tuple(Row(label, tuple(column[at] for column in best)) for at, label in enumerate(labels))
    return replace(blank, columns=tuple(columns), rows=tuple(rows), foot=foot)


def _external_cell(external: External, key: Key) -> Cell:
    """A number that stands beside the runs' and competes with none: nothing is known of how its encoder was made."""
    cell = score_cell(external.found, *key)
    detail = f"evaluated checkpoint {external.record.file}, sha256 {external.record.sha256}"
    if cell.kind == "score":
        return replace(cell, kind="external", runs=(), detail=detail)
    return replace(cell, runs=(), detail=cell.detail.replace("this method", "this checkpoint, as evaluated,"))


def rule_text(params: Params, subset: str) -> str:
    """How a subset is drawn, in words."""
    rule = params.subsets[subset].rule
    if isinstance(rule, ListFile):
        return f"the authors' list {rule.list}"
    if isinstance(rule, Unbalanced | Halves):
        images = "image" if rule.rare_images == 1 else "images"
        total = f" of {rule.classes}" if isinstance(rule, Unbalanced) and rule.classes else ""
        first = ", the first by name" if isinstance(rule, Halves) and rule.large_by == "name" else ""
        return f"{rule.large}{total} classes large{first}, in full; the rare ones cut to {rule.rare_images} {images}"
    drawn = f" of {rule.classes} classes" if rule.classes else ""
    if isinstance(rule, Balanced):
        return f"{rule.per_class} training images a class{drawn}"
    assert isinstance(rule, AllClasses)
    return f"all training images{drawn}"


def describe(params: Params, records: Records, subset: str) -> str:
    """One sentence on a subset's images; sizes only where a record states them."""
    manifest = next(filter(None, (records.runs[name].manifest for name in runs_of(params, subset))), None)
    if manifest is None:
        return f"Training images: {rule_text(params, subset)}."
    return (
        f"{text.count(manifest.train)} training images ({rule_text(params, subset)}); {text.count(manifest.search)} labelled"
        f" images to search or fit; n = {text.count(manifest.query)} queries."
    )


def protocols(params: Params, found: Sequence[RunRecords]) -> list[str]:
    """One sentence per evaluation; runs are named where their protocols differ."""
    sentences = []
    for title, part in (("Nearest neighbours", "knn"), ("Linear", "linear")):
        uses: dict[str, list[str]] = {}
        for run in found:
            if part in run.parts:
                record = run.parts[part]
                uses.setdefault("" if isinstance(record, PretrainRecord) else record.protocol, []).append(
                    params.runs[run.run].label
                )
        if len(uses) == 1:
            sentences.append(f"{title} protocol: {next(iter(uses))}.")
        elif uses:
            each = "; ".join(f"{name}: {text.listing(runs)}" for name, runs in uses.items())
            sentences.append(f"{title} protocols differ. {each}.")
        if part == "linear" and any(key[1] == "linear-best" for run in found if run.linear for key in run.linear.scores):
            sentences.append("The best linear epoch is chosen on the queries that it is scored on, so it is optimistic.")
    return sentences


def with_n(head: str, ours: Sequence[Cell]) -> str:
    """A head with the number of queries behind our numbers, where there are any and all have the same."""
    sizes = {cell.n for cell in ours if cell.n is not None}
    return f"{head} (n = {text.count(*sizes)})" if len(sizes) == 1 else head
