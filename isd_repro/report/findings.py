"""Sentences that say what the tables show, computed from the records, whichever way they come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isd_repro.config.params import Params
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Table
from isd_repro.report.pivot import compare, contest, discordant, draw_cell, families, methods, peer
from isd_repro.report.pool import SIGNIFICANT, evidence
from isd_repro.report.records import RECOMPUTED, RECORDED, Records
from isd_repro.report.run_details import changes
from isd_repro.report.tables import externals_of, groups_of, head, runs_of, score_cell


@dataclass(frozen=True)
class Finding:
    """One sentence; `lead` is its subject, printed with more weight."""

    lead: str
    body: str

    @property
    def plain(self) -> str:
        """The whole sentence."""
        return f"{self.lead}: {self.body}"


def subset_findings(params: Params, records: Records, subset: str) -> list[Finding]:
    """Each trained run against the untrained encoder and raw pixels, then the method under test against the others."""
    metric = f"{params.evaluation.knn.k[0]}-NN"
    aside = {name: peer(params, run, subset) for name, run in _references(params).items()}
    found = []
    for run in runs_of(params, subset):
        cell = score_cell(records.runs[run], "student", metric, "all")
        others = {name: other for name, other in aside.items() if other is not None and other != run}
        if cell.value is None or cell.level == RECORDED or run in aside.values() or not others:
            continue
        scores = {name: score_cell(records.runs[other], "student", metric, "all") for name, other in others.items()}
        lead = f"{params.runs[run].label} {text.one_decimal(cell.value)} ({head(metric)}, student)"
        found.append(Finding(lead, f"{text.listing([_against(records, cell, *other) for other in scores.items()])}."))
    return found if params.report.trials else found + _rivals(params, records, subset, metric)


def _references(params: Params) -> dict[str, str]:
    named = {"the untrained encoder": params.report.reference, "raw pixels": params.report.pixels}
    return {name: run for name, run in named.items() if run}


def _against(records: Records, cell: Cell, name: str, other: Cell) -> str:
    """`+36.2 points over the untrained encoder (p < 0.001)`, or as plainly that it does not beat it."""
    if cell.value is None or other.value is None:
        return f"no comparison with {name}, which has not been run"
    difference = cell.value - other.value
    pair = discordant(records, cell, other)
    p = intervals.sign_test(*pair) if pair else None
    test = f" ({text.p_value(p)})" if p is not None else ""
    points = f"{text.signed(difference)} points"
    if difference > 0:
        chance = ", within chance" if p is not None and p >= SIGNIFICANT else ""
        return f"{points} over {name}{chance}{test}"
    if difference == 0:
        return f"level with {name}, which it does not beat"
    chance = ", although within chance" if p is not None and p >= SIGNIFICANT else ""
    return f"{points} against {name}, which it does not beat{chance}{test}"


def _rivals(params: Params, records: Records, subset: str, metric: str) -> list[Finding]:
    subject, others = contest(params, [subset])
    seeds = {name: of_subset[subset] for name, of_subset in methods(params, [subset]).items()}
    found = []
    for other in others if subject else []:
        parts = []
        for group in groups_of(params, records, subset):
            ours, theirs = (draw_cell(records, seeds[name], ("student", metric, group)) for name in (str(subject), other))
            if ours.value is not None and theirs.value is not None:
                paired = compare(records, ours, theirs)
                spread = f"means of {ours.count or 1} and {theirs.count or 1} seeds, s.d. {_spread(ours)} and {_spread(theirs)}"
                said = paired or (spread if ours.count or theirs.count else "")
                parts.append(f"{text.signed(ours.value - theirs.value)} points on {group} queries{said and f' ({said})'}")
        if parts:
            found.append(Finding(f"{subject} against {other} ({head(metric)}, student)", f"{text.listing(parts)}."))
    return found


def pivot_findings(params: Params, subsets: Sequence[str], tables: Sequence[Table]) -> list[Finding]:
    """Mean difference over the draws in every group, its interval and a permutation test over draws; from the main table."""
    subject, others = contest(params, subsets)
    table = tables[0]
    width = len(methods(params, subsets)) + len(others)
    stated = params.report.hypothesis and {params.report.hypothesis.first, params.report.hypothesis.second}
    found = []
    for at, column in enumerate(table.columns):
        cells = [row.cells[at] for row in table.rows if row.cells[at].kind == "difference" and row.cells[at].value is not None]
        values = [cell.value for cell in cells if cell.value is not None]
        if not values:
            continue
        other = others[at % width - (width - len(others))]
        if stated == {subject, other}:
            continue  # its table has every group, with the interval that its rule looks at
        paired = intervals.paired(values)
        spread = "" if paired.deviation is None else f" (standard deviation {paired.deviation:.1f})"
        body = (
            f"{text.signed(paired.mean)} points on average over {paired.n} of {len(table.rows)} draws{spread};"
            f" {evidence(paired)}; {subject} is ahead on {paired.above}, behind on {paired.below}."
        )
        found.append(Finding(f"{subject} against {other}, {column.span[:1].lower()}{column.span[1:]}", body))
    return found


def _spread(cell: Cell) -> str:
    return "unknown" if cell.deviation is None else text.one_decimal(cell.deviation)


def verified(records: Records) -> tuple[int, int]:
    """How many scores were recomputed from stored predictions, and how many are recorded only."""
    every = [*records.runs.values(), *(external.found for external in records.externals)]
    levels = [level for run in every for part in run.evaluations for level in part.levels.values()]
    return levels.count(RECOMPUTED), levels.count(RECORDED)


def footnotes(params: Params, records: Records) -> list[str]:
    """What a reader must know before trusting the numbers: whatever is odd about a record."""
    recorded = verified(records)[1]
    notes = []
    if recorded:
        notes.append(
            f"{text.count(recorded)} scores are recorded only (\N{DAGGER}): no predictions are stored, so nothing checks them."
        )
    parts = [(name, part, record) for name, run in records.runs.items() for part, record in run.parts.items()]
    dirty = list(dict.fromkeys(name for name, _, record in parts if record.provenance.dirty))
    if dirty:
        notes.append(f"Made with uncommitted changes in the checkout: {text.listing(dirty)}.")
    if any(record.provenance.commit is None for _, _, record in parts):
        unknown = list(dict.fromkeys(name for name, _, record in parts if record.provenance.commit is None))
        notes.append(f"Made outside a git checkout, so without a commit: {text.listing(unknown)}.")
    for part in ("pretrain", "knn", "linear", "few_label", "transfer"):
        sources = {record.provenance.source for _, of, record in parts if of == part}
        if len(sources) > 1:
            notes.append(f"The {part} records come from {len(sources)} versions of the package's source.")
    for name, run in records.runs.items():
        if run.pretrain and len(run.pretrain.sources) > 1:
            notes.append(f"{name} was trained in {len(run.pretrain.sources)} sessions under different versions of the source.")
        notes += [f"{name}: {warning}." for warning in run.pretrain.warnings] if run.pretrain else []
        changed = changes(params.runs[name], run.pretrain.config) if run.pretrain else []
        if changed:
            notes.append(f"{name} was made with other parameters than params.yaml states now: {'; '.join(changed)}.")
    notes += _externals(params, records)
    if records.strays:
        notes.append(f"Records without a run in params.yaml, not shown: {text.listing(list(records.strays))}.")
    return notes


def _externals(params: Params, records: Records) -> list[str]:
    """What is known of each evaluated checkpoint, or why it has no row."""
    single = [subsets[0] for subsets in families(params) if len(subsets) == 1]
    shown = {external.record.name for subset in single for external in externals_of(params, records, subset)}
    notes = []
    for external in records.externals:
        record = external.record
        protocols = text.listing([f"{part.kind}: {part.protocol}" for part in record.evaluations])
        about = f"{external.label} is an evaluated checkpoint, not a run of this profile: {record.file}, sha256 {record.sha256}"
        where = "" if record.name in shown else "; it has no row, because no table here is of the same images"
        notes.append(f"{about} ({record.layout}, {record.arch}; {protocols}){where}. Made by {record.command}.")
        notes += [f"{external.label}: {warning}." for warning in record.warnings]
    return notes
