"""The top of a page: its result in one sentence, then what was run, scale, certainty and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from isd_repro.config.params import Hypothesis, Params
from isd_repro.records import SHOTS
from isd_repro.report import hypothesis, intervals, text, trials
from isd_repro.report.cells import Cell, Table
from isd_repro.report.repetitions import families, method_name, methods, repetitions, rivals, runs_of
from isd_repro.report.run_records import Records
from isd_repro.report.scores import method_cell
from isd_repro.report.tables import first_metric, groups_of

NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "resnet-narrow": "narrow ResNet",
    "pixels": "raw pixels",
}
Fact = tuple[str, str]


def result(params: Params, records: Records) -> str:
    """What the profile shows, in one sentence; empty where nothing has been scored."""
    if params.report.hypothesis:
        return _difference(params, records, params.report.hypothesis)
    if asked := params.report.trials:
        best = [(method_name(params, cell.runs[0]), cell.value) for cell in trials.chosen(params, records, asked).values()]
        chosen = text.listing([f"{label} ({text.one_decimal(value or 0)} %)" for label, value in best])
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
    """One method less another over repeated draws."""
    done = hypothesis.compared(params, records, asked, (asked.encoder, f"{asked.k}-NN", asked.group))
    if done is None:
        return ""
    mean, interval = fmean(done.values), intervals.student_interval(done.values)
    side = "above" if mean > 0 else "below"
    between = f", 95 % interval {text.signed(interval[0], 2)} to {text.signed(interval[1], 2)}" if interval else ""
    verdict = hypothesis.outcome(asked, done.values)
    judged = "" if verdict == "no verdict" else f"; verdict by the stated rule: {verdict}"
    reading = f" {asked.readings[verdict]}" if verdict in asked.readings else ""
    return (
        f"{asked.first} is {text.decimal(abs(mean), 2)} points {side} {asked.second} on {asked.group} queries ({asked.k}-NN,"
        f" {asked.encoder}; mean of {len(done.values)} draws{between}){judged}.{reading}"
    )


def _levels(params: Params, records: Records, subset: str, pair: tuple[str, str]) -> str:
    """Both methods' accuracy on one subset, and what stands behind it."""
    runs, metric = methods(params, [subset]), first_metric(params)
    said, behind = [], ""
    groups = groups_of(params, records, subset)
    for group in dict.fromkeys((groups[0], "rare" if "rare" in groups else groups[-1])):
        cells = [method_cell(records, runs[name][subset], ("student", metric, group)) for name in pair]
        if all(cell.value is not None for cell in cells):
            values = [f"{text.one_decimal(cell.value or 0)} %" for cell in cells]
            said.append(f"{text.listing(values)} on {group}{'-shot' if group in SHOTS else ''} queries")
            seeds = [cell.count or 1 for cell in cells]
            behind = (
                f"means of {seeds[0]} and {seeds[1]} seeds"
                if max(seeds) > 1
                else "one training each, so the difference may be due to the seed"
            )
    return f"{text.listing(list(pair))} reach {text.listing(said)} ({metric}, student; {behind})." if said else ""


def facts(params: Params, records: Records, tables: Sequence[Table], tally: tuple[int, int]) -> list[Fact]:
    """A few facts as (question, answer), all computed; `tally` as `numbers.tally` gives it."""
    found = [
        ("What was run", _run(params, records, tally)),
        ("Scale", _scale(params, records)),
        ("How certain", _certainty(params, records, tables)),
        ("Compared with the paper", _verdicts(params, tables)),
        ("Not done", _missing(params, records)),
    ]
    return [(question, answer) for question, answer in found if answer]


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
        if manifest:
            counts = f"{text.count(manifest.train)} training images of {len(manifest.classes)} classes"
            images = f"{counts}, {text.count(manifest.query)} queries"
        else:
            images = "the authors' lists" if config.rule.name == "list" else config.rule.in_words()
        draws = f"{len(subsets)} draws of " if len(subsets) > 1 else ""
        said.append(f"{draws}{config.source.dataset} ({images})")
    trained = [run for run in params.runs.values() if run.optim.epochs]
    networks = dict.fromkeys(NETWORKS[run.backbone.arch] for run in trained)
    sizes, epochs = sorted({run.data.image_size for run in trained}), sorted({run.optim.epochs for run in trained})
    spans = [str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}" for values in (sizes, epochs) if values]
    budget = f"; {text.listing(list(networks))} at {spans[0]} px, {spans[1]} epochs" if spans else ""
    return f"{text.listing(said)}{budget}."


def _cells(tables: Sequence[Table]) -> list[Cell]:
    return [cell for table in tables for row in (*table.rows, *table.foot) for cell in row.cells]


def _certainty(params: Params, records: Records, tables: Sequence[Table]) -> str:
    halves = sorted(
        (cell.high - cell.low) / 2
        for cell in _cells(tables)
        if cell.kind == "score" and cell.low is not None and cell.high is not None
    )
    if not halves:
        return ""
    seeds = max((sum(bool(records.runs[name].evaluations) for name in names) for names in _repeated(params)), default=1)
    draws = max((cell.count or 1 for table in tables for row in table.foot for cell in row.cells), default=1)
    behind = f"means are over up to {seeds} seeds" if seeds > 1 else "each score is from one run"
    if draws > 1:
        behind += f"; means are over up to {draws} seeds or draws, with their standard deviation"
    elif seeds < 2:
        behind += ", so the variation over seeds and draws is unknown"
    width = f"{text.one_decimal(halves[0])} to {text.one_decimal(halves[-1])}"
    return f"95 % intervals over queries of \N{PLUS-MINUS SIGN} {width} points; {behind}."


def _repeated(params: Params) -> list[list[str]]:
    return repetitions(params, list(params.runs))


def _verdicts(params: Params, tables: Sequence[Table]) -> str:
    """How many published numbers ours are within, outside, or cannot be judged by; and at half and twice the tolerance."""
    if not params.report.paper:
        return "No number here can be compared with the paper, because this profile does not run its protocol."
    judged = [cell for cell in _cells(tables) if cell.kind == "against" and cell.tolerance is not None]
    counts = Counter(cell.verdict or text.NOT_RUN for cell in judged)
    words = text.listing([f"{counts[name]} {name}" for name in ("within", "outside", "not comparable", text.NOT_RUN)])
    said = f"Of {text.count(len(judged))} published numbers with a tolerance fixed beforehand, ours are: {words}."
    done = [(abs(cell.value), cell.tolerance) for cell in judged if cell.value is not None and cell.tolerance is not None]
    if done:
        half, twice = (sum(off <= factor * points + 1e-9 for off, points in done) for factor in (0.5, 2))
        said += f" At half the tolerance {half} would be within, at twice {twice}."
    return said


def _missing(params: Params, records: Records) -> str:
    absent = [name for name, found in records.runs.items() if not found.evaluations]
    names = f"all {len(absent)} runs" if len(absent) == len(params.runs) else text.listing(absent)
    parts = [f"not run: {names}"] if absent else []
    parts += ["no run is repeated with another seed"] if all(len(names) == 1 for names in _repeated(params)) else []
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else ""
