"""The one tracker that every stage logs through: disk first, then the view."""

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
from isd_repro.tracking import media, metrics, names
from isd_repro.tracking.session import wanted_mode
from isd_repro.tracking.view import WandbView

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger("isd_repro.tracking")


class RunTracker:
    """A `protocols.Tracker`, and a context manager that tells W&B whether the block failed."""

    def __init__(self, path: Path | None, pictures: Path | None = None) -> None:
        self.view: WandbView | None = None
        self._path = path
        self._pictures = pictures
        self._file = metrics.open_for_append(path) if path is not None else None

    def log(self, row: Mapping[str, float | int | str]) -> None:
        """Write one row.

        Raises:
            UserError: `metrics.jsonl` cannot be written, for instance because the disk is full. Nothing else is raised.
        """
        if self._file is not None:
            line = metrics.line(row).encode()
            try:
                if self._file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise UserError(
                    f"{self._path}: cannot be written ({error})", "make room and run the same command; it resumes"
                ) from error
        if self.view is not None:
            self.view.log(row)

    def log_image(self, key: str, pixels: Tensor, caption: str = "") -> None:
        """Keep a picture (uint8, C x H x W) as a PNG and show it; one that cannot be written costs a warning and no run."""
        if self._pictures is None:
            return
        try:
            picture = media.save(self._pictures, key, pixels, caption)
        except OSError as error:
            _log.warning("%s: the picture %s is not kept (%s)", self._pictures, key, error)
            return
        if self.view is not None:
            self.view.image(picture)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table. Nothing is kept: a table repeats what a record holds."""
        if self.view is not None:
            self.view.table(key, columns, rows)

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
    tags: Sequence[str] = (),
    name: str | None = None,
    pictures: Path | None = None,
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
        tags: W&B tags.
        name: what W&B shows; None shows the id.
        pictures: folder of the PNGs; None keeps and shows none.
    """
    tracker = RunTracker(path, pictures)
    mode = wanted_mode(tracking.wandb)
    if mode != "off":
        tracker.view = WandbView.open(
            mode,
            tracking=tracking,
            layout_root=layout_root,
            run_id=run_id,
            group=group,
            job_type=job_type,
            config=config,
            tags=tags,
            name=name,
        )
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
    """The tracker of one stage of one run, or of a subset, under the names that `publish` gives it too.

    Args:
        stage: the command.
        name: of the run or subset.
        params: the profile.
        layout: where its files are.
        identity: what the stage is made from, see `names.run_id`.
        config: values, versions and machine, as W&B shows them.
        rows: a `metrics.jsonl` to append to, of a stage that resumes; None starts one anew in the stage's log folder.
    """
    log = layout.log(name, stage)
    if rows is None:
        rows = log / "metrics.jsonl"
        rows.unlink(missing_ok=True)
    return open_tracker(
        rows,
        tracking=params.tracking,
        layout_root=layout.root,
        run_id=names.run_id(params.profile, name, stage, identity),
        group=names.group(params.profile, name),
        job_type=stage,
        config=config,
        tags=names.tags(params, name, stage),
        name=names.title(params.profile, name, stage),
        pictures=log / "media",
    )
