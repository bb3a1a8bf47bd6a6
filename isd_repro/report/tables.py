"""The tables of our runs.

A subset has one table (balanced: student, then teacher) or two (unbalanced, in the paper's form with all, rare and large queries:
the student's table, then the teacher's); runs that differ only in their seed have a row with their mean below. Repeated draws of
one kind of subset have one row per draw and one column per method, as in the paper. Evaluations with separate tables follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from isd_repro import evaluations
from isd_repro.config.fields import GROUPS
from isd_repro.config.params import Halves, ListFile, Params, Unbalanced, in_words
from isd_repro.evaluations import head
from isd_repro.records import SHOTS, TargetEvaluation
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Column, Kind, Row, Table, by_columns
from isd_repro.report.repetitions import counterpart, families, method_name, methods, planned, repetitions, runs_of, under_test
from isd_repro.report.run_records import RECORDED, Evaluation, External, Key, Records, RunRecords
from isd_repro.report.scores import (
    balancedness_cell,
    difference_cell,
    mark_best,
    mean_cell,
    method_cell,
    score_cell,
    scored,
    with_n,
)

ENCODERS = ("student", "teacher")
BALANCEDNESS = "balancedness"  # in the place of a group: the column of the standard deviation over classes


def groups_of(params: Params, records: Records, subset: str) -> tuple[str, ...]:
    """The query groups in a subset's tables."""
    manifests = [records.runs[name].manifest for name in runs_of(params, subset)]
    config = params.subsets[subset]
    found = {"all"}
    if isinstance(config.rule, Unbalanced | Halves | ListFile) or any(one.large for one in manifests if one):
        found |= {"rare", "large"}
    if config.shots:
        known = [group for one in manifests if one for group, classes in one.shots.items() if classes]
        found |= set(known or SHOTS)
    return tuple(group for group in GROUPS if group in found)


def first_metric(params: Params) -> str:
    """The nearest-neighbour score that charts and comparisons use."""
    return f"{params.evaluation.knn.k[0]}-NN"


def shared(found: Iterable[RunRecords]) -> list[Evaluation]:
    """The evaluations whose numbers are in the main table."""
    return [one for run in found for kind, one in run.own.items() if not evaluations.own_table(kind)]


def metrics_of(params: Params, found: Sequence[RunRecords], encoder: str) -> list[str]:
    """The metrics that are columns for a set of runs.

    These are the metrics that some run has, and the metrics that the settings ask for if an evaluation is for every run. The
    first evaluation has its columns even before any run has been evaluated.
    """
    stated = {key[1] for one in shared(found) for key in one.scores if key[0] == encoder}
    present = {one.record.kind for one in shared(found)} | {evaluations.names()[0]}
    of_all = [kind for kind in present if f"{kind}_runs" not in type(params).model_fields]
    asked = {metric for kind in of_all for metric in evaluations.columns(params.evaluation, kind)}
    return evaluations.in_order([*(asked if encoder == "student" or stated else ()), *stated], params.evaluation)


def asked_of(params: Params, kind: str) -> tuple[str, ...]:
    """The runs for which a profile asks for an evaluation."""
    return tuple(getattr(params, f"{kind}_runs", ()))


def group_head(found: Iterable[RunRecords], group: str) -> str:
    """A group's name with its number of queries, if this is known and unique."""
    sizes = {int(one.masks[group].sum()) for one in shared(found) if group in one.masks}
    return f"{group.capitalize()} (n = {text.count(*sizes)})" if len(sizes) == 1 else group.capitalize()


def one_seed(params: Params, runs: Sequence[str], first: str) -> str:
    """The heading of a table's first column, which says if no run is repeated with another seed."""
    return f"{first} (one seed each)" if all(len(seeds) == 1 for seeds in repetitions(params, runs)) else first


_BALANCEDNESS = "Balancedness is the standard deviation over classes of top-1 accuracy, in points: smaller is more even."


