"""Do the parameters still say what the records were made with, and does DVC's lock still know the records?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isd_repro import evaluations
from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import AnyEvaluation, PretrainRecord, TargetsRecord
from isd_repro.report import text
from isd_repro.report.faults import AGAIN, Fault
from isd_repro.report.records import Records

_RESTORE = "restore the value in the parameters; or, if it is meant, make the record anew with `dvc repro`"


@dataclass(frozen=True)
class Planned:
    """What the parameters come to, with every default.

    Attributes:
        methods: the `method` block of each run, with every default, and without.
        rules: how each subset is drawn, as its manifest says it.
    """

    methods: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
    rules: Mapping[str, Mapping[str, Any]]


def parameters(params: Params, records: Records, layout: Layout, planned: Planned) -> list[Fault]:
    """Every value of a run or subset that is not the one its records were made with; one fault for all runs that share it."""
    merged: dict[tuple[Path, str, str, str], Fault] = {}
    for fault in _every(params, records, layout, planned):
        key = fault.file, fault.key, fault.found, fault.expected.split(", as ")[0]
        before = merged.get(key)
        merged[key] = replace(before, runs=tuple(dict.fromkeys(before.runs + fault.runs))) if before else fault
    return list(merged.values())


def _every(params: Params, records: Records, layout: Layout, planned: Planned) -> Iterator[Fault]:
    for run, found in records.runs.items():
        if found.pretrain is not None:
            yield from _of_run(run, params, found.pretrain, layout, planned.methods[run])
        for part, record in found.records.items():
            if isinstance(record, PretrainRecord):
                continue
            yield from _settings(run, part, record, params, layout)
        if found.manifest is not None:
            name = params.runs[run].data.subset
            now = _drawn(planned.rules[name], params.subsets[name].source.dataset)
            then = _drawn(found.manifest.rule, found.manifest.dataset)
            yield from _changes(run, f"subsets.{name}", now, now, then, layout, next(iter(found.of_one_encoder)))


def _settings(run: str, kind: str, record: AnyEvaluation, params: Params, layout: Layout) -> Iterator[Fault]:
    """The settings of an evaluation, and the protocol that they come to."""
    changed = evaluations.changes(kind, params.evaluation, record.settings)
    for key, (now, then) in changed.items():
        said = f"{then}, as {run}/{kind}.json says"
        yield Fault(layout.file, f"evaluation.{kind}.{key}", str(now), said, _RESTORE, (run,))
    expected = evaluations.load(kind).protocol(params.evaluation)
    for one in record.evaluations if isinstance(record, TargetsRecord) else ():
        for key, found, truth in evaluations.load(kind).facts(one, getattr(params.evaluation, kind)):
            if found != truth:
                where = f"{one.manifest.subset}: {key}"
                yield Fault(layout.record(run, kind), where, f"{found}", f"{truth}, as the list of data sets says", AGAIN, (run,))
    if record.protocol != expected and not changed:
        said = f"{expected!r}, from its settings"
        yield Fault(layout.record(run, kind), "protocol", repr(record.protocol), said, AGAIN, (run,))


def _of_run(
    run: str, params: Params, record: PretrainRecord, layout: Layout, method: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> Iterator[Fault]:
    now = params.runs[run]
    groups = {
        "backbone": _both(now.backbone),
        "method": method,
        "optim": _both(now.optim),
        "data": _both(now.data, {"subset"}),
        "numerics": _both(now.numerics),
    }
    for group, (values, chosen) in groups.items():
        yield from _changes(run, f"runs.{run}.{group}", values, chosen, record.config.get(group, {}), layout, "pretrain")
    label = {"label": now.label}
    yield from _changes(run, f"runs.{run}", label, label, {"label": record.label}, layout, "pretrain")
    store, made = _both(params.subsets[now.data.subset].store), record.config.get("store", {})
    yield from _changes(run, f"subsets.{now.data.subset}.store", *store, made, layout, "pretrain")
    manifest = record.config.get("manifest")
    if manifest != record.manifest.sha256:
        path = layout.record(run, "pretrain")
        hint = "run `pretrain` again; if it was edited by hand, restore it from git"
        yield Fault(path, "config.manifest", str(manifest), f"{record.manifest.sha256}, its manifest.sha256", hint, (run,))


def _drawn(rule: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """A manifest's rule in the form of the parameters; how it was stored is compared in full elsewhere."""
    beside = ("source", "search_per_class", "query_per_class", "store")
    own = {key: value for key, value in rule.items() if key not in beside}
    return {
        "rule": own,
        "source": {"name": rule.get("source"), "dataset": dataset},
        **{key: rule.get(key) for key in ("search_per_class", "query_per_class")},
    }


