"""A finished stage in the form in which W&B will show it, as plain data without W&B objects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isd_repro.tracking.media import Picture
from isd_repro.tracking.metrics import Row
from isd_repro.tracking.names import StageRun


@dataclass(frozen=True)
class Artifact:
    """An input or output of a stage; equal content is one version of one artifact, from whatever machine it is published.

    Attributes:
        name: of the artifact.
        type: manifest, encoder, features, result or report.
        digests: sha256, by name, of the files that are not sent.
        texts: small files that are sent, by name.
        uploads: files that are sent because of `--upload`, by name.
        metadata: shown with the artifact.
    """

    name: str
    type: str
    digests: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    uploads: Mapping[str, Path] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


LoggedTable = tuple[Sequence[str], Sequence[Sequence[Any]]]  # columns and rows


@dataclass(frozen=True)
class Replay:
    """One stage of one run.

    Attributes:
        run: id, name, group, tags and config, the same as live.
        rows: one row per epoch, in order, as `read_metrics` returns them.
        summary: final values in addition to those of the last row.
        tables: by key.
        pictures: those kept on the disk.
        needs: input artifacts.
        makes: output artifacts.
        failed: whether the stage stopped before it was finished.
    """

    run: StageRun
    rows: Sequence[Row] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    needs: Sequence[Artifact] = ()
    makes: Sequence[Artifact] = ()
    failed: bool = False

    def digest(self) -> str:
        """Sha256 of everything including files; what has been sent with this digest need not be sent again."""

        def content(value: object) -> str:
            return hashlib.sha256(value.read_bytes() if isinstance(value, Path) else bytes(value)).hexdigest()  # type: ignore[call-overload]

        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False, default=content)
        return hashlib.sha256(text.encode()).hexdigest()
