"""What a check found wrong, and who takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isd_repro.runtime.errors import DataError

Key = tuple[str, str, str]  # encoder, metric, group
AGAIN = "run its stage again; if it was edited by hand, restore it from git"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        file: where it was found.
        key: the key, number or line in it.
        found, expected: both values, as a reader is told them.
        hint: what to do.
        runs: whose numbers it makes worthless; none where it is about a rendered file.
        score: the one number of that run; None for all of them.
    """

    file: Path
    key: str
    found: str
    expected: str
    hint: str
    runs: tuple[str, ...] = ()
    score: Key | None = None

    @property
    def message(self) -> str:
        """The whole in one sentence that names the file."""
        return f"{self.file}: {self.key} is {self.found}, expected {self.expected}"


OnProblem = Callable[[Problem], None]


def refuse(problem: Problem) -> None:
    """Raise at the first problem."""
    raise DataError(problem.message, problem.hint)
