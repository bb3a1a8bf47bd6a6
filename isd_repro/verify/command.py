"""Command `verify`: checks every number of a rendered report against its record and the available files.

Records are scored again and compared with the parameters of their run; the report is rendered again and compared byte by byte.
If an encoder and its images are available, every evaluation is repeated by the function that made its record, and the predictions
are compared. What cannot be checked because a file is not available is named.
"""

from __future__ import annotations

import time

from rich.console import Console

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.report.run_records import Records, load
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.progress import Progress
from isd_repro.verify.again import check_files, check_flips
from isd_repro.verify.findings import Verification, VerifyOptions
from isd_repro.verify.images import check_images
from isd_repro.verify.lock import check_lock
from isd_repro.verify.numbers import numbers_of
from isd_repro.verify.output import failed, show
from isd_repro.verify.records import CHECKS, Case
from isd_repro.verify.rendered import check_rendered
from isd_repro.verify.rule import check_rule
from isd_repro.verify.stated import check_parameters


def verify(params: Params, layout: Layout, options: VerifyOptions, console: Console) -> None:
    """Print a verdict for every number and the state of every check; tables or JSON on standard output, progress on `console`.

    Raises:
        ConfigError: no such run, or a method's parameters are wrong.
        DataError: after the account, where anything failed.
        UserError: a package of the extra `report` is missing.
    """
    started = time.monotonic()
    for name in options.runs:
        find_run(params, name)
    state = Verification(params, layout, options, Progress(console))
    records = load(params, layout, state.problems.append)
    check_parameters(state, records)
    _check_records(state, records)
    check_images(state, records)
    check_lock(state, records)
    check_rule(state, records)
    state.notes += [f"records of {run}, which is not a run in params.yaml, are not in any table" for run in records.strays]
    if not options.quick:
        for name in options.runs or params.runs:
            check_files(state, name, records.runs[name])
        check_flips(state)
    numbers = numbers_of(state, records, check_rendered(state, records))
    show(state, numbers, time.monotonic() - started)
    if state.problems:
        raise DataError(f"{failed(state)}, named above", "docs/verify.md says what each step compares")


def _check_records(state: Verification, records: Records) -> None:
    """Check the records of every run that has any."""
    for name, found in records.runs.items():
        if found.manifest is None:
            continue
        run = state.params.runs[name]
        case = Case(name, run, state.params.subsets[run.data.subset], state.layout, found, found.manifest)
        for title, check in CHECKS.items():
            state.note(title, name, check(case), name)
