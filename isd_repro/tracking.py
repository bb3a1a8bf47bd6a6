"""Where the numbers of a stage go: `metrics.jsonl` is the truth, Weights & Biases is a view of it.

Every row is one line of JSON, handed to the system in one unbuffered write, so a killed run leaves every finished row and
at most one torn line, which readers drop. A value that is not finite is written as null, and the row's `not_finite` says
what it was.

W&B is used when it is installed and wanted: online when a key is configured, else offline, else not at all. Whatever it
raises ends in one warning and in W&B being off; it cannot stop a run, and its waits are bounded. `WANDB_MODE` overrides
the parameter unless that is `off`.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from isd_repro.errors import DataError, UserError
from isd_repro.params import Tracking

AXES = ("epoch", "step")  # what a row is a row of; its other keys are values
INIT_TIMEOUT = 30.0  # seconds that W&B may take to reach its server before the view falls back to offline
FINISH_TIMEOUT = 60.0  # seconds that W&B may take to send what is left when a run ends

Mode = Literal["auto", "online", "offline", "off"]
Row = dict[str, Any]

_log = logging.getLogger(__name__)
_ENVIRONMENT: Mapping[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}


class RunTracker:
    """A `protocols.Tracker`, and a context manager that tells W&B whether the block failed."""

    def __init__(self, path: Path | None) -> None:
        self.view: WandbView | None = None
        self._path = path
        self._file = _open_for_append(path) if path is not None else None

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Write one row.

        Raises:
            UserError: `metrics.jsonl` cannot be written, for instance because the disk is full. Nothing else is raised.
        """
        if self._file is not None:
            line = _line(row).encode()
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise UserError(
                    f"{self._path}: cannot be written ({error})", "make room and run the same command; it resumes"
                ) from error
        if self.view is not None:
            self.view.log(row)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the view; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.view is not None:
            self.view.finish(exit_code=int(failed))
            self.view = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)


def open_tracker(
    path: Path | None,
    *,
    tracking: Tracking,
    layout_root: Path,
    run_id: str,
    group: str,
    job_type: str,
    config: Mapping[str, object],
) -> RunTracker:
    """Open the metrics of one stage of one run; rows are appended to what `path` holds, after its last complete line.

    Args:
        path: the `metrics.jsonl`; None keeps no file and leaves the W&B view alone.
        tracking: the profile's `tracking` group.
        layout_root: W&B writes under `<layout_root>/wandb`, unless `WANDB_DIR` names another folder.
        run_id: the same for every attempt at the same run, so that a resumed run continues its W&B run; characters that
            W&B does not allow become hyphens.
        group: W&B group.
        job_type: the stage.
        config: shown by W&B as the run's config.
    """
    tracker = RunTracker(path)
    mode = wanted_mode(tracking.wandb)
    if mode != "off":
        tracker.view = WandbView.open(
            mode, tracking=tracking, layout_root=layout_root, run_id=run_id, group=group, job_type=job_type, config=config
        )
    return tracker


