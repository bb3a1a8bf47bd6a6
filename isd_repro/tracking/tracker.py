"""The tracker that every stage logs through: to disk first, then to W&B."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params, Tracking
from isd_repro.runtime.errors import UserError
from isd_repro.runtime.files import advice
from isd_repro.tracking import media, metrics, names, session
from isd_repro.tracking.live_view import LiveView
from isd_repro.tracking.names import StageRun

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("isd_repro.tracking")


class RunTracker:
    """Logs the numbers of a stage; as a context manager it also reports to W&B whether the block failed.

    A failure of W&B never stops a run, but a metrics file that cannot be written does.
    """

    def __init__(self, path: Path | None, pictures: Path | None = None) -> None:
        self.view = LiveView(None)
        self._warned = False
        self._path = path
        self._pictures = pictures
        self._file = metrics.open_for_append(path) if path is not None else None

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Write one row.

        Raises:
            UserError: `metrics.jsonl` cannot be written, for instance because the disk is full. No other exception is raised.
        """
        if self._file is not None:
            line = metrics.line(row).encode()
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise UserError(f"{self._path}: cannot be written ({error.strerror})", advice(error)) from error
        self.view.log(row)
        if "warning" in row and not self._warned:
            self._warned = True
            self.view.alert(f"{row['warning']}", ", ".join(f"{key} {value}" for key, value in row.items()))

    def log_image(self, key: str, pixels: Tensor, caption: str = "") -> None:
        """Keep a picture (uint8, C x H x W) as a PNG and show it; if it cannot be written, there is only a warning."""
        if self._pictures is None:
            return
        try:
            picture = media.save(self._pictures, key, pixels, caption)
        except OSError as error:
            _log.warning("%s: the picture %s was not saved (%s)", self._pictures, key, error)
            return
        self.view.image(picture)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in W&B. It is not kept on disk, because records contain its values."""
        self.view.table(key, columns, rows)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the view; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.view.finish(exit_code=int(failed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            self.view.stopped(error)
        self.close(failed=kind is not None)


def open_tracker(path: Path | None, run: StageRun, tracking: Tracking, root: Path, *, pictures: Path | None = None) -> RunTracker:
    """Open the metrics of one stage of one run; rows are appended to the file at `path` after its last complete line.

    Args:
        path: the `metrics.jsonl`; None writes no file and logs only to W&B.
        run: id, name, group, tags and config of the stage in W&B.
        tracking: the profile's `tracking` group.
        root: W&B writes under `<root>/wandb`, unless `WANDB_DIR` names another folder.
        pictures: folder of the PNG files; None keeps and shows no pictures.
    """
    tracker = RunTracker(path, pictures)
    mode = session.wanted_mode(tracking.wandb)
    if mode != "off":
        tracker.view = LiveView.open(mode, run, tracking, session.folder_of(root))
    if path is not None and path.is_file():
        tracker.view.catch_up(metrics.read_metrics(path))
    return tracker


def open_stage(
    stage: str,
    name: str,
    params: Params,
    layout: Layout,
    *,
    identity: str,
    config: Mapping[str, object],
    rows: Path | None = None,
) -> RunTracker:
    """The tracker of one stage of a run or of a subset, with the same names as `publish` uses.

    Args:
        stage: the command.
        name: of the run or subset.
        params: the profile.
        layout: where its files are.
        identity: identifies the inputs of the stage, see `names.describe`.
        config: values of the stage, versions and machine; the run's own parameters are added to them.
        rows: the `metrics.jsonl` of a stage that resumes, to which rows are appended; None starts a new one in the log folder.
    """
    log = layout.log(name, stage)
    if rows is None:
        rows = log / "metrics.jsonl"
        rows.unlink(missing_ok=True)
    run = names.describe(params, layout, name, stage, identity=identity, config=config)
    return open_tracker(rows, run, params.tracking, layout.root, pictures=log / "media")