def subset_tables(params: Params, records: Records, subset: str) -> list[Table]:
    """The tables of one subset, with every run that trains on it."""
    found = [records.runs[name] for name in runs_of(params, subset)]
    groups = groups_of(params, records, subset)
    externals = externals_of(params, records, subset)
    stated = [*found, *(external.found for external in externals)]
    metrics = {encoder: metrics_of(params, stated, encoder) for encoder in ENCODERS}
    title = params.subsets[subset].source.dataset
    first = one_seed(params, runs_of(params, subset), "Run")
    notes = (describe(params, records, subset), *protocols(params, found))
    if shots := params.subsets[subset].shots:
        many, few = f"more than {text.count(shots.many_above)}", f"fewer than {text.count(shots.few_below)}"
        notes += (f"Many and few: queries of classes with {many} and with {few} training images; medium: the others.",)
    if len(groups) == 1:
        keys = [(encoder, metric) for encoder in ENCODERS for metric in metrics[encoder]]
        heads = [(Column(encoder.capitalize(), head(metric)), (encoder, metric, "all")) for encoder, metric in keys]
        return [run_table(params, found, heads, Table(subset, f"{subset}: {title}", first, notes=notes), externals)]
    tables = []
    for encoder in ENCODERS:
        spans = {**{group: group_head(found, group) for group in groups}, BALANCEDNESS: BALANCEDNESS.capitalize()}
        heads = [
            (Column(span, head(metric)), (encoder, metric, group)) for group, span in spans.items() for metric in metrics[encoder]
        ]
        name, about = f"{subset}-{encoder}", (*notes, _BALANCEDNESS)
        blank = Table(name, f"{subset}, {encoder}: {title}", first, notes=about, main=encoder == "student")
        tables += [run_table(params, found, heads, blank, externals)] if heads else []
    return tables


def run_table(
    params: Params,
    found: Sequence[RunRecords],
    heads: Sequence[tuple[Column, Key]],
    blank: Table,
    externals: Sequence[External] = (),
) -> Table:
    """A table with a row per run and a column per key; evaluated checkpoints below the runs, means over seeds in the foot."""
    names = [run.run for run in found]
    seeds = [alike for alike in repetitions(params, names) if len(alike) > 1]
    columns = []
    for column, key in heads:
        cells = _column(found, key)
        means = [mean_cell([cells[names.index(run)] for run in alike], "seeds") for alike in seeds]
        means = [replace(cell, kind="statistic") for cell in means] if key[2] == BALANCEDNESS else mark_best(means)
        columns.append((column, [*cells, *(_external_cell(external, key) for external in externals), *means]))
    labels = [*(params.runs[run].label for run in names), *(external.label for external in externals)]
    labels += [f"{method_name(params, alike[0])}, {len(alike)} seeds" for alike in seeds]
    return by_columns(blank, labels, columns, runs=names, foot=len(seeds))


def _column(found: Sequence[RunRecords], key: Key) -> list[Cell]:
    """The cells of one column, one for each run; the largest accuracy is marked."""
    if key[2] == BALANCEDNESS:
        return [balancedness_cell(run, *key[:2]) for run in found]
    return mark_best([score_cell(run, *key) for run in found])


def externals_of(params: Params, records: Records, subset: str) -> list[External]:
    """Evaluated checkpoints with the same queries and search set as this subset, which are those with the same manifest."""
    manifests = {run.manifest.sha256 for run in (records.runs[name] for name in runs_of(params, subset)) if run.manifest}
    return [external for external in records.externals if external.record.evaluations[0].manifest.sha256 in manifests]


def _external_cell(external: External, key: Key) -> Cell:
    """The number of an evaluated checkpoint, which is never marked as best because its encoder's training is unknown."""
    [cell] = _column([external.found], key)
    detail = f"evaluated checkpoint {external.record.file}, sha256 {external.record.sha256}"
    if cell.kind == "score":
        return replace(cell, kind="external", runs=(), detail=detail)
    return replace(cell, runs=(), detail=cell.detail.replace("this method", "this checkpoint, as evaluated,"))


def describe(params: Params, records: Records, subset: str) -> str:
    """One sentence on a subset's images; sizes are given only if a record states them."""
    drawn = in_words(params.subsets[subset].rule)
    manifest = next(filter(None, (records.runs[name].manifest for name in runs_of(params, subset))), None)
    if manifest is None:
        return f"Training images: {drawn}."
    return (
        f"{text.count(manifest.train)} training images ({drawn}); {text.count(manifest.search)} labelled"
        f" images (search set, and training set of the classifier); n = {text.count(manifest.query)} queries."
    )


def protocols(params: Params, found: Sequence[RunRecords]) -> list[str]:
    """One sentence per evaluation on its protocol; runs are named if their protocols differ."""
    sentences = []
    for kind in (kind for kind in evaluations.names() if not evaluations.own_table(kind)):
        title, uses = evaluations.title(kind), dict[str, list[str]]()
        for run in found:
            if one := run.own.get(kind):
                uses.setdefault(one.record.protocol, []).append(params.runs[run.run].label)
        if len(uses) == 1:
            sentences.append(f"{title} protocol: {next(iter(uses))}.")
        elif uses:
            each = "; ".join(f"{name}: {text.listing(runs)}" for name, runs in uses.items())
            sentences.append(f"{title} protocols differ. {each}.")
        if uses and (note := evaluations.note(kind)):
            sentences.append(note)
    return sentences


