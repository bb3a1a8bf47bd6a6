"""What `verify` finds: the state of every check, the problems, and what was evaluated again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.report.problems import Problem
from isd_repro.runtime.progress import Progress

RESTORE = "restore the record from git, or run its stage again"


class Verdict(StrEnum):
    """How far a number was verified; the worst first."""

    FAILED = "failed"
    RECORDED = "recorded only"
    RECOMPUTED = "recomputed"
    RE_EVALUATED = "re-evaluated"


class State(StrEnum):
    """What a check came to; the worst first."""

    FAILED = "failed"
    NOT_CHECKED = "not checked"
    RECORDED = "recorded only"
    PROVED = "proved"


@dataclass(frozen=True)
class Wrong:
    """A wrong value: the part of the record or the file that states it, its key, both values, and what to do.

    `runs` are those whose numbers it makes worthless, where they are not those that the check is about.
    """

    part: str | Path
    key: str
    found: object
    expected: object
    hint: str = RESTORE
    runs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Unproved:
    """What a check could not prove, and why: what it is compared with is not available, or does not exist (`recorded only`)."""

    why: str
    state: State = State.NOT_CHECKED


Answer = Wrong | Unproved


@dataclass(frozen=True)
class Finding:
    """What one check says of one run, of one subset or of the profile (which `about` names)."""

    check: str
    about: str
    state: State
    why: str = ""


@dataclass(frozen=True)
class VerifyOptions:
    """Options of the command; `runs` empty means all of them."""

    runs: tuple[str, ...] = ()
    quick: bool = False  # records and rendered files alone
    linear: bool = False  # also the evaluations that train classifiers
    snapshots: bool = False  # also the encoders kept during training
    as_json: bool = False


@dataclass
class Verification:
    """Findings, problems, remarks, and what was evaluated again.

    Attributes:
        findings: what each check came to; one that failed has a problem, too.
        repeated: (run, encoder, metric) of which every stored prediction was reproduced; a data set's metric is `<metric>-<set>`.
        snapshots: (run, epoch) of which every score was reproduced.
        flips: predictions that differ from another machine's: how many, how many stored ones are right, and how many of ours.
    """

    params: Params
    layout: Layout
    options: VerifyOptions
    progress: Progress
    problems: list[Problem] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeated: set[tuple[str, str, str]] = field(default_factory=set)
    snapshots: set[tuple[str, int]] = field(default_factory=set)
    flips: list[tuple[int, int, int]] = field(default_factory=list)

    def problem(self, file: Path, key: str, found: object, expected: object, hint: str, *runs: str) -> Problem:
        """Note a problem; one that several runs share is one."""
        new = Problem(file, key, str(found), str(expected), hint, runs)
        for at, old in enumerate(self.problems):
            if replace(old, runs=()) == replace(new, runs=()):
                self.problems[at] = replace(old, runs=tuple(dict.fromkeys(old.runs + runs)))
                return old
        self.problems.append(new)
        return new

    def note(self, check: str, about: str, answers: Iterable[Answer], *runs: str) -> bool:
        """Keep what a check came to: its worst answer, or that it was proved where it has none; false where it failed."""
        state, reasons = State.PROVED, list[str]()
        for answer in answers:
            if isinstance(answer, Wrong):
                file = answer.part if isinstance(answer.part, Path) else self.layout.record(about, answer.part)
                whose = runs if answer.runs is None else answer.runs
                self.problem(file, answer.key, answer.found, answer.expected, answer.hint, *whose)
                state = State.FAILED
            else:
                reasons.append(answer.why)
                state = min(state, answer.state, key=list(State).index)
        self.findings.append(Finding(check, about, state, "" if state is State.FAILED else "; ".join(dict.fromkeys(reasons))))
        return state is not State.FAILED

    def shown(self, words: object) -> str:
        """A path, or words with paths in them, without the repository's own place."""
        return str(words).replace(f"{self.layout.root}/", "")
