"""Sends a stage from disk to W&B exactly once, whatever was sent before and from whatever machine.

A stage has the same run id whether it is logged live or published later. A run that W&B already has is resumed and gets only the
epochs, pictures and tables that it lacks; its summary keeps the digest of what was published, so that a second publish from any
machine finds nothing to do. Artifacts are content-addressed: files are referenced by sha256, and equal content is one version.
Unlike the live view, this module raises exceptions, because the user of `publish` has to know about failures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from isd_repro.config.params import Tracking
from isd_repro.config.reader import fingerprint
from isd_repro.runtime import files
from isd_repro.runtime.errors import UserError
from isd_repro.tracking import history, names, session
from isd_repro.tracking.history import PUBLISHED, History
from isd_repro.tracking.live_view import MINIMA, define_metrics, wandb_image, wandb_table
from isd_repro.tracking.metrics import Row, finite
from isd_repro.tracking.replay import Artifact, Replay
from isd_repro.tracking.session import Attempt, brief

Outcome = Literal["sent", "known"]

_log = logging.getLogger("isd_repro.tracking")

# The publishing machine is not the one that made the results, and `config` says what that was: W&B need not look at this one.
_QUIET = {
    **dict.fromkeys(("x_disable_machine_info", "x_disable_meta", "x_disable_stats", "disable_git", "disable_code"), True),
    "program": "isd-repro",
    "host": "published",
    "finish_timeout_raises": True,
}
_NAMELESS = {"username": "", "email": "", "run_notes": "", "git_remote_url": "", "git_commit": ""}


def mode_of(tracking: Tracking) -> Attempt:
    """The mode: online if there is an API key, offline if `WANDB_MODE` or the parameter says so.

    Raises:
        UserError: W&B is not installed, is switched off by `WANDB_MODE`, or has no key.
    """
    if not session.installed():
        raise UserError("wandb is not installed", "install the extra `tracking` of isd-repro")
    mode = session.wanted_mode("auto" if tracking.wandb == "off" else tracking.wandb)
    if mode == "off":
        name = "WANDB_DISABLED" if os.environ.get("WANDB_DISABLED") else "WANDB_MODE"
        raise UserError(f"{name}={os.environ.get(name)} disables W&B", "unset it, or set WANDB_MODE to offline")
    if mode == "offline":
        return "offline"
    if not session.has_key():
        hint = "run `wandb login`; or set WANDB_MODE=offline and upload later with `wandb sync`"
        raise UserError("no W&B API key is configured", hint)
    return "online"


def project_of(tracking: Tracking, *, anonymous: bool) -> Tracking:
    """The project to publish to; anonymous data go to a separate project, away from runs that identify their authors."""
    return tracking.model_copy(update={"project": f"{tracking.project}-anonymous"}) if anonymous else tracking


class Publisher:
    """Sends replays to one project.

    Attributes:
        mode: `online`, or `offline` for `wandb sync`; an offline run contains the artifacts that it makes, but no inputs.
        notes: folder with notes of earlier calls about this server, entity and project.
    """

    def __init__(self, tracking: Tracking, root: Path, *, anonymous: bool = False) -> None:
        self._folder = session.folder_of(root)
        session.prepare(self._folder, neutral_folder(self._folder) if anonymous else None)
        self.mode: Attempt = mode_of(tracking)
        self._tracking = tracking
        self._settings = {**_QUIET, **(_NAMELESS if anonymous else {})}
        self.notes = notes_folder(self._folder, tracking, self.mode)

    def send(self, replay: Replay) -> Outcome:
        """Send one stage, unless W&B already has all of it.

        Raises:
            UserError: W&B failed; the files on the disk are unchanged, and the next attempt continues from there.
        """
        title, note, digest = replay.run.title, self.notes / replay.run.id, replay.digest()
        with files.exclusive(note.with_name(f"{note.name}.lock"), f"{title}: it is already being published"):
            noted = names.read_json(note)
            if noted.get(PUBLISHED) == digest:
                return "known"
            try:
                sent = self._send(replay, digest, noted)
            except Exception as error:
                session.release()
                hint = "run the same command again; it continues where it stopped"
                raise UserError(f"{title}: W&B did not accept it ({brief(error)})", hint) from error
            # an offline run cannot be asked later: `wandb clean` removes it once it is sent
            media = [*(names.image(picture.key) for picture in replay.pictures), *map(names.table, replay.tables)]
            write_note(note, {PUBLISHED: digest, "rows": list(replay.rows), "media": media})
        return "sent" if sent else "known"

    def _send(self, replay: Replay, digest: str, noted: Mapping[str, Any]) -> bool:
        """Whether there was anything to send."""
        there = History()
        if self.mode == "offline":
            there = history.on_disk(self._folder, replay.run.id, self._tracking.project)
            for row in noted.get("rows", ()):
                there.add(finite(row))
            there.media |= set(noted.get("media", ()))
        if there.digest == digest:
            return False
        sides = {"in": replay.needs, "out": replay.makes}  # an offline run has no other way to say what it needs
        lineage = {side: {one.name: one.type for one in each} for side, each in sides.items()}
        stage = replace(replay.run, config={**replay.run.config, "artifacts": lineage})
        run = session.start(self.mode, stage, self._tracking, self._folder, **self._settings)
        if self.mode == "online":
            there = history.on_server(run)
        new = there.digest != digest
        if new:
            self._log(run, replay, there)
            self._artifacts(run, replay)
            run.summary.update({**_final(replay.rows), **replay.summary, PUBLISHED: digest})
        run.finish(exit_code=int(replay.failed))
        if self.mode == "online":
            self._mark_synced(replay)
        return new

    def _mark_synced(self, replay: Replay) -> None:
        """Mark offline files as synced; a failure is ignored, because W&B has already accepted the data."""
        try:
            history.mark_synced(self._folder, replay.run.id, self._tracking.project)
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            words = "%s was sent, but its offline files could not be marked (%s): `wandb sync` would send it again"
            _log.warning(words, replay.run.title, brief(error))

    def _log(self, run: Any, replay: Replay, there: History) -> None:
        define_metrics(run, replay.rows[0] if replay.rows else {})
        missing = [row for row in replay.rows if not there.has(row)]
        for row in missing:
            run.log(finite(row))
        for picture in replay.pictures:
            if missing or names.image(picture.key) not in there.media:
                run.log({names.image(picture.key): wandb_image(picture)})
        for key, table in replay.tables.items():
            if missing or names.table(key) not in there.media:
                run.log({names.table(key): wandb_table(*table)})

    def _artifacts(self, run: Any, replay: Replay) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for one in replay.needs if self.mode == "online" else ():
                run.use_artifact(_artifact(one, Path(folder)))
            for one in replay.makes:
                logged = run.log_artifact(_artifact(one, Path(folder)))
                if self.mode == "online":
                    logged.wait(timeout=int(session.FINISH_TIMEOUT))


def _final(rows: Sequence[Row]) -> Row:
    """The summary of rows: the values of the last one, and for some keys the minimum, as in `define_metrics`."""
    found = finite(rows[-1]) if rows else {}
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in MINIMA}
    return found | {key: {"min": min(given), "last": given[-1]} for key, given in values.items() if given}


def _artifact(one: Artifact, folder: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(one.name, one.type, metadata=dict(one.metadata))
    for name, sha256 in sorted(one.digests.items()):
        artifact.add_reference(f"sha256://{sha256}/{name}", name=f"{name}.reference", checksum=False)
    for name, content in sorted(one.texts.items()):
        path = folder / hashlib.sha256(one.name.encode()).hexdigest()[:16] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        artifact.add_file(str(path), name=name)
    for name, path in sorted(one.uploads.items()):
        artifact.add_file(str(path), name=name)
    return artifact


def neutral_folder(folder: Path) -> Path:
    """The staging folder of anonymous artifacts: W&B writes its path into what it sends, so it must not identify anybody."""
    base = next((path for path in (Path("/var/tmp"), Path(tempfile.gettempdir())) if os.access(path, os.W_OK)), folder)  # noqa: S108
    return base / f"isd-repro-{fingerprint({'folder': str(folder.resolve())})[:12]}"


def notes_folder(folder: Path, tracking: Tracking, mode: Attempt) -> Path:
    """The folder that notes what was sent to one server, entity and project; without it, W&B's server is queried."""
    server = session.server() if mode == "online" else "offline"
    entity = tracking.entity or os.environ.get("WANDB_ENTITY")
    return folder / "wandb" / "published" / fingerprint({"server": server, "entity": entity, "project": tracking.project})


def write_note(path: Path, values: Mapping[str, Any]) -> None:
    """Keep small facts for the next call."""
    files.write_atomic(path, (json.dumps(dict(values), sort_keys=True) + "\n").encode())
