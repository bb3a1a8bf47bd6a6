"""A finished stage as W&B will show it, in plain data without any W&B object."""

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
    """Something that a stage makes or needs; equal content is one version of one artifact wherever it is published from.

    Attributes:
        name: of the artifact.
        type: manifest, encoder, features, result or report.
        digests: sha256 of each file by name, of files that stay where they are.
        texts: small files that are sent, by name.
        uploads: files that are sent because `--upload` was asked for, by name.
        metadata: shown beside the artifact.
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
        run: how W&B shows the stage, as it does live.
        rows: in order, each with its epoch; the last of each epoch, as `read_metrics` gives them.
        summary: final values beside those of the last row.
        tables: by key.
        pictures: those kept on the disk.
        needs: what the stage reads.
        makes: what it leaves.
        failed: it stopped before it was finished.
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
        """Sha256 of all of it, files included; what has been sent under this digest need not be sent again."""

        def content(value: object) -> str:
            return hashlib.sha256(value.read_bytes() if isinstance(value, Path) else bytes(value)).hexdigest()  # type: ignore[call-overload]

        text = json.dumps(asdict(self), sort_keys=True, allow_nan=False, default=content)
        return hashlib.sha256(text.encode()).hexdigest()