# --- metrics.jsonl --------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> list[Row]:
    """Rows of a `metrics.jsonl`: of several rows at the same epoch (and step) the last, at the place of the first.

    Raises:
        DataError: the file is missing, or a line before the last is not a JSON object.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for row in _rows(path):
        rows[tuple(row.get(axis) for axis in AXES)] = row
    return list(rows.values())


def truncate_metrics(path: Path, keep: Callable[[Row], bool]) -> None:
    """Drop every row that `keep` refuses, atomically; a resume calls it to forget rows later than its checkpoint."""
    if not path.is_file():
        return
    kept = "".join(_line(row) for row in _rows(path) if keep(row))
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file", "run the `pretrain` stage of this run")
    *complete, _torn = path.read_text("utf-8", errors="replace").split("\n")
    return [_parse(path, number, text) for number, text in enumerate(complete, start=1)]


def _parse(path: Path, number: int, text: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not JSON ({error.msg})", "delete the file and run its stage again") from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}:{number}: expected an object, found {type(row).__name__}", "delete the file and run its stage again"
        )
    return row


def _line(row: Mapping[str, Any]) -> str:
    lost = {key: value for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    clean: Row = {key: None if key in lost else value for key, value in row.items()}
    if lost:
        clean["not_finite"] = ", ".join(f"{key}={value}" for key, value in lost.items())
    return json.dumps(clean, allow_nan=False) + "\n"


def _open_for_append(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    return path.open("ab", buffering=0)


# --- the view -------------------------------------------------------------------------------------------------------


def wanted_mode(parameter: Mode) -> Mode:
    """What `WANDB_MODE` and the parameter together ask for; an unknown `WANDB_MODE` is reported and ignored."""
    environment = os.environ.get("WANDB_MODE", "").strip().lower()
    if parameter == "off" or not environment:
        return parameter
    if environment not in _ENVIRONMENT:
        _log.warning("WANDB_MODE=%s is none of online, offline, disabled; it is ignored", environment)
        return parameter
    return _ENVIRONMENT[environment]


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
    ) -> Self | None:
        """Start a run in the best mode that works; None where none does."""
        if importlib.util.find_spec("wandb") is None:
            level = logging.INFO if mode == "auto" else logging.WARNING
            _log.log(level, "wandb is not installed: metrics go to metrics.jsonl alone (install the extra `tracking`)")
            return None
        folder = Path(os.environ.get("WANDB_DIR") or layout_root)
        start = {
            "project": tracking.project,
            "entity": tracking.entity,
            "id": re.sub(r"[^a-z0-9-]+", "-", run_id.lower()),
            "name": run_id,
            "group": group,
            "job_type": job_type,
            "config": dict(config),
            "resume": "allow",
            "dir": str(folder),
        }
        failures: list[str] = []
        for attempt in _attempts(mode, failures):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                run = _start(attempt, start)
            except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run goes on without it
                failures.append(f"{attempt} failed: {_brief(error)}")
                _release()
            else:
                if failures:
                    _log.warning("W&B is %s (%s)", attempt, "; ".join(failures))
                return cls(run)
        _log.warning("W&B is off (%s)", "; ".join(failures))
        return None

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Send one row, drawn over its epoch or step."""
        if self._run is None:
            return
        try:
            if self._axis is None:
                self._axis = next((axis for axis in AXES if axis in row), AXES[0])
                self._run.define_metric(self._axis)
                self._run.define_metric("*", step_metric=self._axis)
            self._run.log(dict(row))
        except Exception as error:  # noqa: BLE001 - as above
            self._fail("log", error)

    def finish(self, exit_code: int) -> None:
        """End the run, waiting no longer than `FINISH_TIMEOUT`."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail("finish", error)
        self._run = None

    def _fail(self, call: str, error: Exception) -> None:
        _log.warning("W&B is off from here on (%s failed: %s)", call, _brief(error))
        self._run = None


def _attempts(mode: Mode, failures: list[str]) -> list[Literal["online", "offline"]]:
    """Modes to try in turn; online only with a key, because without one W&B asks the terminal for it and waits."""
    if mode == "offline":
        return ["offline"]
    if _has_key():
        return ["online", "offline"]
    if mode == "online":
        failures.append("no key is configured, `wandb login` stores one")
    return ["offline"]


def _has_key() -> bool:
    """Whether W&B's own lookup (environment, its settings, netrc) finds credentials; it never asks for them."""
    try:
        import wandb
        from wandb.sdk.lib import wbauth

        host = wandb.setup().settings.base_url
        return (
            wbauth.authenticate_session(host=host, source="isd-repro", prompt=False, no_create=True, update_session=False)
            is not None
        )
    except Exception:  # noqa: BLE001 - the lookup is not a public function: without it, the variable decides
        return bool(os.environ.get("WANDB_API_KEY"))


def _start(mode: Literal["online", "offline"], start: Mapping[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        console="off",
        silent=True,
        x_save_requirements=False,
    )
    return wandb.init(mode=mode, settings=settings, **start)


def _release() -> None:
    """End W&B's service: an init that timed out goes on in there and holds the run id against the next attempt."""
    try:
        import wandb

        wandb.teardown()
    except Exception as error:  # noqa: BLE001 - as above
        _log.debug("W&B's service did not end: %s", _brief(error))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
