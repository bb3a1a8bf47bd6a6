"""Problems that checks find, and their handling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isd_repro.runtime.errors import DataError

Key = tuple[str, str, str]  # encoder, metric, group
AGAIN = "run its stage again; if it was edited by hand, restore it from git"


@dataclass(frozen=True)
class Problem:
    """One problem: what a file says at a key, what was expected there, and what to do."""

    file: Path
    key: str  # or number, or line
    found: str  # as shown to the user, like `expected`
    expected: str
    hint: str
    runs: tuple[str, ...] = ()  # whose numbers it invalidates; empty for a problem of a rendered file
    score: Key | None = None  # the invalid number of that run; None means all of its numbers

    @property
    def message(self) -> str:
        """The problem in one sentence that names the file."""
        return f"{self.file}: {self.key} is {self.found}, expected {self.expected}"


OnProblem = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    """Raise an error for the first problem."""
    raise DataError(problem.message, problem.hint)