def difference_table(params: Params, records: Records, subset: str) -> Table | None:
    """Methods minus references, and the method under test minus the others, by query group; None while there are none."""
    by_method = {name: runs[subset] for name, runs in methods(params, [subset]).items()}
    subject, others = under_test(params, [subset])
    named = {"untrained encoder": params.report.reference, "raw pixels": params.report.pixels}
    references = {what: [other] for what, run in named.items() if (other := counterpart(params, run, subset))}
    trained = [name for name, runs in by_method.items() if runs not in references.values()]
    pairs = [((name, by_method[name]), reference) for name in trained for reference in references.items()]
    if subject and not params.report.trials:
        pairs += [((subject, by_method[subject]), (other, by_method[other])) for other in others]
    return _differences(params, records, subset, pairs, Table(f"{subset}-differences", f"{subset}: differences, points", "Pair"))


def exploratory_tables(params: Params, records: Records) -> list[tuple[str, list[Table]]]:
    """For each subset with exploratory runs: a title, a table of all its runs, and a table of their differences."""
    found = []
    for subset in dict.fromkeys(params.runs[run].data.subset for run in params.report.exploratory):
        title = "runs decided after the result"
        draws = next((subsets for subsets in families(params) if subset in subsets), [subset])
        subject, others = under_test(params, draws)
        rivals = [(name, runs[subset]) for name, runs in methods(params, draws).items() if name in (subject, *others)]
        runs = [run for run in params.report.exploratory if params.runs[run].data.subset == subset]
        pairs = [((params.runs[run].label, [run]), rival) for run in runs for rival in rivals]
        tables = [replace(one, title=f"{one.title}, with {title}", main=False) for one in subset_tables(params, records, subset)]
        blank = Table(f"{subset}-exploratory", f"{subset}: {title}, differences, points", "Pair", main=False)
        differences = _differences(params, records, subset, pairs, blank)
        found.append((f"{title.capitalize()}, {subset}", [*tables, *([differences] if differences else [])]))
    return found


_SINGLE = (
    "One training of each method: the variation between trainings of one method is unknown, so differences have no intervals."
)
Side = tuple[str, list[str]]  # a method's name, and its runs on a subset


def _differences(params: Params, records: Records, subset: str, pairs: Sequence[tuple[Side, Side]], blank: Table) -> Table | None:
    metric, groups = first_metric(params), groups_of(params, records, subset)
    rows, most = [], 1
    for (first, ours), (second, theirs) in pairs:
        cells = [[method_cell(records, runs, ("student", metric, group)) for group in groups] for runs in (ours, theirs)]
        differences = [difference_cell(records, *both) for both in zip(*cells, strict=True)]
        if any(cell.value is not None for cell in differences):
            for of_all, *_ in cells:
                count = of_all.count or 1
                most = max(most, count)
                differences.append(Cell("statistic", of_all.runs, "student", metric, "all", count, words=str(count)))
            rows.append(Row(f"{first} {text.MINUS} {second}", tuple(differences)))
    columns = [Column(group_head(records.runs.values(), group), f"{metric}, student") for group in groups]
    columns += [Column("Runs", "of the first"), Column("Runs", "of the second")]
    notes = ("Differences are computed before rounding.", *([_SINGLE] if most == 1 else []))
    return replace(blank, columns=tuple(columns), rows=tuple(rows), notes=notes) if rows else None


def draw_tables(params: Params, records: Records, subsets: Sequence[str]) -> list[Table]:
    """Tables of repeated draws of one kind of subset, with a row per draw and a column per method; one per encoder and metric."""
    found = [records.runs[run] for subset in subsets for run in planned(params, subset)]
    dataset = params.subsets[subsets[0]].source.dataset
    lists = [rule.list for rule in (params.subsets[subset].rule for subset in subsets) if isinstance(rule, ListFile)]
    images = f"the authors' lists {text.listing(lists)}" if lists else in_words(params.subsets[subsets[0]].rule)
    notes = (f"Training images of each draw: {images}.", *protocols(params, found))
    first = one_seed(params, [run.run for run in found], "Subset")
    tables: list[Table] = []
    for encoder in ENCODERS:
        for metric in metrics_of(params, found, encoder):
            title = f"{subsets[0]} to {subsets[-1]}, {head(metric)}, {encoder}: {dataset}"
            blank = Table(f"{subsets[0]}-{subsets[-1]}-{encoder}-{metric}", title, first, notes=notes, main=not tables)
            tables.append(_draw_table(params, records, subsets, (encoder, metric), blank))
    return tables


