"""Sends what the disk knows of a stage to W&B: once, whatever was sent before and whoever sent it.

A stage has the same run id live and afterwards. A run that W&B already holds is resumed and gets only the epochs, pictures
and tables that it lacks; its summary keeps the digest of what was published, so that a second publish from any machine finds
nothing to do. Artifacts are content-addressed: files are referenced by sha256 and the same content is the same version.
Unlike the live view this raises: whoever publishes wants to know that it did not work.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from isd_repro.config.params import Tracking
from isd_repro.runtime import files
from isd_repro.runtime.errors import UserError
from isd_repro.tracking import names, session
from isd_repro.tracking.metrics import AXES
from isd_repro.tracking.replay import Item, Replay
from isd_repro.tracking.session import Attempt, brief
from isd_repro.tracking.view import define_axis, wandb_image, wandb_table

PUBLISHED = "published"  # key of a run's summary: digest of all that was sent
Outcome = Literal["sent", "known"]

# The publishing machine is not the one that made the results, and `config` says what that was: W&B need not look at this one.
_QUIET = {
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "disable_git": True,
    "disable_code": True,
    "program": "isd-repro",
    "host": "published",
    "finish_timeout_raises": True,
}
_READING = 60.0  # seconds that W&B's reader may take for an offline run
_NAMELESS = {"username": "", "email": "", "run_notes": "", "git_remote_url": "", "git_commit": ""}
_ENVIRONMENT = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def mode_of(tracking: Tracking) -> Attempt:
    """Online with a key, offline where `WANDB_MODE` or the parameter asks for it.

    Raises:
        UserError: W&B is not installed, is switched off by `WANDB_MODE`, or has no key.
    """
    if not session.installed():
        raise UserError("wandb is not installed", "install the extra `tracking` of isd-repro")
    mode = session.wanted_mode("auto" if tracking.wandb == "off" else tracking.wandb)
    if mode == "off":
        name = "WANDB_DISABLED" if os.environ.get("WANDB_DISABLED") else "WANDB_MODE"
        raise UserError(f"{name}={os.environ.get(name)} switches W&B off", "unset it, or set WANDB_MODE to offline")
    if mode == "offline":
        return "offline"
    if not session.has_key():
        raise UserError(
            "no W&B key is configured", "`wandb login` stores one; with WANDB_MODE=offline, `wandb sync` sends the runs later"
        )
    return "online"


def project_of(tracking: Tracking, *, anonymous: bool) -> Tracking:
    """Where things go: anonymous ones into a project of their own, never beside runs that name their maker."""
    return tracking.model_copy(update={"project": f"{tracking.project}-anonymous"}) if anonymous else tracking


class Publisher:
    """Sends replays to one project.

    Attributes:
        mode: `online`, or `offline` for `wandb sync`; an offline run has artifacts that it makes and none that it needs.
    """

    def __init__(self, tracking: Tracking, root: Path, *, anonymous: bool = False) -> None:
        self.mode: Attempt = mode_of(tracking)
        self._tracking = tracking
        self._quiet = {**_QUIET, **(_NAMELESS if anonymous else {})}
        self._folder = session.folder_of(root)
        server = session.server() if self.mode == "online" else "offline"
        entity = tracking.entity or os.environ.get("WANDB_ENTITY")
        target = names.digest({"server": server, "entity": entity, "project": tracking.project})
        self._staging = neutral_folder(self._folder) if anonymous else self._folder / "wandb" / "artifacts"
        self._marks = self._folder / "wandb" / "published" / target[:16]

    def send(self, replay: Replay) -> Outcome:
        """Send one stage, or find that it is all there.

        Raises:
            UserError: W&B did not take it; what is on the disk is as it was, and the next attempt goes on from there.
        """
        mark = self._marks / replay.id
        with files.exclusive(mark.with_name(f"{mark.name}.lock"), f"{replay.title}: it is already being published"):
            return self._send_once(replay, replay.digest(), mark)

    def _send_once(self, replay: Replay, digest: str, mark: Path) -> Outcome:
        before = _read(mark)
        if before.get(PUBLISHED) == digest:
            return "known"
        with _environment(self._staging):
            try:
                if self.mode == "offline":
                    before = {**self._kept_offline(replay.id), **before}
                sent = self._send(replay, digest, before)
            except UserError:
                raise
            except Exception as error:
                session.release()
                raise UserError(
                    f"{replay.title}: W&B did not take it ({brief(error)})",
                    "run the same command again; it goes on where it stopped",
                ) from error
        files.write_atomic(mark, (json.dumps(_keys(replay, digest), sort_keys=True) + "\n").encode())
        return "sent" if sent else "known"

    def _send(self, replay: Replay, digest: str, before: Mapping[str, Any]) -> bool:
        run = session.start(
            self.mode,
            {
                "project": self._tracking.project,
                "entity": self._tracking.entity,
                "id": replay.id,
                "name": replay.title,
                "group": replay.group,
                "job_type": replay.job_type,
                "tags": list(replay.tags),
                "config": {**replay.config, "artifacts": _lineage(replay)},
                "resume": "allow",
                "dir": str(self._folder),
            },
            **self._quiet,
        )
        known = dict(before) if self.mode == "offline" else dict(run.summary) if run.resumed else {}
        new = known.get(PUBLISHED) != digest
        if new:
            self._log(run, replay, known)
            self._artifacts(run, replay)
            run.summary.update({**_values(replay.rows[-1] if replay.rows else {}), **replay.summary, PUBLISHED: digest})
        run.finish(exit_code=int(replay.failed))
        return new

    def _log(self, run: Any, replay: Replay, known: Mapping[str, Any]) -> None:
        axis = define_axis(run, replay.rows[0] if replay.rows else {AXES[0]: 0})
        last, final = known.get(axis), _values(replay.rows[-1]) if replay.rows else {}
        changed = last == final.get(axis) and any(known.get(key) != value for key, value in final.items())
        for row in replay.rows:
            if last is None or row.get(axis, 0) > last or (changed and row.get(axis) == last):
                run.log(_values(row))
        for picture in replay.pictures:
            if changed or names.image(picture.key) not in known:
                run.log({names.image(picture.key): wandb_image(picture)})
        for key, table in replay.tables.items():
            if changed or names.table(key) not in known:
                run.log({names.table(key): wandb_table(table.columns, table.rows)})

    def _kept_offline(self, run_id: str) -> dict[str, Any]:
        """What offline runs of this id that lie here already say, live ones included: `wandb sync` sends them, too."""
        found: dict[str, Any] = {}
        for path in sorted((self._folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
            try:
                said = subprocess.run(command, capture_output=True, check=True, timeout=_READING).stdout
            except subprocess.CalledProcessError:
                continue  # a killed process may leave nothing to read, and then there is nothing to send either
            content = json.loads(said)
            if content.get("project") == self._tracking.project:
                found |= content["summary"]
        return found

    def _artifacts(self, run: Any, replay: Replay) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = [_artifact(item, Path(folder)) for item in replay.makes]
            needed = [_artifact(item, Path(folder)) for item in replay.needs] if self.mode == "online" else []
            for artifact in needed:
                run.use_artifact(artifact)
            for artifact in made:
                logged = run.log_artifact(artifact)
                if self.mode == "online":
                    logged.wait(timeout=int(session.FINISH_TIMEOUT))


def _keys(replay: Replay, digest: str) -> dict[str, Any]:
    """What an offline run cannot be asked for later: how far its rows go, and its pictures and tables."""
    found = _values(replay.rows[-1]) if replay.rows else {}
    shown = [*(names.image(picture.key) for picture in replay.pictures), *map(names.table, replay.tables)]
    return {**found, **dict.fromkeys(shown, True), PUBLISHED: digest}


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    """A small file of ours; one that is torn or someone else's says nothing, and W&B is asked instead."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lineage(replay: Replay) -> dict[str, Any]:
    """What goes in and out, in words: an offline run has no other way to say what it needs."""
    return {side: {item.name: item.type for item in items} for side, items in (("in", replay.needs), ("out", replay.makes))}


