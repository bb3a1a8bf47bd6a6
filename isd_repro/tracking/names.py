"""What a stage of a run is called in W&B: the same on every machine, live or published later."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from isd_repro.config.params import Params

ID_LENGTH = 8  # hex digits of what a stage was made from


def allowed(name: str) -> str:
    """A run id with hyphens in place of the characters that W&B refuses."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower())


def title(profile: str, name: str, stage: str) -> str:
    """What a reader sees: `demo-isd-pretrain`."""
    return f"{profile}-{name}-{stage}"


def run_id(profile: str, name: str, stage: str, identity: str) -> str:
    """The id: the title and what the stage was made from, so that a changed configuration is another run.

    Args:
        profile: the profile's name.
        name: a run or a subset.
        stage: the command.
        identity: hex digits, the run's fingerprint for `pretrain`, else `digest` of what goes in.
    """
    return allowed(f"{title(profile, name, stage)}-{identity[:ID_LENGTH]}")


def digest(parts: Mapping[str, object]) -> str:
    """Sha256 of JSON-serialisable parts."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def evaluation_identity(encoder_sha256: str, settings: Mapping[str, object]) -> str:
    """What `knn` and `linear` are made from: the encoder and the settings that were asked for."""
    asked = {key: value for key, value in settings.items() if key != "best_epoch"}
    return digest({"encoder": encoder_sha256, "settings": asked})


def group(profile: str, name: str) -> str:
    """All stages of one run."""
    return f"{profile}-{name}"


def tags(params: Params, name: str, stage: str) -> list[str]:
    """What runs are filtered by: profile and stage, and a run's method and subset; W&B allows 64 characters each."""
    run = params.runs.get(name)
    own = [f"method:{run.method.name}", f"subset:{run.data.subset}"] if run else []
    return [tag[:64] for tag in (f"profile:{params.profile}", f"stage:{stage}", *own)]


def image(key: str) -> str:
    """A picture's key in W&B."""
    return f"images/{key}"


def table(key: str) -> str:
    """A table's key in W&B."""
    return f"tables/{key}"
