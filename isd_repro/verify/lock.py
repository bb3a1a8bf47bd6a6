"""Whether the records are those that the profile's `dvc.lock` names; a missing lock is a finding, too."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isd_repro.report.run_records import Records
from isd_repro.verify.findings import Answer, Unproved, Verification, Wrong

LOCK = "dvc.lock"
_MAKE = "restore it from git; or, if stages ran without DVC, write it with `dvc commit`"


def check_lock(state: Verification, records: Records) -> None:
    """Every record that a stage wrote is in the lock with its hash."""
    layout, path = state.layout, state.layout.folder / LOCK
    here = {layout.record(run, kind): run for run, one in records.runs.items() for kind in one.records}
    if path.is_file() or (here and (layout.folder / "dvc.yaml").is_file()):
        state.note("dvc.lock", "profile", _compare(state, path, here))
    elif here:
        why = "this profile has no dvc.yaml, so no lock names the hashes of its records"
        state.note("dvc.lock", "profile", [Unproved(why)])


def _compare(state: Verification, path: Path, here: dict[Path, str]) -> Iterator[Answer]:
    """What the lock says of the records; those that are wrong are problems of their runs."""
    known: dict[Path, str] = {}
    if not path.is_file():
        yield Wrong(path, "file", "none", f"the hashes of {len(here)} records", _MAKE)
        return
    try:
        for out in _outs(path):
            digest = out.get("md5")
            if not isinstance(digest, str) or not digest:
                yield Wrong(path, str(out["path"]), "no hash", "the md5 of the output", _MAKE)
            known[(path.parent / str(out["path"])).resolve()] = str(digest or "")
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:120] or type(error).__name__
        yield Wrong(path, "form", f"cannot be read ({said})", "a lock as DVC writes it", _MAKE)
        return
    folder = state.layout.records.resolve()
    for place, stated in known.items():
        run = place.parent.name
        if place.is_relative_to(folder) and not place.is_file():
            hint = "restore the record from git; or, if its run was abandoned, remove its stages from the lock"
            state.problem(place, "file", "none", f"md5 {stated}, as {path} says", hint, run)
            yield Wrong(place, "file", "none", f"md5 {stated}, as {path} says", hint)
    for place, run in here.items():
        if (md5 := known.get(place.resolve())) is None:
            yield Wrong(path, state.shown(place), "no entry", "the md5 of this record", _MAKE)
        elif md5 and (found := hashlib.md5(place.read_bytes(), usedforsecurity=False).hexdigest()) != md5:
            hint = "restore the record from git; or, if a stage wrote it without DVC, add it to the lock with `dvc commit`"
            state.problem(place, "md5 of the file", found, f"{md5}, as {path} says", hint, run)
            yield Wrong(place, "md5 of the file", found, f"{md5}, as {path} says", hint)


def _outs(path: Path) -> list[dict[str, Any]]:
    """Every output of every stage; whatever goes wrong where it is no lock is an error of the YAML or a missing key."""
    tree = YAML(typ="safe").load(path.read_text("utf-8"))
    return [out for stage in tree["stages"].values() for out in stage.get("outs", ())]
