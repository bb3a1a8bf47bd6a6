"""The live view of a stage in W&B. It never raises an exception: its first failure is reported once and ends the view."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from isd_repro.config.params import Tracking
from isd_repro.runtime.errors import Preempted, UserError
from isd_repro.tracking import history, names, session
from isd_repro.tracking.history import History
from isd_repro.tracking.media import Picture
from isd_repro.tracking.metrics import AXES, Row, finite
from isd_repro.tracking.names import StageRun
from isd_repro.tracking.session import Attempt, Mode, brief

_log = logging.getLogger("isd_repro.tracking")

MINIMA = ("loss", "spread")  # the summary shows the least value of these, too; a small spread is a collapse


class LiveView:
    """A W&B run, or none. It never raises an exception: its first failure is reported once and ends the view."""

    def __init__(self, run: Any, offline_in: Path | None = None) -> None:
        self._run: Any = run
        self._offline_in = offline_in
        self._axis: str | None = None
        self._before: History | None = None  # what earlier attempts at the stage have sent; None where that is not known
        self._new = False  # whether this attempt has sent a row

    @classmethod
    def open(cls, mode: Mode, run: StageRun, tracking: Tracking, folder: Path) -> Self:
        """Start a run in the best mode that works; if none works, the view shows nothing."""
        if not session.installed():
            level = logging.INFO if mode == "auto" else logging.WARNING
            _log.log(level, "wandb is not installed: metrics go only to metrics.jsonl (to use W&B, install the extra `tracking`)")
            return cls(None)
        session.prepare(folder)
        failures: list[str] = []
        for attempt in _attempts(mode, failures):
            try:
                view = cls(session.start(attempt, run, tracking, folder), folder if attempt == "offline" else None)
            except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run continues without it
                failures.append(f"{attempt} failed: {brief(error)}")
                session.release()
            else:
                if failures:
                    _log.warning("W&B is %s (%s)", attempt, "; ".join(failures))
                view._look_back(run, tracking)
                return view
        _log.warning("W&B is off (%s)", "; ".join(failures))
        return cls(None)

    def _look_back(self, run: StageRun, tracking: Tracking) -> None:
        """Find out what earlier attempts have sent. If that fails, nothing is sent again; `publish` sends the rest later."""
        try:
            found = history.of_summary(self._run)
            if self._offline_in:
                new = Path(self._run.dir).parent  # <run>/files
                found = history.on_disk(self._offline_in, run.id, tracking.project, new)
        except Exception as error:  # noqa: BLE001 - as above
            _log.info("W&B does not report what it has of %s (%s)", run.title, brief(error))
        else:
            self._before = found

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Send the rows of earlier attempts that W&B lacks because a kill lost them."""
        for row in rows if self._before is not None else ():
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row, unless an earlier attempt has sent it."""
        if self._before is None or not self._before.has(row):
            self._do("log", lambda run: self._log(run, row))

    def image(self, picture: Picture) -> None:
        """Send a picture from the disk."""
        self._show(names.image(picture.key), lambda: wandb_image(picture))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""
        self._show(names.table(key), lambda: wandb_table(columns, rows))

    def alert(self, title: str, text: str) -> None:
        """Send an alert, which W&B may pass on by mail or to a chat."""
        self._do("alert", lambda run: run.alert(title=title, text=text, level="WARN"))

    def stopped(self, error: UserError) -> None:
        """Send an alert that says what stopped the stage; a preempted run is marked as one that will be resumed."""
        if isinstance(error, Preempted):
            self._do("mark_preempting", lambda run: run.mark_preempting())
        self.alert("pre-empted" if isinstance(error, Preempted) else "failed", error.message)

    def finish(self, exit_code: int) -> None:
        """End the run, waiting at most `session.FINISH_TIMEOUT`; on a terminal, say how to send an offline run."""
        self._do("finish", lambda run: run.finish(exit_code=exit_code))
        if self._run is not None and self._offline_in is not None and sys.stderr.isatty():
            sys.stderr.write(f"W&B: logged offline; run `wandb sync` in {self._offline_in} to upload it\n")
        self._run = None

    def _log(self, run: Any, row: Mapping[str, Any]) -> None:
        if self._axis is None:
            self._axis = define_metrics(run, row)
        run.log(dict(row))
        self._new = True
        if self._before is not None:
            self._before.add(finite(row))

    def _show(self, key: str, make: Callable[[], Any]) -> None:
        if self._new or self._before is None or key not in self._before.media:
            self._do("log", lambda run: run.log({key: make()}))

    def _do(self, what: str, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001 - as above
            _log.warning("W&B is off from here on (%s failed: %s)", what, brief(error))
            self._run = None


def define_metrics(run: Any, row: Mapping[str, Any]) -> str:
    """Draw every metric over epoch or step, and keep the minimum of some metrics in the summary."""
    axis = next((axis for axis in AXES if axis in row), AXES[0])
    run.define_metric(axis)
    run.define_metric("*", step_metric=axis)
    for key in MINIMA:
        if key in row:
            run.define_metric(key, step_metric=axis, summary="min,last")
    return axis


def wandb_image(picture: Picture) -> Any:
    """W&B's object for a picture on the disk, with its pixels but without the file's metadata."""
    import wandb
    from PIL import Image

    with Image.open(picture.path) as image:
        return wandb.Image(image.convert("RGB"), caption=picture.caption or None)


def wandb_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """W&B's object for a table."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def _attempts(mode: Mode, failures: list[str]) -> list[Attempt]:
    """Modes to try in turn; online only with a key, because without one W&B asks the terminal for it and waits."""
    if mode == "offline":
        return ["offline"]
    if session.has_key():
        return ["online", "offline"]
    if mode == "online":
        failures.append("no API key is configured; `wandb login` stores one")
    return ["offline"]
