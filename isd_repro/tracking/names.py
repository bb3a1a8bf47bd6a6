"""Id, name, group, tags and config of a stage in W&B, which are the same whether it is logged live or published later."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import fingerprint
from isd_repro.records import CHOSEN

ID_LENGTH = 8  # hex digits of what a stage was made from
RUN_CONFIG = ("backbone", "method", "optim", "data", "numerics")


@dataclass(frozen=True)
class StageRun:
    """The W&B run of one stage.

    Attributes:
        id: title and identity; a resumed stage has the same id, and a changed configuration has another one.
        title: the name that W&B shows.
        group: shared by all stages of one run.
        job_type: the stage.
        tags: for filtering runs.
        config: parameters of the run and of the stage, versions and machine.
    """

    id: str
    title: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]


def describe(params: Params, layout: Layout, name: str, stage: str, *, identity: str, config: Mapping[str, object]) -> StageRun:
    """Describe a stage of a run, or of a subset.

    The config of every stage of a run contains the run's parameters: those in its record, with which its encoder was trained, or
    those of the profile if there is no record.

    Args:
        params: the profile.
        layout: where its files are.
        name: a run or a subset.
        stage: the command.
        identity: hex digits that identify the stage's inputs: the fingerprint for `pretrain`, otherwise of their identity.
        config: values of this stage, versions and machine.
    """
    group, title = f"{params.profile}-{name}", f"{params.profile}-{name}-{stage}"
    run = params.runs.get(name)
    tags, own = [f"profile:{params.profile}", f"stage:{stage}"], {}
    if run is not None:
        tags += [f"method:{run.method.name}", f"subset:{run.data.subset}"]
        trained = read_json(layout.record(name, "pretrain"))
        fingerprint = identity if stage == "pretrain" else trained.get("fingerprint")
        own = {**run.model_dump(mode="json", include=set(RUN_CONFIG)), **trained.get("config", {})}
        own |= {"label": run.label, "subset": run.data.subset, "fingerprint": fingerprint}
    identifier = allowed(f"{title}-{identity[:ID_LENGTH]}")
    return StageRun(identifier, title, group, stage, tuple(tag[:64] for tag in tags), {**own, **config})


def read_json(path: Path) -> dict[str, Any]:
    """A note or a record as plain JSON; empty if it is missing or incomplete, which is reported where a record is required."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def allowed(name: str) -> str:
    """A run id in which hyphens replace the characters that W&B does not accept."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower())


def evaluation_identity(encoder_sha256: str, settings: Mapping[str, object]) -> str:
    """The identity of an evaluation's inputs: the encoder and the settings."""
    asked = {key: value for key, value in settings.items() if key not in CHOSEN}
    return fingerprint({"encoder": encoder_sha256, "settings": asked})


def image(key: str) -> str:
    """A picture's key in W&B."""
    return f"images/{key}"


def table(key: str) -> str:
    """A table's key in W&B."""
    return f"tables/{key}"
