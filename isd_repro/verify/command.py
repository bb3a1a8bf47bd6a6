"""Command `verify`: checks every number of a rendered report against its record and the available files.

Records are scored again and compared with the parameters of their run; the report is rendered again and compared byte by byte.
If an encoder and its images are available, every evaluation is repeated by the function that made its record, and the predictions
are compared. What cannot be checked because a file is not available is named.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.report import text
from isd_repro.report.run_records import load
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.progress import Progress
from isd_repro.runtime.terminal import show_table
from isd_repro.verify.claims import check_images, check_parameters, check_records
from isd_repro.verify.commits import check_lock, check_rule
from isd_repro.verify.findings import State, Verdict, Verification, VerifyOptions
from isd_repro.verify.rendered import Number, check_rendered

_MEANING = {
    Verdict.RE_EVALUATED: "the encoder is available and reproduced every stored prediction",
    Verdict.RECOMPUTED: "computed again from the stored predictions",
    Verdict.RECORDED: "stored without predictions, so it cannot be checked",
    Verdict.FAILED: "a check of the number or of its files failed",
}
_STYLES = {"re-evaluated": "green", "proved": "green", "recorded only": "yellow", "not checked": "yellow", "failed": "bold red"}


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
    for check in (check_parameters, check_records, check_images, check_lock, check_rule):
        check(state, records)
    state.notes += [f"records of {run}, which is not a run in params.yaml, are not in any table" for run in records.strays]
    if not options.quick:
        from isd_repro.verify.again import check_files, check_flips

        for name in options.runs or params.runs:
            check_files(state, name, records.runs[name])
        check_flips(state)
    account = _account(state, check_rendered(state, records), time.monotonic() - started)
    if options.as_json:
        sys.stdout.write(json.dumps(account, indent=1, sort_keys=True, allow_nan=False) + "\n")
    else:
        _show(account)
    if state.problems:
        raise DataError(f"{_failed(account)}, named above", "docs/verify.md says what each step compares")


def _account(state: Verification, numbers: Sequence[Number], seconds: float) -> dict[str, Any]:
    """Everything that was found, as plain values."""
    by_run: dict[str, Counter[str]] = {}
    for number in numbers:
        name = number.runs[0] if len(number.runs) == 1 else "differences and means"
        by_run.setdefault(name, Counter())[str(number.verdict)] += 1
    checks: dict[str, dict[str, Any]] = {}
    told: dict[tuple[str, State, str], list[str]] = {}
    for one in state.findings:
        checks.setdefault(one.check, {**{str(key): 0 for key in State}, "reasons": []})[str(one.state)] += 1
        if one.why:
            told.setdefault((one.check, one.state, one.why), []).append(one.about)
    for (check, of, why), names in told.items():
        checks[check]["reasons"].append(f"{of} ({text.listing(names, 3)}): {state.shown(why)}")
    failures = []
    for bad in state.problems:
        words = {"file": bad.file, "key": bad.key, "found": bad.found, "expected": bad.expected, "do": bad.hint}
        failures.append({**{key: state.shown(value) for key, value in words.items()}, "runs": list(bad.runs)})
    return {
        "format": 1,
        "profile": state.params.profile,
        "ok": not state.problems,
        "checks": checks,
        "counts": {str(verdict): sum(of[verdict] for of in by_run.values()) for verdict in Verdict},
        "runs": {run: {str(verdict): of[verdict] for verdict in Verdict} for run, of in by_run.items()},
        "numbers": [{**one.as_json(), "reason": state.shown(one.reason) or None} for one in numbers],
        "failures": failures,
        "notes": [state.shown(note) for note in dict.fromkeys(state.notes)],
        "seconds": round(seconds, 1),
    }


def _failed(account: Mapping[str, Any]) -> str:
    count = len(account["failures"])
    return f"{count} check{'' if count == 1 else 's'} failed"


def _table(out: Console, title: str, first: str, columns: type[State | Verdict], rows: Mapping[str, Mapping[str, Any]]) -> None:
    shown = [str(column) for column in reversed(columns)]
    cells = [[name, *(Text(str(of[column] or ""), _STYLES.get(column, "")) for column in shown)] for name, of in rows.items()]
    show_table(out, [first, *shown], cells, title)


def _show(account: Mapping[str, Any]) -> None:
    """Failures, the state of every check and the verdict of every number as text; in a pipe nothing is cut."""
    out = Console(file=sys.stdout, highlight=False)
    out.width = out.width if out.is_terminal else max(out.width, 130)

    def say(words: object, style: str = "") -> None:
        out.print(str(words), style=style, markup=False, soft_wrap=True)

    for one in account["failures"]:
        say(one["file"], "bold red")
        for term in ("key", "found", "expected", "do"):
            say(f"  {term:<9} {one[term]}")
    if account["checks"]:
        _table(out, f"{account['profile']}: checks of runs, images and the lock", "check", State, account["checks"])
    for check, one in account["checks"].items():
        for reason in one["reasons"]:
            say(f"{check}: {reason}", "dim")
    _table(out, f"{account['profile']}: numbers by verdict", "run", Verdict, account["runs"])
    for verdict, meaning in _MEANING.items():
        if account["counts"][verdict]:
            say(f"{verdict}: {meaning}", "dim")
    for note in account["notes"]:
        say(f"note: {note}", "dim")
    counts = ((verdict, account["counts"][verdict]) for verdict in reversed(Verdict))
    each = ", ".join(f"{count} {verdict}" for verdict, count in counts if count) or "none"
    say(f"{len(account['numbers']):,} numbers: {each}; {_failed(account)}; verified in {text.duration(account['seconds'])}")
