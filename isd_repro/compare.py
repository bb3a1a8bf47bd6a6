"""Command `compare`: compares a profile's numbers with those of another commit, checkout or machine, cell by cell.

Our numbers are computed from the records; theirs are read from the `cells.json` that a report writes next to its page.
Two numbers agree if they differ by at most their margin: the root of the sum of squares of the half-widths of both intervals.
The intervals of single runs are over queries and do not include the variation between trainings.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import CHOSEN
from isd_repro.report import intervals, page, run_records, text
from isd_repro.report.export import CELLS, FORMAT, Place, by_place
from isd_repro.report.hypothesis import Outcome
from isd_repro.runtime.errors import DataError, UserError, printable

SAME = 1e-4  # points: cells.json rounds to four decimals
State = Literal["equal", "within", "outside", "no interval", "only ours", "only theirs"]
Tree = Mapping[str, Any]
Key = tuple[Any, ...]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """One number on both sides; values in percent or points, `margin` in points."""

    where: str
    ours: float | None
    theirs: float | None
    ours_interval: Bounds | None
    theirs_interval: Bounds | None
    margin: float | None

    @property
    def difference(self) -> float | None:
        """Ours less theirs."""
        return None if self.ours is None or self.theirs is None else round(self.ours - self.theirs, 4)

    @property
    def state(self) -> State:
        """Whether they agree."""
        if self.difference is None:
            return "only ours" if self.theirs is None else "only theirs"
        if abs(self.difference) <= SAME:
            return "equal"
        if self.margin is None:
            return "no interval"
        return "within" if abs(self.difference) <= self.margin else "outside"


@dataclass(frozen=True)
class Change:
    """Something that differs between the two sides, and the runs that it concerns."""

    what: str
    ours: str
    theirs: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResultComparison:
    """The complete result of the command."""

    profile: str
    theirs: str
    numbers: tuple[Pair, ...]
    circumstances: tuple[Change, ...]
    conclusions: tuple[Change, ...]

    @property
    def agree(self) -> bool:
        """Whether no number lies outside its margin and every conclusion is the same."""
        return not self.conclusions and all(pair.state != "outside" for pair in self.numbers)


def compare(other: str, params: Params, layout: Layout, *, as_json: bool) -> None:
    """Compare and print a table of the numbers that differ, or with `as_json` one JSON object with every number.

    `other` is a revision of git, or a folder: a checkout, a profile's reports, or a folder with a `cells.json`.

    Raises:
        DataError: there is nothing to compare with, or the two do not agree.
        UserError: the revision is unknown.
    """
    assembled = page.assemble(params, run_records.load(params, layout), layout)
    ours = json.loads(json.dumps(page.cells(assembled)))
    name, theirs = _read(other, layout)
    found = compared(name, ours, theirs)
    if not any(pair.difference is not None for pair in found.numbers):
        raise DataError(f"{name}: has no number in common with this profile", "run the profile's stages, or name another result")
    _print_json(found) if as_json else _print(found)
    if not found.agree:
        outside = sum(pair.state == "outside" for pair in found.numbers)
        said = [f"{outside} of {len(found.numbers)} numbers differ by more than their margin"] if outside else []
        said += [_conclusions(found)] if found.conclusions else []
        raise DataError(f"{params.profile}: {text.listing(said)}", "docs/compare.md says what may cause this")


def _read(other: str, layout: Layout) -> tuple[str, Tree]:
    """A name for the other side, and the content of its `cells.json`."""
    folder = Path(other)
    if folder.exists():
        inside = ("", CELLS, f"tables/{CELLS}", f"reports/{layout.profile}/tables/{CELLS}")
        path = next((folder / place for place in inside if (folder / place).is_file()), None)
        if path is None:
            raise DataError(f"{other}: contains no {CELLS} of profile {layout.profile!r}", "run `isd-repro report` there first")
        return str(path), _parsed(str(path), path.read_bytes())
    where = f"{other}:./reports/{layout.profile}/tables/{CELLS}"
    asked = (("show", where), ("rev-parse", "--short", other))
    try:
        done, named = (subprocess.run(["git", *one], cwd=layout.root, capture_output=True, check=False) for one in asked)
    except OSError as error:
        raise UserError(f"git cannot be started ({error.strerror})", "install git, or compare with a folder") from error
    if done.returncode:
        said = f"{other!r} is not a folder, and git says: {' '.join(done.stderr.decode('utf-8', 'replace').split())}"
        raise DataError(said, "name a folder or a commit with this profile's report")
    commit = named.stdout.decode().strip()
    return f"{other} ({commit})" if commit and commit != other else other, _parsed(where, done.stdout)


def _parsed(where: str, content: bytes) -> Tree:
    try:
        tree = json.loads(content)
        kinds = {"cells": list, "findings": list, "runs": dict}
        if tree["format"] == FORMAT and all(isinstance(tree[key], kind) for key, kind in kinds.items()):
            return dict(tree)
        found = f"format {tree['format']}"
    except (ValueError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
    raise DataError(f"{where}: expected cells of format {FORMAT}, found {found}", "render that report with this version")


_NONE: Tree = {"value": None, "low": None, "kind": "", "deviation": None, "verdict": ""}  # in the place of a cell


def compared(name: str, ours: Tree, theirs: Tree) -> ResultComparison:
    """Both sides' cells, circumstances and conclusions, from the trees of `cells.json`."""
    mine, other = _cells(ours), _cells(theirs)
    halves = _score_halves(ours), _score_halves(theirs)
    numbers, conclusions = [], []
    for key in {**other, **mine}:
        cells = [found.get(key, _NONE) for found in (mine, other)]
        if all(cell["value"] is None for cell in cells):
            continue
        half = [_half(cell, known) for cell, known in zip(cells, halves, strict=True)]
        margin = None if half[0] is None or half[1] is None else round(math.hypot(half[0], half[1]), 4)
        bounds = [None if cell["low"] is None else (cell["low"], cell["high"]) for cell in cells]
        where = ", ".join(part for part in key if part)
        numbers.append(Pair(where, cells[0]["value"], cells[1]["value"], bounds[0], bounds[1], margin))
        said = [_said(*one) for one in zip(cells, half, strict=True)]
        if all(said) and said[0] != said[1]:
            conclusions.append(Change(where, said[0], said[1]))
    verdicts = _verdicts(ours), _verdicts(theirs)
    for lead in verdicts[0].keys() & verdicts[1].keys():
        if verdicts[0][lead] != verdicts[1][lead]:
            conclusions.insert(0, Change(lead, verdicts[0][lead], verdicts[1][lead]))
    return ResultComparison(ours["profile"], name, tuple(numbers), tuple(_circumstances(ours, theirs)), tuple(conclusions))