def _both(group: Frozen, exclude: set[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group of parameters with every default, and without."""
    with_defaults = group.model_dump(mode="json", exclude=exclude)
    return with_defaults, group.model_dump(mode="json", exclude=exclude, exclude_defaults=True)


def _changes(run: str, prefix: str, now: Any, chosen: Any, then: Any, layout: Layout, part: str) -> Iterator[Fault]:
    """Keys whose values differ; a key that a record from before it existed lacks counts where its value is no default."""
    ours, theirs, own = dict(text.flatten(now)), dict(text.flatten(then)), dict(text.flatten(chosen))
    for key in sorted(key for key in ours.keys() | theirs.keys() if key in theirs or key in own):
        if ours.get(key) != theirs.get(key):
            said = f"{theirs.get(key, 'nothing')}, as {run}/{part}.json says"
            yield Fault(layout.file, f"{prefix}.{key}" if key else prefix, ours.get(key, "nothing"), said, _RESTORE, (run,))


def copies(records: Records, layout: Layout) -> Iterator[Fault]:
    """Runs that name one encoder file: an encoder's header holds its run's name, so no two runs can have made it."""
    seen: dict[str, str] = {}
    for run, found in records.runs.items():
        for part, record in list(found.of_one_encoder.items())[:1]:  # parts that disagree are a fault of their own
            other = seen.setdefault(record.encoder_sha256, run)
            if other != run:
                path = layout.records / run / f"{part}.json"
                expected = f"a file of its own, but the records of {other} name the same"
                hint = "one of the two was copied; restore it from git, or run its stages again"
                yield Fault(path, "encoder_sha256", record.encoder_sha256, expected, hint, (run,))


def locked(records: Records, layout: Layout) -> Iterator[Fault]:
    """Record files that are not those of the profile's `dvc.lock`, and those that it names and that are gone.

    Records made without DVC are not in it; `unlocked` names them.
    """
    lock = layout.folder / "dvc.lock"
    for path, expected in _of_lock(layout).items():
        run = path.parent.name
        if not path.is_file():
            hint = "restore the record from git; or, if its run was given up, take its stages out of the lock"
            yield Fault(path, "file", "none", f"md5 {expected}, as {lock} says", hint, (run,))
        elif run in records.runs:
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()  # DVC's own hash
            if found != expected:
                hint = "restore the record from git; or, if a stage made it without DVC, take it into the lock with `dvc commit`"
                yield Fault(path, "md5 of the file", found, f"{expected}, as {lock} says", hint, (run,))


def unlocked(records: Records, layout: Layout) -> list[str]:
    """Records beside those of the profile's `dvc.lock`, as `run/part.json`; nothing where the lock has no record at all."""
    known = _of_lock(layout)
    here = [layout.record(run, part) for run, found in records.runs.items() for part in found.records]
    return [f"{path.parent.name}/{path.name}" for path in here if known and path.is_file() and path.resolve() not in known]


def _of_lock(layout: Layout) -> dict[Path, str]:
    """Md5 of every record of the profile that its lock names, by place."""
    folder = layout.records.resolve()
    return {path: md5 for path, md5 in _lock(layout.folder / "dvc.lock").items() if path.is_relative_to(folder)}


def _lock(path: Path) -> dict[Path, str]:
    """Md5 of every single file that some stage made, by its place; nothing where there is no readable lock."""
    if not path.is_file():
        return {}
    try:
        tree = YAML(typ="safe").load(path.read_text("utf-8"))
        outs = [out for stage in tree["stages"].values() for out in stage.get("outs", ())]
        return {(path.parent / out["path"]).resolve(): str(out["md5"]) for out in outs if not str(out["md5"]).endswith(".dir")}
    except (YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return {}
