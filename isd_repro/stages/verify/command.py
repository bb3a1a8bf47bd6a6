"""Command `verify`: from every number of a rendered report to its record, and on to the files that are here."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console

from isd_repro import methods
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.data.prepare import rule_of
from isd_repro.report import account, cards, declared, page, rendered, verdicts
from isd_repro.report.account import Account
from isd_repro.report.faults import Fault
from isd_repro.report.records import Records, load
from isd_repro.report.rendered import Place
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.progress import Progress
from isd_repro.stages.verify import targets
from isd_repro.stages.verify.files import walk_files
from isd_repro.stages.verify.walk import Asked, Walk


def verify(params: Params, layout: Layout, asked: Asked, console: Console) -> None:
    """Print a verdict for every number; tables or JSON on standard output, progress on `console`.

    Raises:
        ConfigError: no such run, or a method's parameters are wrong.
        DataError: after the account, where anything failed.
        UserError: a package of the extra `report` is missing.
    """
    started = time.monotonic()
    for name in asked.runs:
        find_run(params, name)
    walk = Walk(params, layout, asked, Progress(console))
    records = load(params, layout, walk.faults.append)
    planned = declared.Planned(
        methods={name: _method(name, params, layout) for name in params.runs},
        rules={name: rule_of(subset) for name, subset in params.subsets.items()},
    )
    walk.faults += declared.parameters(params, records, layout, planned)
    walk.faults += [*declared.copies(records, layout), *declared.locked(records, layout)]
    beside = declared.unlocked(records, layout)
    walk.notes += [f"not in dvc.lock, so no stage of DVC made them: {', '.join(beside)}"] if beside else []
    walk.notes += [f"records of {run}, which is no run of the parameters, are in no table" for run in records.strays]
    for name, run in records.runs.items():
        targets.declared(walk, name, run)
    if not asked.quick:
        for name in asked.runs or params.runs:
            walk_files(walk, name, records.runs[name])
    numbers = _rendered(walk, records)
    found = Account(params.profile, layout.root, numbers, walk.faults, walk.notes, time.monotonic() - started)
    if asked.as_json:
        sys.stdout.write(json.dumps(account.as_json(found), indent=1, sort_keys=True, allow_nan=False) + "\n")
    else:
        account.show(found, Console(file=sys.stdout, highlight=False))
    if found.faults:
        raise DataError(f"{found.failed}, named above", "docs/verify.md says what each step compares")


def _method(name: str, params: Params, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's `method` block with every default, and without."""
    named, config = {"name": params.runs[name].method.name}, methods.config_of(name, params.runs[name].method, layout.file)
    return {**named, **config.model_dump(mode="json")}, {**named, **config.model_dump(mode="json", exclude_defaults=True)}


def _rendered(walk: Walk, records: Records) -> list[verdicts.Number]:
    """Compare the report with a fresh one, and judge its numbers."""
    layout, damaged = walk.layout, {run for fault in walk.faults for run in fault.runs}
    report = page.assemble(walk.params, records, layout, walk.faults.append)
    files = page.render(report)
    fresh = rendered.cells_of(files[rendered.CELLS]) or {}
    path = layout.report / rendered.CELLS
    disk = rendered.cells_of(path.read_bytes()) if path.is_file() else None
    cells: dict[Place, Fault] = {}
    if not layout.report.is_dir():
        walk.notes.append(f"no report in {walk.shown(layout.report)} yet: the numbers are those that `report` would render")
    else:
        if disk is not None:
            for place, fault in rendered.cell_faults(path, disk, fresh, rendered.cause(layout.report, files, path.name), damaged):
                cells.setdefault(place, fault)
                walk.faults.append(fault)
        if damaged:
            walk.notes.append("other rendered files were not compared: the faults of records and parameters come first")
        else:
            seen = {rendered.CELLS} if cells else set()
            walk.faults += [fault for fault in rendered.compare(layout.report, files) if fault.file.name not in seen]
            walk.faults += (
                rendered.compare(layout.cards, cards.render(walk.params, records, layout)) if layout.cards.is_dir() else []
            )
    shown = {**(disk or {}), **{place: cell for place, cell in fresh.items() if cell["value"] is not None or not disk}}
    evidence = verdicts.Evidence(records, walk.faults, frozenset(walk.replayed), cells, frozenset(walk.snapshots))
    runs, first = walk.params.runs, f"{walk.params.evaluation.knn.k[0]}-NN"
    snapshots = verdicts.judge_snapshots(
        evidence, walk.asked.runs, lambda run: (f"trajectory-{runs[run].data.subset}", runs[run].label, first)
    )
    return [*verdicts.judge(shown, evidence, walk.asked.runs), *snapshots]
