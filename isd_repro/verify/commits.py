"""What git and `dvc.lock` say: whether commits exist, the rule stood before the runs, and the lock names every record."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isd_repro import provenance
from isd_repro.config.params import Hypothesis
from isd_repro.report.run_records import Records, RunRecords
from isd_repro.verify.findings import Answer, State, Unproved, Verification, Wrong

_CHECKOUT = Path(provenance.__file__).parent.parent
_MAKE = "restore it from git; or, if stages ran without DVC, write it with `dvc commit`"


def _git(*arguments: str, folder: Path = _CHECKOUT) -> bytes | None:
    """What git prints in the checkout of this package (or another folder); None where it fails or is not there."""
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# --- commits ----------------------------------------------------------------------------------------------------------


def check_commits(found: RunRecords) -> Iterator[Answer]:
    """The commit of every record of a run exists, and its package has the source hash that the record states."""
    for part, record in found.records.items():
        origin = record.provenance
        if origin.commit is None:
            yield Unproved("made outside git, so that no commit names the code", State.RECORDED)
        elif not re.fullmatch(r"[0-9a-f]{40}", origin.commit):
            yield Wrong(part, "provenance.commit", repr(origin.commit), "a commit: 40 hexadecimal digits")
        elif not has_git():
            yield Unproved("git cannot tell here which commits exist: the package is not in a checkout of git")
        elif (source := source_of(origin.commit)) is None:
            if (_git("rev-parse", "--is-shallow-repository") or b"").strip() == b"true":
                yield Unproved(f"commit {origin.commit[:12]} is not in this shallow clone; `git fetch --unshallow` brings it")
            else:
                hint = "fetch the branch that it is on; or run the stage again at a commit that stays"
                yield Wrong(part, "provenance.commit", origin.commit, "a commit of this repository", hint)
        elif source != origin.source and origin.dirty is False:
            truth = f"{source}, the hash of the package at commit {origin.commit[:12]}"
            yield Wrong(part, "provenance.source", origin.source, truth)
        elif source != origin.source:
            yield Unproved("made with uncommitted changes, so that the code is known by its hash alone", State.RECORDED)


@cache
def has_git() -> bool:
    """Whether this package is in a checkout of git."""
    return _git("ls-files", "--error-unmatch", "isd_repro/__init__.py") is not None


@cache
def source_of(commit: str) -> str | None:
    """`provenance.source_hash` of the package at a commit; None where git does not know the commit."""
    content = _git("archive", "--format=tar", f"{commit}^{{commit}}", "isd_repro")
    if content is None:
        return None
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        modules = {Path(one.name): archive.extractfile(one) for one in archive if one.name.endswith(".py")}
        return provenance.hash_of((path.relative_to("isd_repro"), file.read()) for path, file in sorted(modules.items()) if file)


# --- the rule of a comparison -----------------------------------------------------------------------------------------


def check_rule(state: Verification, records: Records) -> None:
    """The rule of a comparison that gives a verdict, if the profile has one and any run has a record."""
    asked = state.params.report.hypothesis
    if asked is not None and asked.contradicted_below is not None and any(one.manifest for one in records.runs.values()):
        state.note("rule before the runs", "profile", _before(state, records, asked))


def _before(state: Verification, records: Records, asked: Hypothesis) -> Iterator[Answer]:
    layout, stated = state.layout, asked.registered
    if _git("rev-parse", "--is-inside-work-tree", folder=layout.root) is None:
        yield Unproved("git cannot tell here when the rule was set: the profile is in no checkout")
        return
    first = _first_commit(state, asked)
    if stated is not None and stated != first:
        hint = "state the commit that first contained the rule as it stands; a changed rule is a new one"
        yield Wrong(layout.file, "report.hypothesis.registered", stated, f"{first or 'none'}, as git says", hint)
    if first is None:
        yield Unproved("the rule in params.yaml is in no commit, so it cannot be known when it was set")
        return
    made = {run: {record.provenance.commit for record in found.records.values()} for run, found in records.runs.items()}
    later = {
        commit
        for commit in set().union(*made.values())
        if commit is None or _git("merge-base", "--is-ancestor", first, commit, folder=layout.root) is None
    }
    if late := [run for run, commits in made.items() if commits & later]:
        why = f"the rule is since commit {first[:12]}, which git does not know to be before the records of {', '.join(late)}"
        yield Unproved(why)


def _first_commit(state: Verification, asked: Hypothesis) -> str | None:
    """The commit since which every version of the parameters has this rule; None if the last committed one does not."""
    folder, name = state.layout.file.parent, state.layout.file.name
    first, wanted = None, _decisive(asked)
    for commit in (_git("log", "--format=%H", "--", name, folder=folder) or b"").decode().split():  # the newest first
        try:
            text = (_git("show", f"{commit}:./{name}", folder=folder) or b"").decode("utf-8")
            alone = re.search(r"^report:.*?(?=^[^\s#]|\Z)", text, re.DOTALL | re.MULTILINE)  # runs and subsets take long to parse
            tree = YAML(typ="safe").load(alone[0] if alone else text)
            if _decisive(Hypothesis.model_validate(tree["report"]["hypothesis"])) != wanted:
                break
        except (YAMLError, KeyError, TypeError, ValueError):
            break
        first = commit
    return first


def _decisive(asked: Hypothesis) -> dict[str, Any]:
    """What decides the verdict: all but the words for it and where it was committed."""
    return asked.model_dump(mode="json", exclude={"readings", "registered"})


# --- dvc.lock ---------------------------------------------------------------------------------------------------------


def check_lock(state: Verification, records: Records) -> None:
    """Every record that a stage wrote is in the lock with its hash; a missing lock is a finding, too."""
    layout, path = state.layout, state.layout.folder / "dvc.lock"
    here = {layout.record(run, kind): run for run, one in records.runs.items() for kind in one.records}
    if path.is_file() or (here and (layout.folder / "dvc.yaml").is_file()):
        state.note("dvc.lock", "profile", _compare(state, path, here))
    elif here:
        why = "this profile has no dvc.yaml, so no lock names the hashes of its records"
        state.note("dvc.lock", "profile", [Unproved(why)])


def _compare(state: Verification, path: Path, here: dict[Path, str]) -> Iterator[Answer]:
    """What the lock says of the records, and whether those that it names are there."""
    known: dict[Path, str] = {}
    if not path.is_file():
        yield Wrong(path, "file", "none", f"the hashes of {len(here)} records", _MAKE)
        return
    try:
        tree = YAML(typ="safe").load(path.read_text("utf-8"))
        for out in [out for stage in tree["stages"].values() for out in stage.get("outs", ())]:
            digest = known[(path.parent / str(out["path"])).resolve()] = str(out.get("md5") or "")
            if not digest:
                yield Wrong(path, str(out["path"]), "no hash", "the md5 of the output", _MAKE)
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:120] or type(error).__name__
        yield Wrong(path, "form", f"cannot be read ({said})", "a lock as DVC writes it", _MAKE)
        return
    folder = state.layout.records.resolve()
    for place, stated in known.items():
        if place.is_relative_to(folder) and not place.is_file():
            hint = "restore the record from git; or, if its run was abandoned, remove its stages from the lock"
            yield Wrong(place, "file", "none", f"md5 {stated}, as {path} says", hint, (place.parent.name,))
    for place, run in here.items():
        if (md5 := known.get(place.resolve())) is None:
            yield Wrong(path, state.shown(place), "no entry", "the md5 of this record", _MAKE)
        elif md5 and (found := hashlib.md5(place.read_bytes(), usedforsecurity=False).hexdigest()) != md5:
            hint = "restore the record from git; or, if a stage wrote it without DVC, add it to the lock with `dvc commit`"
            yield Wrong(place, "md5 of the file", found, f"{md5}, as {path} says", hint, (run,))
