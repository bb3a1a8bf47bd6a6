"""What is said of one stage after the fact: everything that W&B shows of it, with nothing of W&B in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isd_repro.tracking.media import Picture
from isd_repro.tracking.metrics import Row


@dataclass(frozen=True)
class Item:
    """Something that a stage makes or needs; equal content is one version of one artifact wherever it is published from.

    Attributes:
        name: of the artifact.
        type: manifest, encoder, features, result or report.
        digests: sha256 of each file by name, of files that stay where they are.
        texts: small files that are sent, by name.
        uploads: files that are sent because `--upload` was asked for, by name.
        metadata: what is said of it.
    """

    name: str
    type: str
    digests: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    uploads: Mapping[str, Path] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Columns and rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Replay:
    """One stage of one run.

    Attributes:
        id: see `names.run_id`.
        title: what W&B shows.
        group: all stages of one run.
        job_type: the stage.
        tags: what runs are filtered by.
        config: values, code, packages, machine.
        rows: in order, each with its epoch; the last of each epoch, as `read_metrics` gives them.
        summary: final values beside the last row's.
        tables: by key.
        pictures: kept ones.
        needs: what it reads.
        makes: what it leaves.
        failed: it ended before its end.
    """

    id: str
    title: str
    group: str
    job_type: str
    tags: Sequence[str]
    config: Mapping[str, Any]
    rows: Sequence[Row] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    needs: Sequence[Item] = ()
    makes: Sequence[Item] = ()
    failed: bool = False

    def digest(self) -> str:
        """Sha256 of all of it; what has been sent under this digest need not be sent again."""
        found = hashlib.sha256(json.dumps(self._plain(), sort_keys=True, allow_nan=False).encode())
        for picture in self.pictures:
            found.update(picture.path.read_bytes())
        return found.hexdigest()

    def _plain(self) -> dict[str, Any]:
        items = [
            [item.name, item.type, dict(item.digests), dict(item.metadata), sorted(item.uploads)]
            + [[name, hashlib.sha256(content).hexdigest()] for name, content in sorted(item.texts.items())]
            for item in (*self.needs, *self.makes)
        ]
        own = {key: getattr(self, key) for key in ("id", "title", "group", "job_type", "failed")}
        tables = {key: [list(table.columns), [list(row) for row in table.rows]] for key, table in self.tables.items()}
        pictures = [[picture.key, picture.caption] for picture in self.pictures]
        content = {"config": dict(self.config), "rows": list(self.rows), "summary": dict(self.summary)}
        return {**own, **content, "tags": list(self.tags), "tables": tables, "pictures": pictures, "items": items}
