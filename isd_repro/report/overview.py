"""The overview of a page: its result in one sentence, what was run, and irregularities of its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from isd_repro.config.params import Hypothesis, Params, in_words
from isd_repro.records import SHOTS
from isd_repro.report import hypothesis, intervals, text, trials
from isd_repro.report.cells import Table
from isd_repro.report.repetitions import families, method_name, methods, rivals, runs_of
from isd_repro.report.run_details import changes
from isd_repro.report.run_records import Records
from isd_repro.report.scores import method_cell
from isd_repro.report.tables import externals_of, first_metric, groups_of

NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet-narrow": "narrow ResNet",
    "pixels": "raw pixels",
}
Fact = tuple[str, str]


def result(params: Params, records: Records) -> str:
    """The result of the profile in one sentence; empty if nothing has been scored."""
    if params.report.hypothesis:
        return _difference(params, records, params.report.hypothesis)
    if asked := params.report.trials:
        best = [(method_name(params, cell.runs[0]), cell.value) for cell in trials.chosen(params, records, asked).values()]
        chosen = text.listing([f"{label} ({text.decimal(value or 0)} %)" for label, value in best])
        return f"Chosen among the trials by {asked.k}-NN accuracy on {asked.group} queries: {chosen}." if best else ""
    for subsets in families(params):
        pair = rivals(params, subsets)
        if pair and len(subsets) == 1:
            return _levels(params, records, subsets[0], pair)
        if pair is None:
            continue
        group: Literal["rare", "all"] = "rare" if "rare" in groups_of(params, records, subsets[0]) else "all"
        stated = Hypothesis(first=pair[0], second=pair[1], group=group, k=params.evaluation.knn.k[0])
        return _difference(params, records, stated)
    return ""


def _difference(params: Params, records: Records, asked: Hypothesis) -> str:
    """The sentence on one method minus another over repeated draws."""
    done = hypothesis.compared(params, records, asked, (asked.encoder, f"{asked.k}-NN", asked.group))
    if done is None:
        return ""
    mean, interval = fmean(done.values), intervals.student_interval(done.values)
    side = "above" if mean > 0 else "below"
    between = f", 95 % interval {text.span(interval)}" if interval else ""
    verdict = hypothesis.outcome(asked, done.values)
    judged = "" if verdict == "no verdict" else f"; verdict by the stated rule: {verdict}"
    reading = f" {asked.readings[verdict]}" if verdict in asked.readings else ""
    return (
        f"{asked.first} is {text.decimal(abs(mean), 2)} points {side} {asked.second} on {asked.group} queries ({asked.k}-NN,"
        f" {asked.encoder}; mean of {len(done.values)} draws{between}){judged}.{reading}"
    )


def _levels(params: Params, records: Records, subset: str, pair: tuple[str, str]) -> str:
    """The sentence on both methods' accuracy on one subset, and its basis."""
    runs, metric = methods(params, [subset]), first_metric(params)
    said, behind = [], ""
    groups = groups_of(params, records, subset)
    for group in dict.fromkeys((groups[0], "rare" if "rare" in groups else groups[-1])):
        cells = [method_cell(records, runs[name][subset], ("student", metric, group)) for name in pair]
        if all(cell.value is not None for cell in cells):
            values = [f"{text.decimal(cell.value or 0)} %" for cell in cells]
            said.append(f"{text.listing(values)} on {group}{'-shot' if group in SHOTS else ''} queries")
            seeds = [cell.count or 1 for cell in cells]
            behind = f"means of {' and '.join(map(str, dict.fromkeys(seeds)))} seeds"
            behind = behind if max(seeds) > 1 else "one training each, so the difference may be due to the seed"
    return f"{text.listing(list(pair))} reach {text.listing(said)} ({metric}, student; {behind})." if said else ""


def facts(params: Params, records: Records, tables: Sequence[Table], tally: tuple[int, int]) -> list[Fact]:
    """Computed facts about the page as (question, answer); `tally` is the result of `numbers.tally`."""
    return [
        ("What was run", _run(params, records, tally)),
        ("Scale", _scale(params, records)),
        ("Compared with the paper", _verdicts(params, tables)),
    ]


def _run(params: Params, records: Records, tally: tuple[int, int]) -> str:
    evaluated = [name for name, found in records.runs.items() if found.evaluations]
    if not evaluated:
        return f"Nothing yet: none of the {len(params.runs)} runs has a record."
    trained = sum(bool(found.pretrain and params.runs[name].optim.epochs) for name, found in records.runs.items())
    recomputed, recorded = tally
    checked = "all" if not recorded else f"{text.count(recomputed)} of"
    return (
        f"{len(evaluated)} of {len(params.runs)} runs have scores, {trained} of them trained; {checked}"
        f" {text.count(recomputed + recorded)} numbers of this page were recomputed from stored predictions."
    )