def _draw_table(params: Params, records: Records, subsets: Sequence[str], key: tuple[str, str], blank: Table) -> Table:
    by_method = methods(params, subsets)
    subject, others = under_test(params, subsets)
    groups = list(dict.fromkeys(group for subset in subsets for group in groups_of(params, records, subset)))
    found = [records.runs[run] for runs in by_method.values() for seeds in runs.values() for run in seeds]
    columns: list[Column] = []
    body: list[list[Cell]] = [[] for _ in subsets]
    for group in groups:
        span = group_head(found, group)
        columns += [Column(span, name) for name in by_method]
        columns += [Column(span, "Diff" if len(others) == 1 else f"{subject} {text.MINUS} {other}") for other in others]
        for subset, row in zip(subsets, body, strict=True):
            scores = {name: method_cell(records, runs.get(subset, ()), (*key, group)) for name, runs in by_method.items()}
            differences = [difference_cell(records, scores[subject], scores[other]) for other in others] if subject else []
            row.extend([*mark_best(list(scores.values())), *differences])
    rows = tuple(Row(subset, tuple(cells)) for subset, cells in zip(subsets, body, strict=True))
    foot = _mean_row(rows, len(by_method), len(by_method) + len(others))
    return replace(blank, columns=tuple(columns), rows=rows, foot=(foot,))


def _mean_row(rows: Sequence[Row], scores: int, width: int) -> Row:
    """Means over the draws with complete rows, so that all columns are about the same draws.

    A row consists of blocks of `width` cells, one block per group, of which the first `scores` are methods and the others
    differences. A column without a number in any row (a method that has not been run, the teacher of a method without one) is
    ignored.
    """
    columns = list(zip(*(row.cells for row in rows), strict=True))
    needed = [column for column in columns if any(cell.value is not None for cell in column)]
    complete = [at for at in range(len(rows)) if needed and all(column[at].value is not None for column in needed)]
    cells = []
    for column in columns:
        members, like = [column[at] for at in complete], column[0]
        if all(cell.value is None for cell in members):
            kind: Kind = "not run" if any(cell.kind == "not run" for cell in column) else "none"
            runs = tuple(run for cell in members for run in cell.runs)
            cells.append(Cell(kind, runs, like.encoder, like.metric, like.group, detail="no draw has every number"))
        elif len(members) > 1:
            cells.append(mean_cell(members, "draws"))
        else:
            kind, [one] = "difference" if members[0].kind == "difference" else "mean", members
            cells.append(Cell(kind, one.runs, one.encoder, one.metric, one.group, one.value, detail="of one draw", count=1))
    for start in range(0, len(cells), width):
        cells[start : start + scores] = mark_best(cells[start : start + scores])
    return Row("Mean" if len(complete) == len(rows) else f"Mean ({len(complete)} of {len(rows)})", tuple(cells))


def own_tables(params: Params, records: Records) -> list[Table]:
    """Tables of the evaluations with separate tables, by subset and encoder, or by encoder for other data sets."""
    tables: list[Table] = []
    for kind in evaluations.names():
        runs = asked_of(params, kind) if evaluations.own_table(kind) else ()
        if runs and evaluations.columns(params.evaluation, kind):
            tables += _target_tables(params, records, kind) if _targets(params, kind) else _own_tables(params, records, kind)
    return tables


def _targets(params: Params, kind: str) -> tuple[str, ...]:
    """The other data sets of an evaluation."""
    return tuple(getattr(getattr(params.evaluation, kind), "sets", ()))


def _own_tables(params: Params, records: Records, kind: str) -> Iterator[Table]:
    """One table for each subset and encoder; the teacher's only if some run has a teacher."""
    metrics = evaluations.columns(params.evaluation, kind)
    for subset in dict.fromkeys(params.runs[name].data.subset for name in asked_of(params, kind)):
        found = [records.runs[name] for name in asked_of(params, kind) if params.runs[name].data.subset == subset]
        done = [run.own[kind] for run in found if kind in run.own]
        notes = [evaluations.note(kind)]
        if done:
            record, more = done[0].record, getattr(evaluations.load(kind), "notes", lambda settings: ())
            notes = [
                f"Protocol: {record.protocol}.",
                f"n = {text.count(len(done[0].label))} queries.",
                *more(record.settings),
                *notes,
            ]
        for encoder in ENCODERS if any(key[0] == "teacher" for one in done for key in one.scores) else ENCODERS[:1]:
            words = [(metric, *head(metric).partition(", ")) for metric in metrics]
            heads = [
                (Column(first, rest) if rest else Column(encoder.capitalize(), first), (encoder, metric, "all"))
                for metric, first, _, rest in words
            ]
            name, title = f"{kind.replace('_', '-')}-{subset}-{encoder}", f"{evaluations.title(kind)}: {subset}, {encoder}"
            blank = Table(name, title, "Run", notes=tuple(filter(None, notes)), main=encoder == "student")
            yield run_table(params, found, heads, blank)


