"""Whether the rule of a profile's comparison was in git before the runs that it judges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isd_repro.config.params import Hypothesis
from isd_repro.report.run_records import Records
from isd_repro.verify.findings import Answer, Unproved, Verification, Wrong
from isd_repro.verify.records import git

_UNCOMMITTED = "the rule in params.yaml is in no commit, so it cannot be known when it was set"


def check_rule(state: Verification, records: Records) -> None:
    """The rule of a comparison that gives a verdict, if the profile has one and any run has a record."""
    asked = state.params.report.hypothesis
    if asked is not None and asked.contradicted_below is not None and any(one.manifest for one in records.runs.values()):
        state.note("rule before the runs", "profile", _before(state, records, asked))


def _before(state: Verification, records: Records, asked: Hypothesis) -> Iterator[Answer]:
    layout, stated = state.layout, asked.registered
    if git("rev-parse", "--is-inside-work-tree", folder=layout.root) is None:
        yield Unproved("git cannot tell here when the rule was set: the profile is in no checkout")
        return
    first = _first_commit(state, asked)
    if first is None:
        yield Unproved(_UNCOMMITTED)
    if stated is not None and stated != first:
        hint = "state the commit that first contained the rule as it stands; a changed rule is a new one"
        yield Wrong(layout.file, "report.hypothesis.registered", stated, f"{first or 'none'}, as git says", hint)
    if first is None:
        return
    runs_at: dict[str | None, list[str]] = {}
    for run, found in records.runs.items():
        for commit in dict.fromkeys(record.provenance.commit for record in found.records.values()):
            runs_at.setdefault(commit, []).append(run)
    late = set[str]()
    for commit, runs in runs_at.items():
        if commit is None or git("merge-base", "--is-ancestor", first, commit, folder=layout.root) is None:
            late.update(runs)
    if late:
        names = ", ".join(run for run in records.runs if run in late)
        yield Unproved(f"the rule is since commit {first[:12]}, which git does not know to be before the records of {names}")


def _first_commit(state: Verification, asked: Hypothesis) -> str | None:
    """The commit since which every version of the parameters has this rule; None if the last committed one does not."""
    path, root = state.layout.file, state.layout.root
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    first, wanted = None, _of(asked.model_dump(mode="json"))
    for commit in (git("log", "--format=%H", "--", name, folder=root) or b"").decode().split():  # the newest first
        if _rule_in(git("show", f"{commit}:./{name}", folder=root) or b"") != wanted:
            break
        first = commit
    return first


def _rule_in(content: bytes) -> dict[str, Any] | None:
    try:
        block = YAML(typ="safe").load(content.decode("utf-8"))["report"]["hypothesis"]
        return _of(Hypothesis.model_validate(block).model_dump(mode="json"))
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None


def _of(block: dict[str, Any]) -> dict[str, Any]:
    """What decides the verdict: all but the words for it and where it was committed."""
    return {key: value for key, value in block.items() if key not in ("readings", "registered")}