def _artifact(item: Item, folder: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(item.name, item.type, metadata=dict(item.metadata))
    for name, sha256 in sorted(item.digests.items()):
        artifact.add_reference(f"sha256://{sha256}/{name}", name=f"{name}.reference", checksum=False)
    for name, content in sorted(item.texts.items()):
        path = folder / hashlib.sha256(item.name.encode()).hexdigest()[:16] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        artifact.add_file(str(path), name=name)
    for name, path in sorted(item.uploads.items()):
        artifact.add_file(str(path), name=name)
    return artifact


@contextmanager
def _environment(staging: Path) -> Iterator[None]:
    """W&B quiet, and its copies of artifacts in a folder of ours rather than in the home."""
    wanted = {**_ENVIRONMENT, **dict.fromkeys(("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"), str(staging))}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def neutral_folder(folder: Path) -> Path:
    """Where anonymous artifacts wait to be sent: W&B writes this path into what it sends, so it may name nobody."""
    base = next((path for path in (Path("/var/tmp"), Path(tempfile.gettempdir())) if os.access(path, os.W_OK)), folder)  # noqa: S108
    return base / f"isd-repro-{names.digest({'folder': str(folder.resolve())})[:12]}"


def remembered(folder: Path, name: str) -> dict[str, str]:
    """What an earlier call kept under a name."""
    path = session.folder_of(folder) / "wandb" / "published" / f"{name}.json"
    return _read(path)


def remember(folder: Path, name: str, values: Mapping[str, str]) -> None:
    """Keep small facts for the next call."""
    path = session.folder_of(folder) / "wandb" / "published" / f"{name}.json"
    files.write_atomic(path, (json.dumps(dict(values), indent=1, sort_keys=True) + "\n").encode())