def _target_tables(params: Params, records: Records, kind: str) -> Iterator[Table]:
    """The student's table and, if some run has a teacher, the teacher's, with one column per data set and their mean."""
    found, keys = [records.runs[name] for name in asked_of(params, kind)], _targets(params, kind)
    done = [run.targets[kind] for run in found if kind in run.targets]
    sets = {key: one for targets in done for key, one in targets.sets.items()}
    sizes = [
        f"{one.dataset}, {text.count(one.train)} training, {text.count(one.search - one.train)} validation"
        f" and {text.count(one.query)} test images"
        for one in (evaluation.record.manifest for evaluation in sets.values())
    ]
    notes = (f"Protocol: {done[0].record.protocol}.", f"Images of each data set: {'; '.join(sizes)}.") if done else ()
    encoders = {"student", *(key[0] for one in sets.values() for key in one.scores)}
    for encoder in (one for one in ENCODERS if one in encoders):
        columns = []
        for key in keys:
            cells, one = mark_best([target_cell(run, kind, encoder, key) for run in found]), sets.get(key)
            named = Column(reported(one), with_n(one.record.manifest.dataset, cells)) if one else Column("Data set", key)
            columns.append((named, cells))
        if len(keys) > 1:
            means = [_mean_of_targets(kind, [cells[at] for _, cells in columns]) for at in range(len(found))]
            columns.append((Column("All", "mean"), mark_best(means)))
        title = f"{evaluations.title(kind)} to other data sets, {encoder}"
        blank = Table(f"{kind}-{encoder}", title, "Run", notes=notes, main=encoder == "student")
        yield by_columns(blank, [params.runs[run.run].label for run in found], columns, runs=[run.run for run in found])


def reported(one: Evaluation) -> str:
    """Which of the two accuracies is customary for a target data set."""
    per_class = isinstance(one.record, TargetEvaluation) and one.record.metric == "mean-per-class"
    return "mean per class" if per_class else "top-1"


def target_cell(run: RunRecords, kind: str, encoder: str, key: str) -> Cell:
    """The cell with the customary accuracy on a data set, or with the reason why there is none."""
    cell = Cell("none", (run.run,), encoder, f"{kind}-{key}", "all")
    if kind not in run.targets:
        return replace(cell, kind="not run", detail=f"no {kind} record")
    one = run.targets[kind].sets.get(key)
    if one is None:
        return replace(cell, kind="not run", detail=f"the {kind} record has no such data set")
    score = one.scores.get((encoder, kind, "all"))
    if score is None:
        return replace(cell, detail=f"this method has no {encoder}")
    cell = scored(cell, score, one.levels[encoder, kind, "all"])
    if reported(one) == "top-1":
        return cell
    hits, n = one.predictions[f"{encoder}/{kind}"] == one.label, np.bincount(one.label)
    mean, low, high = intervals.mean_per_class(np.bincount(one.label[hits], minlength=len(n)).tolist(), n.tolist())
    detail = (
        f"mean over {len(np.unique(one.label))} classes of the share classified correctly; {text.count(score.n)} queries;"
        f" the interval is 1.96 standard deviations of a binomial model per class; verification: {cell.level}"
    )
    return replace(cell, kind="mean", value=mean, correct=None, low=low, high=high, detail=detail)


def _mean_of_targets(kind: str, cells: Sequence[Cell]) -> Cell:
    """The mean of one run over all data sets; no number if one is missing."""
    like, values = cells[0], [cell.value for cell in cells if cell.value is not None]
    blank = Cell("not run", like.runs, like.encoder, kind, like.group)
    if len(values) < len(cells):
        return replace(blank, detail=f"{len(values)} of {len(cells)} data sets have a number")
    level = RECORDED if any(cell.level == RECORDED for cell in cells) else like.level
    detail = f"mean of the {len(cells)} numbers to the left"
    return replace(blank, kind="mean", value=fmean(values), level=level, detail=detail)
