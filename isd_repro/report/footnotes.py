"""Footnotes of a report: how many numbers are checked, and irregularities of records."""

from __future__ import annotations

from isd_repro.config.params import Params
from isd_repro.report import text
from isd_repro.report.repetitions import families
from isd_repro.report.run_details import changes
from isd_repro.report.run_records import Records
from isd_repro.report.tables import externals_of


def footnotes(params: Params, records: Records, recorded: int) -> list[str]:
    """One sentence for each irregularity; `recorded` numbers cannot be recomputed."""
    notes = []
    if recorded:
        notes.append(
            f"{text.count(recorded)} numbers are recorded only (scores with \N{DAGGER}): without stored predictions they cannot"
            " be recomputed."
        )
    parts = [(name, part, record.provenance) for name, run in records.runs.items() for part, record in run.of_one_encoder.items()]
    for words, named in (
        ("Made with uncommitted changes in the checkout", [name for name, _, origin in parts if origin.dirty]),
        ("Made outside a git checkout, so without a commit", [name for name, _, origin in parts if origin.commit is None]),
    ):
        notes += [f"{words}: {text.listing(list(dict.fromkeys(named)))}."] if named else []
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
