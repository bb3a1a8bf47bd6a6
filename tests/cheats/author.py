"""What a cheating author can make consistent: fingerprint, lock and report, after any change of records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isd_repro.config.reader import fingerprint
from tests.verify.world import Answer, Profile

RECORDS = "reports/tiny/records"


def write_lock(profile: Profile, *, without: str = "") -> Path:
    """A lock that names every record as it is now, and the pipeline's file beside it; `without` leaves one hash out."""
    stages = []
    for path in sorted((profile.folder / RECORDS).glob("*/*.json")):
        name = path.relative_to(profile.folder).as_posix()
        md5 = f"      md5: {hashlib.md5(path.read_bytes()).hexdigest()}\n" if name != without else ""
        out = f"    - path: {name}\n      hash: md5\n{md5}"
        stages.append(f"  {path.stem}@{path.parent.name}:\n    cmd: isd-repro {path.stem} {path.parent.name}\n    outs:\n{out}")
    (profile.folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    lock = profile.folder / "dvc.lock"
    lock.write_text(f"schema: '2.0'\nstages:\n{''.join(stages)}", encoding="utf-8")
    return lock


def forge(profile: Profile, run: str, part: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change one record and everything that follows from it: its fingerprint, the lock, the rendered report."""

    def whole(tree: dict[str, Any]) -> None:
        change(tree)
        if "fingerprint" in tree:
            tree["fingerprint"] = fingerprint(tree["config"])

    profile.edit(profile.record(run, part), whole)
    write_lock(profile)
    profile.report()


def failed(answer: Answer, check: str, file: str, key: str) -> dict[str, Any]:
    """The check failed for that file and key, in the list of checks and in the exit code."""
    assert answer.code == 4
    assert answer.tree["checks"][check]["failed"] >= 1
    found = [one for one in answer.tree["failures"] if one["file"] == file and one["key"].startswith(key)]
    assert found, answer.failures
    assert found[0]["do"]
    return dict(found[0])
