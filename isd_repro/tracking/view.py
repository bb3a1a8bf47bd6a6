"""The live view of a stage in W&B. It never raises: its first failure is reported once and ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from isd_repro.config.params import Tracking
from isd_repro.tracking import names, session
from isd_repro.tracking.media import Picture
from isd_repro.tracking.metrics import AXES
from isd_repro.tracking.session import Attempt, Mode, brief

_log = logging.getLogger("isd_repro.tracking")


class WandbView:
    """A W&B run that never raises: its first failure is reported once and ends it."""

    def __init__(self, run: Any) -> None:
        self._run: Any = run
        self._axis: str | None = None

    @classmethod
    def open(
        cls,
        mode: Mode,
        *,
        tracking: Tracking,
        layout_root: Path,
        run_id: str,
        group: str,
        job_type: str,
        config: Mapping[str, object],
        tags: Sequence[str] = (),
        name: str | None = None,
    ) -> Self | None:
        """Start a run in the best mode that works; None where none does."""
        if not session.installed():
            level = logging.INFO if mode == "auto" else logging.WARNING
            _log.log(level, "wandb is not installed: metrics go to metrics.jsonl alone (install the extra `tracking`)")
            return None
        folder = session.folder_of(layout_root)
        start = {
            "project": tracking.project,
            "entity": tracking.entity,
            "id": names.allowed(run_id),
            "name": name or run_id,
            "group": group,
            "job_type": job_type,
            "config": dict(config),
            "tags": list(tags),
            "resume": "allow",
            "dir": str(folder),
        }
        failures: list[str] = []
        for attempt in _attempts(mode, failures):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                run = session.start(attempt, start)
            except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run goes on without it
                failures.append(f"{attempt} failed: {brief(error)}")
                session.release()
            else:
                if failures:
                    _log.warning("W&B is %s (%s)", attempt, "; ".join(failures))
                return cls(run)
        _log.warning("W&B is off (%s)", "; ".join(failures))
        return None

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Send one row, drawn over its epoch or step."""
        self._do("log", lambda run: self._log(run, row))

    def image(self, picture: Picture) -> None:
        """Send a picture that lies on the disk."""
        self._do("log", lambda run: run.log({names.image(picture.key): wandb_image(picture)}))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""
        self._do("log", lambda run: run.log({names.table(key): wandb_table(columns, rows)}))

    def finish(self, exit_code: int) -> None:
        """End the run, waiting no longer than `session.FINISH_TIMEOUT`."""
        self._do("finish", lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _log(self, run: Any, row: Mapping[str, float | int | str]) -> None:
        if self._axis is None:
            self._axis = define_axis(run, row)
        run.log(dict(row))

    def _do(self, what: str, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001 - as above
            _log.warning("W&B is off from here on (%s failed: %s)", what, brief(error))
            self._run = None


def define_axis(run: Any, row: Mapping[str, Any]) -> str:
    """Draw everything over the axis that a row has."""
    axis = next((axis for axis in AXES if axis in row), AXES[0])
    run.define_metric(axis)
    run.define_metric("*", step_metric=axis)
    return axis


def wandb_image(picture: Picture) -> Any:
    """W&B's object for a picture on the disk: its pixels, and not what else the file says."""
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
        failures.append("no key is configured, `wandb login` stores one")
    return ["offline"]
