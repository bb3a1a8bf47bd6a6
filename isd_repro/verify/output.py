"""What `verify` prints: failures first, then the state of every check and the verdict of every number."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isd_repro.report import text
from isd_repro.verify.findings import State, Verdict, Verification, checks_by_state
from isd_repro.verify.numbers import Number

_MEANING = {
    Verdict.RE_EVALUATED: "the encoder is available and reproduced every stored prediction",
    Verdict.RECOMPUTED: "computed again from the stored predictions",
    Verdict.RECORDED: "stored without predictions, so it cannot be checked",
    Verdict.FAILED: "a check of the number or of its files failed",
}
_STYLES = {"re-evaluated": "green", "proved": "green", "recorded only": "yellow", "not checked": "yellow", "failed": "bold red"}
_VERDICTS, _STATES = tuple(reversed(Verdict)), tuple(reversed(State))


def failed(state: Verification) -> str:
    """How many checks failed, in words."""
    return f"{len(state.problems)} check{'' if len(state.problems) == 1 else 's'} failed"


def show(state: Verification, numbers: list[Number], seconds: float) -> None:
    """Tables, or the same as JSON; in a pipe nothing is cut."""
    account = _account(state, numbers, seconds)
    if state.options.as_json:
        sys.stdout.write(json.dumps(account, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return
    out = Console(file=sys.stdout, highlight=False)
    out.width = out.width if out.is_terminal else max(out.width, 130)

    def say(words: object, style: str = "") -> None:
        out.print(str(words), style=style, markup=False, soft_wrap=True)

    for one in account["failures"]:
        say(one["file"], "bold red")
        for term in ("key", "found", "expected", "do"):
            say(f"  {term:<9} {one[term]}")
    if account["checks"]:
        _table(out, f"{state.params.profile}: checks of runs, images and the lock", "check", _STATES, account["checks"])
    for check, one in account["checks"].items():
        for reason in one["reasons"]:
            say(f"{check}: {reason}", "dim")
    _table(out, f"{state.params.profile}: numbers by verdict", "run", _VERDICTS, account["runs"])
    for verdict, meaning in _MEANING.items():
        if account["counts"][verdict]:
            say(f"{verdict}: {meaning}", "dim")
    for note in account["notes"]:
        say(f"note: {note}", "dim")
    each = ", ".join(f"{account['counts'][verdict]} {verdict}" for verdict in _VERDICTS if account["counts"][verdict]) or "none"
    say(f"{len(numbers):,} numbers: {each}; {failed(state)}; {text.duration(seconds)}")


def _table(out: Console, title: str, first: str, columns: tuple[Any, ...], rows: dict[str, dict[str, int]]) -> None:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(str(column), justify="right", no_wrap=True)
    for name, counts in rows.items():
        table.add_row(Text(name), *(Text(str(counts[one] or ""), _STYLES.get(one, "")) for one in columns))
    out.print(table)


def _account(state: Verification, numbers: list[Number], seconds: float) -> dict[str, Any]:
    """Everything that was found, as plain values."""
    total, by_run = Counter(str(one.verdict) for one in numbers), dict[str, Counter[str]]()
    for number in numbers:
        name = number.runs[0] if len(number.runs) == 1 else "differences and means"
        by_run.setdefault(name, Counter())[str(number.verdict)] += 1
    checks = {}
    for check, found in checks_by_state(state.findings):
        unproved = [one for key in (State.RECORDED, State.NOT_CHECKED) for one in found.get(key, ())]
        told: dict[tuple[State, str], list[str]] = {}
        for one in unproved:
            told.setdefault((one.state, one.why), []).append(one.about)
        reasons = [f"{key} ({_few(names)}): {state.shown(why)}" for (key, why), names in told.items()]
        checks[check] = {**{str(key): len(found.get(key, ())) for key in State}, "reasons": reasons}
    failures = []
    for bad in state.problems:
        words = {"file": bad.file, "key": bad.key, "found": bad.found, "expected": bad.expected, "do": bad.hint}
        failures.append({**{key: state.shown(value) for key, value in words.items()}, "runs": list(bad.runs)})
    return {
        "format": 1,
        "profile": state.params.profile,
        "ok": not state.problems,
        "checks": checks,
        "counts": {str(verdict): total[verdict] for verdict in Verdict},
        "runs": {run: {str(verdict): of[verdict] for verdict in Verdict} for run, of in by_run.items()},
        "numbers": [{**one.as_json(), "reason": state.shown(one.reason) or None} for one in numbers],
        "failures": failures,
        "notes": [state.shown(note) for note in dict.fromkeys(state.notes)],
        "seconds": round(seconds, 1),
    }


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} of {names[0]} ... {names[-1]}"