def _cells(tree: Tree) -> dict[Place, Mapping[str, Any]]:
    """The cells by their place, without numbers of queries in headings and without the paper's numbers, which are fixed."""
    own = (cell for cell in tree["cells"] if cell["kind"] not in ("paper", "computed"))
    return by_place({**cell, "span": re.sub(r" \(n = [\d,]+\)$", "", cell["span"])} for cell in own)


def _score_halves(tree: Tree) -> dict[Key, float]:
    """Half-widths of the scores of single runs."""
    return {
        (cell["runs"][0], cell["encoder"], cell["metric"], cell["group"]): (cell["high"] - cell["low"]) / 2
        for cell in tree["cells"]
        if cell["kind"] == "score" and cell["low"] is not None
    }


def _half(cell: Mapping[str, Any], scores: Mapping[Key, float]) -> float | None:
    """Half-width of the interval that the page states for a number; None if it states none.

    A mean has Student's t interval over its seeds or draws. The difference of two runs has the interval of two independent
    scores.
    """
    if cell["kind"] == "statistic":
        return None
    if cell["low"] is not None:
        return float(cell["high"] - cell["low"]) / 2
    if cell["deviation"] is not None and cell["count"]:
        return intervals.student_quantile(cell["count"] - 1) * float(cell["deviation"]) / math.sqrt(cell["count"])
    if cell["kind"] == "difference" and len(cell["runs"]) == 2:
        parts = [scores.get((run, cell["encoder"], cell["metric"], cell["group"])) for run in cell["runs"]]
        return None if parts[0] is None or parts[1] is None else math.hypot(parts[0], parts[1])
    return None


def _said(cell: Mapping[str, Any], half: float | None) -> str:
    """The conclusion of a cell: the verdict on a number of the paper, or the side of 0 on which a difference lies."""
    if cell["verdict"]:
        return str(cell["verdict"])
    if cell["kind"] != "difference" or cell["value"] is None or half is None:
        return ""
    low, high = (cell["value"] - half, cell["value"] + half) if cell["low"] is None else (cell["low"], cell["high"])
    return "above 0" if low > 0 else "below 0" if high < 0 else "undecided"


def _verdicts(tree: Tree) -> dict[str, str]:
    """Verdicts by hypothesis."""
    said = (finding.split(": ", 1)[:2] for finding in tree["findings"] if ": " in finding)
    verdicts = {lead: body.partition(":")[0] for lead, body in said}
    return {lead: verdict for lead, verdict in verdicts.items() if verdict in get_args(Outcome)}