def _scale(params: Params, records: Records) -> str:
    said = []
    for subsets in families(params):
        config = params.subsets[subsets[0]]
        manifest = next(filter(None, (records.runs[run].manifest for subset in subsets for run in runs_of(params, subset))), None)
        images = "the authors' lists" if config.rule.name == "list" else in_words(config.rule)
        if manifest:
            counts = f"{text.count(manifest.train)} training images of {len(manifest.classes)} classes"
            images = f"{counts}, {text.count(manifest.query)} queries"
        draws = f"{len(subsets)} draws of " if len(subsets) > 1 else ""
        said.append(f"{draws}{config.source.dataset} ({images})")
    trained = [run for run in params.runs.values() if run.optim.epochs]
    networks = dict.fromkeys(NETWORKS[run.backbone.arch] for run in trained)
    sizes, epochs = sorted({run.data.image_size for run in trained}), sorted({run.optim.epochs for run in trained})
    spans = [str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}" for values in (sizes, epochs) if values]
    budget = f"; {text.listing(list(networks))} at {spans[0]} px, {spans[1]} epochs" if spans else ""
    return f"{text.listing(said)}{budget}."


def _verdicts(params: Params, tables: Sequence[Table]) -> str:
    """Counts of our numbers within and outside the paper's tolerance or not comparable; also at half and twice the tolerance."""
    if not params.report.paper:
        return "No number here can be compared with the paper, because this profile does not run its protocol."
    cells = [cell for table in tables for row in (*table.rows, *table.foot) for cell in row.cells]
    judged = [cell for cell in cells if cell.kind == "against" and cell.tolerance is not None]
    counts = Counter(cell.verdict or text.NOT_RUN for cell in judged)
    words = text.listing([f"{counts[name]} {name}" for name in ("within", "outside", "not comparable", text.NOT_RUN)])
    said = f"Of {text.count(len(judged))} published numbers with a tolerance fixed beforehand, ours are: {words}."
    done = [(abs(cell.value), cell.tolerance) for cell in judged if cell.value is not None and cell.tolerance is not None]
    if done:
        half, twice = (sum(off <= factor * points + 1e-9 for off, points in done) for factor in (0.5, 2))
        said += f" At half the tolerance {half} would be within, at twice {twice}."
    return said


def footnotes(params: Params, records: Records, recorded: int) -> list[str]:
    """One sentence for each irregularity; `recorded` numbers cannot be recomputed."""
    notes = []
    if recorded:
        why = "without stored predictions they cannot be recomputed"
        notes.append(f"{text.count(recorded)} numbers are recorded only (scores with \N{DAGGER}): {why}.")
    parts = [(name, part, record.provenance) for name, run in records.runs.items() for part, record in run.of_one_encoder.items()]
    if dirty := dict.fromkeys(name for name, _, origin in parts if origin.dirty):
        notes.append(f"Produced with uncommitted changes: {text.listing(list(dirty))}.")
    if unknown := dict.fromkeys(name for name, _, origin in parts if origin.commit is None):
        notes.append(f"Produced outside a git checkout; the commit is unknown: {text.listing(list(unknown))}.")
    for part in dict.fromkeys(part for _, part, _ in parts):
        sources = {origin.source for _, of, origin in parts if of == part}
        if len(sources) > 1:
            notes.append(f"The {part} records come from {len(sources)} versions of the package's source.")
    for name, run in records.runs.items():
        if run.pretrain:
            if len(run.pretrain.sources) > 1:
                notes.append(f"{name} was trained in {len(run.pretrain.sources)} sessions with different versions of the source.")
            notes += [f"{name}: {warning}." for warning in run.pretrain.warnings]
            if changed := changes(params.runs[name], run.pretrain.config):
                notes.append(f"{name} was made with parameters that differ from the current params.yaml: {'; '.join(changed)}.")
    notes += _externals(params, records)
    if records.strays:
        notes.append(f"Records without a run in params.yaml are not shown: {text.listing(list(records.strays))}.")
    return notes


def _externals(params: Params, records: Records) -> list[str]:
    """The source of each evaluated checkpoint, or why it has no row."""
    single = [subsets[0] for subsets in families(params) if len(subsets) == 1]
    shown = {external.record.name for subset in single for external in externals_of(params, records, subset)}
    notes = []
    for external in records.externals:
        record = external.record
        protocols = text.listing([f"{part.kind}: {part.protocol}" for part in record.evaluations])
        about = f"{external.label} is an evaluated checkpoint, not a run of this profile: {record.file}, sha256 {record.sha256}"
        where = "" if record.name in shown else "; it has no row, because no table here uses the same images"
        notes.append(f"{about} ({record.layout}, {record.arch}; {protocols}){where}. Made by {record.command}.")
        notes += [f"{external.label}: {warning}." for warning in record.warnings]
    return notes
