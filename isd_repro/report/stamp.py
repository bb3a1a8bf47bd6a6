"""The inputs of a render, and the reason why a file differs from a fresh render.

Every render writes `render.json` next to its files, with hashes of the report's code, the parameters, the records and the files.
These prove nothing, and no check relies on them. They only distinguish an edited file from one that is out of date because code,
parameters or records have changed, so that the message can say what to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from isd_repro.config.params import Params
from isd_repro.report.run_records import Records

STAMP = "render.json"
_RENDER = "run `isd-repro report` again"


def stamped(params: Params, records: Records, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files together with their `render.json`."""
    shown = params.model_dump(mode="json", include={"report", "evaluation", "subsets", "runs"})
    parts: dict[str, Any] = {
        f"{run}/{part}": record for run, found in records.runs.items() for part, record in found.records.items()
    }
    parts |= {f"{external.record.name}/external": external.record for external in records.externals}
    stamp = {
        "format": 1,
        "code": _code(),
        "params": _digest(shown),
        "records": {name: _digest(record.model_dump(mode="json")) for name, record in parts.items()},
        "files": {name: _digest(content) for name, content in files.items()},
    }
    return {**files, STAMP: json.dumps(stamp, indent=1, sort_keys=True).encode() + b"\n"}


def _digest(content: object) -> str:
    """Of bytes, or of a tree as JSON."""
    found = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, allow_nan=False).encode()
    return hashlib.sha256(found).hexdigest()


@cache
def _code() -> str:
    """Sha256 over the report's modules and templates."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cause(folder: Path, files: Mapping[str, bytes], name: str) -> str:
    """The probable reason why a file differs from a fresh render, and what to do."""
    then, now = _stamp((folder / STAMP).read_bytes() if (folder / STAMP).is_file() else b""), _stamp(files[STAMP])
    if then.get("files", {}).get(name) is None:
        return f"it was rendered by an older version of the code, or edited: {_RENDER} and check with `git diff` what has changed"
    if then["files"][name] != _digest((folder / name).read_bytes()):
        return f"it was edited after it was rendered: restore it from git, or {_RENDER}"
    if then.get("code") != now["code"]:
        return f"it was rendered by another version of the code: {_RENDER}"
    changed = [key for key in now["records"] if then.get("records", {}).get(key) != now["records"][key]]
    if changed:
        return f"records have changed since it was rendered ({', '.join(changed)}): {_RENDER}"
    if then.get("params") != now["params"]:
        return f"the parameters have changed since it was rendered: restore them, or {_RENDER}"
    return f"it was rendered with other versions of the packages: {_RENDER}"


def _stamp(content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(content)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) and isinstance(tree.get("files"), dict) else {}
