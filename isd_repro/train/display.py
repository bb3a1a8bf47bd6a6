"""Training on a terminal: two lines that move, and one that stays when the run has finished. Elsewhere nothing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from isd_repro.train import collapse


class Display:
    """What a terminal shows of one run while it is trained, between entering and leaving its `with` block."""

    def __init__(self, console: Console, title: str, epochs: int, steps_per_epoch: int, batch_size: int) -> None:
        self._title, self._epochs, self._steps, self._batch = title, epochs, steps_per_epoch, batch_size
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, console=console, expand=True, speed_estimate_period=600)  # seconds; log lines may be rare
        self._task = self._bar.add_task(title, start=False, total=epochs * steps_per_epoch)
        self._step, self._loss = 0, float("nan")
        self._health = Text()
        self._live = Live(console=console, get_renderable=self._lines, transient=True) if console.is_terminal else None

    def begin(self, step: int) -> None:
        """Training continues after this step, 0 for a new run."""
        self._step = step
        self._bar.start_task(self._task)
        self._bar.update(self._task, completed=step)

    def tick(self, step: int, loss: float) -> None:
        """A step's loss; steps are counted from 1."""
        self._step, self._loss = step, loss
        self._bar.update(self._task, completed=step)

    def epoch(self, row: Mapping[str, float]) -> None:
        """An epoch's row of the curve."""
        if collapse.EMBEDDING_STD in row:
            bad = collapse.collapsed(row)
            said = f"{'collapsed, ' if bad else ''}embedding std {row[collapse.EMBEDDING_STD]:.3f}"
            self._health = Text(said, style="bold red" if bad else "green")

    def finished(self, seconds: float) -> Text:
        """The line that stays.

        Args:
            seconds: the time that training took, in all attempts.
        """
        if not self._step:
            return Text(f"{self._title}: nothing to train")
        speed = self._step * self._batch / max(seconds, 1e-9)
        took = timedelta(seconds=round(seconds))
        said = f"{self._title}: {self._epochs} epochs in {took}, loss {self._loss:.3f}, {speed:.0f} images/s"
        return Text.assemble(said, *((", ", self._health) if "collapsed" in self._health.plain else ()))

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def _lines(self) -> Group:
        speed = self._bar.tasks[0].speed
        parts = [f"epoch {min(self._step // self._steps + 1, self._epochs)}/{self._epochs}"]
        parts += [f"loss {self._loss:.3f}"] if self._loss == self._loss else []
        parts += [f"{speed * self._batch:.0f} images/s"] if speed else []
        shown = Text("  ".join([*parts, ""]), no_wrap=True, overflow="ellipsis")
        return Group(self._bar.get_renderable(), shown.append_text(self._health))