def _circumstances(ours: Tree, theirs: Tree) -> Iterator[Change]:
    """Other differences between runs that both sides have; equal differences of several runs are one item."""
    changes: dict[tuple[str, str, str], list[str]] = {}
    for run in ours["runs"]:
        if run in theirs["runs"]:
            mine, other = _facts(ours["runs"][run]), _facts(theirs["runs"][run])
            for what in sorted(mine.keys() & other.keys()):
                if mine[what] != other[what]:
                    changes.setdefault((what, mine[what], other[what]), []).append(run)
    yield from (Change(*change, tuple(runs)) for change, runs in changes.items())
    for what, one, two in (("runs only ours", ours, theirs), ("runs only theirs", theirs, ours)):
        if alone := [run for run in one["runs"] if run not in two["runs"]]:
            yield Change(what, "", "", tuple(alone))


def _facts(run: Tree) -> dict[str, str]:
    """Machine, threads, code, packages, images, encoder and parameters of a run, as text."""
    found: list[tuple[str, str]] = []
    for part, facts in run["parts"].items():
        machine, settings = facts["machine"], {k: v for k, v in (facts.get("settings") or {}).items() if k not in CHOSEN}
        found += [
            ("machine", f"{machine['cpu']}, {machine['gpu'] or 'no GPU'}, {machine['system']}"),
            ("threads", f"{machine['threads']}"),
            ("code", f"source {facts['source'][:12]} of commit {str(facts['commit'])[:12]}"),
            ("encoder", f"sha256 {facts['encoder_sha256'][:12]}"),
            ("images", f"manifest {facts['manifest_sha256'][:12]}"),
            *((f"version of {name}", version) for name, version in facts["versions"].items()),
            *((f"parameter evaluation.{part}.{key}", value) for key, value in text.flatten(settings)),
        ]
    config = {key: value for key, value in run["config"].items() if key not in ("manifest", "store")}
    found += [(f"parameter {key}", value) for key, value in text.flatten(config)]
    said: dict[str, set[str]] = {}
    for what, value in found:
        said.setdefault(what, set()).add(str(value))
    return {what: ", ".join(sorted(values)) for what, values in said.items()}


def _print(found: ResultComparison) -> None:
    """Print circumstances, the numbers that differ (the largest difference first), conclusions, and counts."""
    out = Console(file=sys.stdout, highlight=False)
    if not out.is_terminal:
        out.width = 10_000

    def say(line: str) -> None:
        out.print(printable(line), markup=False, soft_wrap=True)

    say(f"{found.profile}: ours against {found.theirs}")
    for change in found.circumstances:
        said = f": {change.ours}, theirs {change.theirs}" if change.ours or change.theirs else ""
        say(f"  {change.what}{said} ({text.listing(change.runs, 3)})")
    if not found.circumstances:
        say("  the same machine, threads, code and parameters")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("Number", "Ours", "Theirs", "Difference", "Margin", ""):
        grid.add_column(head, justify="left" if head in ("Number", "") else "right", overflow="fold")
    differing = [pair for pair in found.numbers if pair.state not in ("equal", "only ours", "only theirs")]
    for pair in sorted(differing, key=lambda one: -abs(one.difference or 0) / (one.margin or math.inf)):
        margin = "" if pair.margin is None else f"\N{PLUS-MINUS SIGN} {text.decimal(pair.margin, 1)}"
        shown = [_shown(pair.ours, pair.ours_interval), _shown(pair.theirs, pair.theirs_interval)]
        grid.add_row(printable(pair.where), *shown, text.signed(pair.difference or 0, 2), margin, pair.state)
    if differing:
        out.print(grid, markup=False)
    for change in found.conclusions:
        say(f"conclusion changes: {change.what}: ours {change.ours}, theirs {change.theirs}")
    counts = Counter(pair.state for pair in found.numbers)
    states = [f"{counts[state]} {state}" for state in get_args(State) if counts[state]]
    say(f"{text.count(len(found.numbers))} numbers: {', '.join(states)}; {_conclusions(found)}")


def _conclusions(found: ResultComparison) -> str:
    count = len(found.conclusions)
    return "1 conclusion changes" if count == 1 else f"{count or 'no'} conclusions change"


def _shown(value: float | None, interval: tuple[float, float] | None) -> str:
    between = f" [{text.decimal(interval[0], 1)}, {text.decimal(interval[1], 1)}]" if interval else ""
    return "" if value is None else f"{text.decimal(value, 2)}{between}"


def _print_json(found: ResultComparison) -> None:
    counts = Counter(pair.state for pair in found.numbers)
    tree = {
        "profile": found.profile,
        "theirs": found.theirs,
        "agree": found.agree,
        "counts": {state: counts[state] for state in get_args(State)},
        "circumstances": [vars(change) for change in found.circumstances],
        "conclusions": [{key: value for key, value in vars(change).items() if key != "runs"} for change in found.conclusions],
        "numbers": [{**vars(pair), "difference": pair.difference, "state": pair.state} for pair in found.numbers],
    }
    sys.stdout.write(json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n")
