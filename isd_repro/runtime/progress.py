"""Progress of long work: a progress bar on a terminal, otherwise a line of text every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

from isd_repro.runtime.errors import printable

_SECONDS = 10.0  # between two lines if there is no terminal


class Task:
    """A piece of work with a known number of steps."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        self._bar = progress.Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task(title, total=None)
        self._done, self._total = 0.0, 0
        self._said = time.monotonic()

    def begin(self, total: int) -> None:
        """Start, with the number of steps."""
        self._total = total
        self._bar.update(self._task, total=total)
        self._bar.start()

    def advance(self, steps: float = 1) -> None:
        """Count finished steps, or a fraction of one."""
        self._done += steps
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal and time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            line = f"{self._title}: {int(self._done)} of {self._total}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


class Progress:
    """Prints lines and progress bars on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Print one line of text."""
        self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, title: str) -> Iterator[Task]:
        """A progress bar that is removed after the block."""
        task = Task(self._console, title)
        try:
            yield task
        finally:
            task.close()
