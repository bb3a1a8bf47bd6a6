"""What a reader wants to know in a minute: what was reproduced, at which scale, with what uncertainty, and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from isd_repro.config.params import Params
from isd_repro.report import text
from isd_repro.report.cells import Cell, Finding, Table
from isd_repro.report.footnotes import verified
from isd_repro.report.records import Records
from isd_repro.report.repetitions import families, repetitions, runs_of, under_test
from isd_repro.report.tables import rule_text

NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "resnet-narrow": "narrow ResNet", "pixels": "raw pixels"}
Fact = tuple[str, str]


def at_a_glance(params: Params, records: Records, tables: Sequence[Table], findings: Sequence[Finding]) -> list[Fact]:
    """A few facts as (question, answer), all computed."""
    facts = [
        ("What was run", _run(params, records)),
        ("At which scale", _scale(params, records)),
        ("How certain", _certainty(params, records, tables)),
        ("Beside the paper", _verdicts(params, tables)),
    ]
    result = _result(params, tables, findings)
    missing = _missing(params, records)
    return facts + ([("Main result", result)] if result else []) + ([("Not done", missing)] if missing else [])


def _trained(params: Params, records: Records) -> list[str]:
    return [name for name, found in records.runs.items() if found.pretrain and params.runs[name].optim.epochs]


def _run(params: Params, records: Records) -> str:
    evaluated = [name for name, found in records.runs.items() if found.knn or found.linear]
    if not evaluated:
        return f"Nothing yet: none of {len(params.runs)} runs has a record."
    recomputed, recorded = verified(records)
    checked = "all" if not recorded else f"{text.count(recomputed)} of"
    total = text.count(recomputed + recorded)
    trained = len(_trained(params, records))
    return (
        f"{len(evaluated)} of {len(params.runs)} runs have scores, {trained} of them trained; {checked} {total} scores were"
        " recomputed from stored predictions."
    )


def _scale(params: Params, records: Records) -> str:
    said = []
    for subsets in families(params):
        config = params.subsets[subsets[0]]
        manifest = next(filter(None, (records.runs[run].manifest for subset in subsets for run in runs_of(params, subset))), None)
        if manifest:
            images = (
                f"{text.count(manifest.train)} training images of {len(manifest.classes)} classes,"
                f" {text.count(manifest.query)} queries"
            )
        else:
            images = "the authors' lists" if config.rule.name == "list" else rule_text(params, subsets[0])
        draws = f"{len(subsets)} draws of " if len(subsets) > 1 else ""
        said.append(f"{draws}{config.source.dataset} ({images})")
    trained = [run for run in params.runs.values() if run.optim.epochs]
    networks = dict.fromkeys(NETWORKS[run.backbone.arch] for run in trained)
    sizes = sorted({run.data.image_size for run in trained})
    epochs = sorted({run.optim.epochs for run in trained})
    spans = [str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}" for values in (sizes, epochs) if values]
    budget = f"; {text.listing(list(networks))} at {spans[0]} px, {spans[1]} epochs" if spans else ""
    return f"{text.listing(said)}{budget}."


def _certainty(params: Params, records: Records, tables: Sequence[Table]) -> str:
    scores = [cell for cell in _cells(tables) if cell.kind == "score"]
    if not scores:
        return "Nothing to be uncertain of yet."
    halves = sorted((cell.high - cell.low) / 2 for cell in scores if cell.low is not None and cell.high is not None)
    seeds = max(
        (sum(bool(records.runs[name].knn) for name in names) for names in repetitions(params, list(params.runs))), default=1
    )
    draws = max((cell.count or 1 for table in tables for row in table.foot for cell in row.cells), default=1)
    behind = "one run stands behind each score" if seeds < 2 else f"up to {seeds} seeds stand behind a mean"
    over = f"; means are over up to {draws} seeds or draws, with their standard deviation" if draws > 1 else ""
    spread = "" if seeds > 1 or draws > 1 else ", so nothing is known of the spread over seeds and draws"
    width = f"{text.one_decimal(halves[0])} to {text.one_decimal(halves[-1])}"
    return f"95 % intervals over queries of \N{PLUS-MINUS SIGN} {width} points; {behind}{over}{spread}."


def _cells(tables: Sequence[Table]) -> list[Cell]:
    return [cell for table in tables for row in (*table.rows, *table.foot) for cell in row.cells]


def _verdicts(params: Params, tables: Sequence[Table]) -> str:
    """How many published numbers ours are within, outside, or cannot be judged by; and at half and twice the tolerance."""
    if not params.report.paper:
        return "No number here stands beside one of the paper: this profile does not run its protocol."
    judged = [cell for cell in _cells(tables) if cell.kind == "against" and cell.tolerance is not None]
    counts = Counter(cell.verdict or text.NOT_RUN for cell in judged)
    words = text.listing([f"{counts[name]} {name}" for name in ("within", "outside", "not comparable", text.NOT_RUN)])
    said = f"Of {text.count(len(judged))} published numbers with a tolerance fixed beforehand, ours are: {words}."
    done = [(abs(cell.value), cell.tolerance) for cell in judged if cell.value is not None and cell.tolerance is not None]
    if done:
        half, twice = (sum(off <= factor * points + 1e-9 for off, points in done) for factor in (0.5, 2))
        said += f" At half the tolerance {half} would be within, at twice {twice}."
    return said


def _result(params: Params, tables: Sequence[Table], findings: Sequence[Finding]) -> str:
    """What the profile asks for, else by how much the method under test exceeds the others."""
    if params.report.hypothesis:
        return " ".join(finding.plain for finding in findings[:1])
    if params.report.trials:
        taken = [row for table in tables if table.id == "trials-taken" for row in table.rows]
        return "".join(f"Taken: {'; '.join(f'{row.label}, {row.cells[0].plain} %' for row in taken)}." if taken else "")
    subject = next(filter(None, (under_test(params, subsets)[0] for subsets in families(params))), None)
    rivals = {name for subsets in families(params) for name in under_test(params, subsets)[1]}
    said = []
    for table in tables:
        for row in table.rows if table.id.endswith("-differences") else ():
            if row.label in {f"{subject} {text.MINUS} {other}" for other in rivals}:
                points = [f"{cell.number} on {cell.group}" for cell in row.cells if cell.kind == "difference"]
                said.append(f"{row.label} ({table.columns[0].head}): {text.listing(points)} queries.")
        rows = table.rows if "-against-" in table.id else ()
        said += [f"{table.title}, {row.label}: {row.cells[2].number} points on average." for row in rows]
    return " ".join(said[:3])


def _missing(params: Params, records: Records) -> str:
    parts = []
    absent = [name for name, found in records.runs.items() if not found.knn and not found.linear]
    if absent:
        names = f"all {len(absent)} runs" if len(absent) == len(params.runs) else text.listing(absent)
        parts.append(f"not run: {names}")
    asked = (
        ("linear evaluation", params.linear_runs, "linear"),
        ("few labels", params.few_label_runs, "few_label"),
        ("transfer", params.transfer_runs, "transfer"),
        ("snapshots", params.trajectory_runs, "trajectory"),
    )
    for words, wanted, part in asked:
        lacking = [name for name in wanted if getattr(records.runs[name], part) is None and name not in absent]
        parts += [f"{words} of {text.listing(lacking)}"] if lacking else []
    never = [words for words, wanted, _ in asked if not wanted]
    parts += [f"outside this profile: {text.listing(never)}"] if never else []
    alone = all(len(names) == 1 for names in repetitions(params, list(params.runs)))
    parts += ["no run is repeated with another seed"] if alone else []
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else ""
