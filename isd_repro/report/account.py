"""What `verify` found, as a person and as a machine reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from isd_repro.report import text
from isd_repro.report.faults import Fault
from isd_repro.report.verdicts import Number, Verdict, counts

_STYLES = {Verdict.RE_EVALUATED: "green", Verdict.RECOMPUTED: "", Verdict.RECORDED: "yellow", Verdict.FAILED: "bold red"}
MEANING = {
    Verdict.RE_EVALUATED: "the encoder is here and gave every stored prediction again",
    Verdict.RECOMPUTED: "counted anew from the stored predictions",
    Verdict.RECORDED: "no predictions are stored: nothing checks it",
    Verdict.FAILED: "something behind it is not as it should be",
}


@dataclass(frozen=True)
class Account:
    """Numbers with their verdicts, and everything that is wrong or worth a remark."""

    profile: str
    root: Path  # paths below it are shown relative to it
    numbers: Sequence[Number]
    faults: Sequence[Fault]
    notes: Sequence[str]
    seconds: float

    @property
    def failed(self) -> str:
        """`1 check failed`."""
        return f"{len(self.faults)} check{'' if len(self.faults) == 1 else 's'} failed"

    def shown(self, words: object) -> str:
        """A path, or words with paths in them, without the repository's own place."""
        return str(words).replace(f"{self.root}/", "")


def as_json(found: Account) -> dict[str, Any]:
    """Everything, JSON-serialisable."""
    total = Counter(number.verdict for number in found.numbers)
    return {
        "format": 1,
        "profile": found.profile,
        "ok": not found.faults,
        "counts": {str(verdict): total[verdict] for verdict in Verdict},
        "runs": {run: {str(verdict): of[verdict] for verdict in Verdict} for run, of in counts(found.numbers).items()},
        "numbers": [number.as_json() | {"reason": found.shown(number.reason) or None} for number in found.numbers],
        "failures": [
            {
                "file": found.shown(fault.file),
                "key": fault.key,
                "found": found.shown(fault.found),
                "expected": found.shown(fault.expected),
                "do": found.shown(fault.hint),
                "runs": list(fault.runs),
            }
            for fault in found.faults
        ],
        "notes": [found.shown(note) for note in found.notes],
        "seconds": round(found.seconds, 1),
    }


def show(found: Account, out: Console) -> None:
    """Failures first, then the summary; in a pipe nothing is cut."""
    if not out.is_terminal:
        out.width = max(out.width, 130)

    def say(words: object, style: str = "") -> None:
        out.print(found.shown(words), style=style, markup=False, soft_wrap=True)

    for fault in found.faults:
        say(fault.file, "bold red")
        for term, words in (("key", fault.key), ("found", fault.found), ("expected", fault.expected), ("do", fault.hint)):
            say(f"  {term:<9} {words}")
    out.print(_summary(found))
    for verdict, meaning in MEANING.items():
        if any(number.verdict is verdict for number in found.numbers):
            say(f"{verdict}: {meaning}", "dim")
    for note in found.notes:
        say(f"note: {note}", "dim")
    total = Counter(number.verdict for number in found.numbers)
    each = ", ".join(f"{total[verdict]} {verdict}" for verdict in Verdict if total[verdict]) or "none"
    say(f"{text.count(len(found.numbers))} numbers: {each}; {found.failed}; {text.duration(found.seconds)}")


def _summary(found: Account) -> Table:
    table = Table(title=Text(f"{found.profile}: numbers by verdict"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for verdict in Verdict:
        table.add_column(str(verdict), justify="right", no_wrap=True)
    for run, of in counts(found.numbers).items():
        table.add_row(Text(run), *(Text(str(of[verdict]), _STYLES[verdict]) if of[verdict] else Text("") for verdict in Verdict))
    return table
