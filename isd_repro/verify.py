"""Command `verify`: checks every number of a rendered report against its record and the available files.

Records are read and rescored, and the report is rendered again and compared byte by byte. Where an encoder and its images are
here, every evaluation is repeated by the very function that made its record, and its predictions are compared. What cannot be
known because a file is not available is said.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import Tensor

from isd_repro import evaluations, methods
from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout, snapshot_name
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.data import manifests
from isd_repro.data.prepare import rule_of
from isd_repro.evaluations import kind_of
from isd_repro.evaluations.features import load_features
from isd_repro.evaluations.subject import Curve, Outcome, SplitFeatures, Subject, Targets, open_run
from isd_repro.provenance import Provenance, describe
from isd_repro.records import (
    AnyEvaluation,
    CurvePoint,
    CurveRecord,
    EvaluationRecord,
    ManifestIdentity,
    PretrainRecord,
    Score,
    TargetsRecord,
    unpack_labels,
)
from isd_repro.report import cards, dvc_files, page, text
from isd_repro.report.learning_curves import LAST
from isd_repro.report.problems import AGAIN, Key, Problem
from isd_repro.report.run_records import RECORDED, Evaluation, Records, RunRecords, load
from isd_repro.report.stamp import STAMP, cause
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.runtime.progress import Progress
from isd_repro.tensor_files import load_tensors

TOLERATED = 0.005  # share of queries that may be classified otherwise under another arithmetic; docs/verify.md says why
CELLS = "cells.json"
_RESTORE = "restore the record from git, or run its stage again"
_PARAMETER = "restore the value in params.yaml; or, if the change is intended, make a new record with `dvc repro`"
_BRING_BACK = "restore the run's own file with `dvc checkout`; or run `{}` and all later stages again"
_RENDER = "run `isd-repro report` again"
Place = tuple[str, str, str, str]  # table, row, span, column: a number's address


class Verdict(StrEnum):
    """How far a number was verified."""

    RE_EVALUATED = "re-evaluated"
    RECOMPUTED = "recomputed"
    RECORDED = "recorded only"
    FAILED = "failed"


MEANING = {
    Verdict.RE_EVALUATED: "the encoder is available and reproduced every stored prediction",
    Verdict.RECOMPUTED: "computed again from the stored predictions",
    Verdict.RECORDED: "stored without predictions, so it cannot be checked",
    Verdict.FAILED: "a check of the number or of its files failed",
}
_STYLES = {Verdict.RE_EVALUATED: "green", Verdict.RECOMPUTED: "", Verdict.RECORDED: "yellow", Verdict.FAILED: "bold red"}
_WORST = (Verdict.FAILED, Verdict.RECORDED, Verdict.RECOMPUTED, Verdict.RE_EVALUATED)


@dataclass(frozen=True)
class VerifyOptions:
    """VerifyOptions of the command; `runs` empty means all of them."""

    runs: tuple[str, ...] = ()
    quick: bool = False  # records and rendered files alone
    linear: bool = False  # also the evaluations that train classifiers
    snapshots: bool = False  # also the encoders kept during training
    as_json: bool = False


@dataclass
class Verification:
    """Faults, remarks, and what was evaluated again.

    Attributes:
        repeated: (run, encoder, metric) whose every stored prediction was given again; a data set's metric is `<metric>-<set>`.
        snapshots: (run, epoch) whose every score was given again.
        cells: problems of single numbers of the rendered report.
    """

    params: Params
    layout: Layout
    options: VerifyOptions
    progress: Progress
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeated: set[tuple[str, str, str]] = field(default_factory=set)
    snapshots: set[tuple[str, int]] = field(default_factory=set)
    cells: dict[Place, Problem] = field(default_factory=dict)

    def problem(self, file: Path, key: str, found: object, expected: object, hint: str, *runs: str) -> Problem:
        """Note a problem; one that several runs share is one."""
        new = Problem(file, key, str(found), str(expected), hint, runs)
        for at, old in enumerate(self.problems):
            if replace(old, runs=()) == replace(new, runs=()):
                self.problems[at] = replace(old, runs=tuple(dict.fromkeys(old.runs + runs)))
                return old
        self.problems.append(new)
        return new

    def shown(self, words: object) -> str:
        """A path, or words with paths in them, without the repository's own place."""
        return str(words).replace(f"{self.layout.root}/", "")


def verify(params: Params, layout: Layout, options: VerifyOptions, console: Console) -> None:
    """Print a verdict for every number; tables or JSON on standard output, progress on `console`.

    Raises:
        ConfigError: no such run, or a method's parameters are wrong.
        DataError: after the account, where anything failed.
        UserError: a package of the extra `report` is missing.
    """
    started = time.monotonic()
    for name in options.runs:
        find_run(params, name)
    state = Verification(params, layout, options, Progress(console))
    records = load(params, layout, state.problems.append)
    _parameters(state, records)
    _locked(state, records)
    state.notes += [f"records of {run}, which is not a run in params.yaml, are not in any table" for run in records.strays]
    if not options.quick:
        for name in options.runs or params.runs:
            _files_of(state, name, records.runs[name])
    numbers = _numbers(state, records, _rendered(state, records))
    _print(state, numbers, time.monotonic() - started)
    if state.problems:
        raise DataError(f"{_failed(state)}, named above", "docs/verify.md says what each step compares")


# --- parameters, and the lock -----------------------------------------------------------------------------------------


def _parameters(state: Verification, records: Records) -> None:
    """The parameters still say what the records were made with."""
    params, layout, encoders = state.params, state.layout, dict[str, str]()
    for run, found in records.runs.items():
        now, subset = params.runs[run], params.subsets[params.runs[run].data.subset]
        if (made := found.pretrain) is not None:
            config = methods.config_of(run, now.method, layout.file)
            groups = {name: _both(getattr(now, name)) for name in ("backbone", "optim", "data", "numerics")}
            for group, (values, chosen) in {**groups, "method": _both(config)}.items():
                own = {"name": now.method.name} if group == "method" else {}
                stated = made.config.get(group, {}) | ({"subset": now.data.subset} if group == "data" else {})
                _changed(state, run, f"runs.{run}.{group}", own | values, own | chosen, stated)
            _changed(state, run, f"runs.{run}.label", now.label, now.label, made.label)
            _changed(state, run, f"subsets.{now.data.subset}.store", *_both(subset.store), made.config.get("store", {}))
            if (manifest := made.config.get("manifest")) != made.manifest.sha256:
                truth = f"{made.manifest.sha256}, its manifest.sha256"
                state.problem(layout.record(run, "pretrain"), "config.manifest", manifest, truth, AGAIN, run)
        for kind, record in found.records.items():
            if not isinstance(record, PretrainRecord):
                _settings(state, run, kind, record)
        if found.manifest is not None:
            rules = [_drawn(rule_of(subset), subset.source.dataset), _drawn(found.manifest.rule, found.manifest.dataset)]
            _changed(state, run, f"subsets.{now.data.subset}", rules[0], *rules)
        for kind, one in list(found.of_one_encoder.items())[:1]:  # an encoder's header holds its run's name
            if (other := encoders.setdefault(one.encoder_sha256, run)) != run:
                truth = f"a file of its own, but the records of {other} name the same"
                hint = "one of the two is a copy; restore it from git, or run its stages again"
                state.problem(layout.record(run, kind), "encoder_sha256", one.encoder_sha256, truth, hint, run)


def _settings(state: Verification, run: str, kind: str, record: AnyEvaluation) -> None:
    """The settings of an evaluation, and the protocol that they come to."""
    module, path = evaluations.load(kind), state.layout.record(run, kind)
    changed = evaluations.changes(kind, state.params.evaluation, record.settings)
    for key, (now, then) in changed.items():
        state.problem(state.layout.file, f"evaluation.{kind}.{key}", now, f"{then}, as the record says", _PARAMETER, run)
    expected = module.protocol(state.params.evaluation)
    if record.protocol != expected and not changed:
        state.problem(path, "protocol", repr(record.protocol), f"{expected!r}, from its settings", AGAIN, run)
    for one in record.evaluations if isinstance(record, TargetsRecord) else ():
        for key, found, truth in module.facts(one, getattr(state.params.evaluation, kind)):
            if found != truth:
                where = f"{one.manifest.subset}: {key}"
                state.problem(path, where, found, f"{truth}, as the list of data sets says", AGAIN, run)


def _drawn(rule: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """A manifest's rule in the form of the parameters; how it was stored is compared in full elsewhere."""
    counts = ("search_per_class", "query_per_class")
    own = {key: value for key, value in rule.items() if key not in ("source", "store", *counts)}
    source = {"name": rule.get("source"), "dataset": dataset}
    return {"rule": own, "source": source, **{key: rule.get(key) for key in counts}}


def _both(group: Frozen) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group of parameters with every default, and without."""
    return group.model_dump(mode="json"), group.model_dump(mode="json", exclude_defaults=True)


def _changed(state: Verification, run: str, prefix: str, now: Any, chosen: Any, then: Any) -> None:
    """Keys whose values differ; a key that came later than the record counts where its value is no default."""
    ours, theirs, own = dict(text.flatten(now)), dict(text.flatten(then)), dict(text.flatten(chosen))
    for key in sorted(key for key in ours.keys() | theirs.keys() if key in theirs or key in own):
        if ours.get(key) != theirs.get(key):
            where, truth = f"{prefix}.{key}" if key else prefix, f"{theirs.get(key, 'nothing')}, as the record says"
            state.problem(state.layout.file, where, ours.get(key, "nothing"), truth, _PARAMETER, run)


def _locked(state: Verification, records: Records) -> None:
    """The record files are those of the profile's `dvc.lock`; records made without DVC are in a note."""
    lock, layout = state.layout.folder / "dvc.lock", state.layout
    known = {path: md5 for path, md5 in _lock(lock).items() if path.is_relative_to(layout.records.resolve())}
    for path, md5 in known.items():
        run = path.parent.name
        if not path.is_file():
            hint = "restore the record from git; or, if its run was abandoned, remove its stages from the lock"
            state.problem(path, "file", "none", f"md5 {md5}, as {lock} says", hint, run)
        elif run in records.runs and (found := hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()) != md5:
            hint = "restore the record from git; or, if a stage wrote it without DVC, add it to the lock with `dvc commit`"
            state.problem(path, "md5 of the file", found, f"{md5}, as {lock} says", hint, run)
    here = [layout.record(run, kind) for run, one in records.runs.items() for kind in one.records]
    others = [f"{path.parent.name}/{path.name}" for path in here if known and path.resolve() not in known]
    state.notes += [f"not in dvc.lock, so no stage of DVC made them: {', '.join(others)}"] if others else []


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


# --- rendered files ---------------------------------------------------------------------------------------------------


def _rendered(state: Verification, records: Records) -> dict[Place, dict[str, Any]]:
    """Compare the report on the disk with a fresh one, byte by byte; the numbers that either shows, by address."""
    layout = state.layout
    report = page.assemble(state.params, records, layout, state.problems.append)
    damaged = {run for problem in state.problems for run in problem.runs}
    files = page.render(report)
    fresh = _cells(files[CELLS]) or {}
    path = layout.report / CELLS
    disk = _cells(path.read_bytes()) if path.is_file() else None
    if not layout.report.is_dir():
        state.notes.append(f"no report in {state.shown(layout.report)} yet: the numbers are those that `report` would render")
        return fresh
    for place in dict.fromkeys([*fresh, *disk]) if disk is not None else ():
        ours, theirs = (disk or {}).get(place, {}), fresh.get(place, {})
        keys = ("kind", "value", "correct", "n") if damaged else sorted({*ours, *theirs})
        wrong = [key for key in keys if ours.get(key) != theirs.get(key)]
        if wrong and not damaged & {*ours.get("runs", ()), *theirs.get("runs", ())}:
            pair = (json.dumps(cell.get(wrong[0])) for cell in (ours, theirs))
            where = f"{' / '.join(place)}: {wrong[0]}"
            state.cells[place] = state.problem(path, where, *pair, cause(layout.report, files, CELLS))
    if damaged:
        state.notes.append("other rendered files were not compared, because records or parameters failed their checks")
    else:
        _same_bytes(state, layout.report, {name: content for name, content in files.items() if name != CELLS or not state.cells})
        if layout.cards.is_dir():
            _same_bytes(state, layout.cards, cards.render(state.params, records, layout))
        if (layout.results / dvc_files.METRICS).is_file():
            _same_bytes(state, layout.results, dvc_files.render(records), others=False)
    return {**(disk or {}), **{place: cell for place, cell in fresh.items() if cell["value"] is not None or not disk}}


def _same_bytes(state: Verification, folder: Path, files: Mapping[str, bytes], others: bool = True) -> None:
    """Every file of a fresh render is on the disk, and unless `others` is false no other file beside them."""
    for name in (name for name in files if name != STAMP):
        path = folder / name
        if not path.is_file():
            state.problem(path, "file", "none", f"{len(files[name])} bytes", _RENDER)
        elif (found := path.read_bytes()) != files[name]:
            ours, theirs = (content.decode("utf-8", "replace").splitlines() for content in (found, files[name]))
            at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            pair = (lines[at][:200] if at < len(lines) else "nothing" for lines in (ours, theirs))
            state.problem(path, f"line {at + 1}", *pair, cause(folder, {**files, STAMP: files.get(STAMP, b"")}, name))
    names = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if others and path.is_file()}
    for path, inside in names.items():
        if inside.as_posix() not in files and inside.name != CELLS and not any(part.startswith(".") for part in inside.parts):
            state.problem(path, "file", "a file that no render writes", "none", f"remove it, or {_RENDER}")


def _cells(content: bytes) -> dict[Place, dict[str, Any]] | None:
    """The cells of a `cells.json` by their address; None where it is none."""
    found: dict[Place, dict[str, Any]] = {}
    try:
        for cell in json.loads(content)["cells"]:
            table, row, span, column = (str(cell[key]) for key in ("table", "row", "span", "column"))
            place, again = (table, row, span, column), 1
            while place in found:  # rows of one name
                again += 1
                place = (table, f"{row} ({again})", span, column)
            found[place] = cell
    except (ValueError, KeyError, TypeError):
        return None
    return found


# --- a verdict for every number ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """One number of a rendered report: its cell, the runs or the evaluated checkpoint that it comes from, and its verdict."""

    place: Place
    cell: Mapping[str, Any]
    runs: tuple[str, ...]
    verdict: Verdict
    reason: str = ""  # of a failure: the file and key

    def as_json(self) -> dict[str, Any]:
        """A flat mapping."""
        said = {key: self.cell[key] for key in ("kind", "encoder", "metric", "group", "value")}
        where = dict(zip(("table", "row", "span", "column"), self.place, strict=True))
        return {**where, **said, "runs": list(self.runs), "verdict": str(self.verdict), "reason": self.reason or None}


def _numbers(state: Verification, records: Records, cells: Mapping[Place, Mapping[str, Any]]) -> list[Number]:
    """A verdict for every cell that has a number of ours and is asked for, never better than what was done for it."""
    wanted, numbers = set(state.options.runs), []
    externals = {external.label: external.found for external in records.externals}
    for place, cell in cells.items():
        brought = cell["kind"] == "external"
        found = [externals[cell["row"]]] if brought and cell["row"] in externals else []
        runs = tuple(one.run for one in found) or ((cell["row"],) if brought else tuple(dict.fromkeys(cell["runs"])))
        if cell["value"] is None or not runs or cell["kind"] in ("paper", "computed") or (wanted and not wanted & set(runs)):
            continue
        each = [_verdict(state, one, cell) for one in found or [records.runs[run] for run in runs if run in records.runs]]
        verdict, reason = min(each, key=lambda one: _WORST.index(one[0]), default=(Verdict.FAILED, f"no records of {runs[0]}"))
        if place in state.cells:
            verdict, reason = Verdict.FAILED, f"{state.cells[place].file}: {state.cells[place].key}"
        numbers.append(Number(place, cell, runs, verdict, reason))
    return numbers


def _verdict(state: Verification, found: RunRecords, cell: Mapping[str, Any]) -> tuple[Verdict, str]:
    """Verdict of one score of a run or an evaluated checkpoint, and why it failed."""
    key: Key = (cell["encoder"], cell["metric"], cell["group"])
    snapshot = cell["kind"] == "snapshot"
    for problem in state.problems:
        if found.run in problem.runs and _concerns(problem, found, key, snapshot=snapshot):
            return Verdict.FAILED, f"{problem.file}: {problem.key}"
    epoch = int(cell["column"]) if snapshot else 0
    if snapshot and any(epoch != curve.points[-1].epoch for curve in found.curves.values()):  # the last one is the run's encoder
        return (Verdict.RE_EVALUATED if (found.run, epoch) in state.snapshots else Verdict.RECORDED), ""
    scores = list(_scores(found, key))
    if not scores:
        return Verdict.FAILED, f"no record of {found.run} has {' '.join(key)}"
    if all((found.run, key[0], metric) in state.repeated for _, metric in scores):
        return Verdict.RE_EVALUATED, ""
    return (Verdict.RECORDED if any(level == RECORDED for level, _ in scores) else Verdict.RECOMPUTED), ""


def _scores(found: RunRecords, key: Key) -> Iterator[tuple[str, str]]:
    """Level and metric of the scores behind a number: one, or one for each data set where it is their mean."""
    encoder, metric, group = key
    if (own := found.evaluation(metric)) is not None:
        if key in own.levels:
            yield own.levels[key], metric
        return
    for kind, targets in found.targets.items():
        for name, one in targets.sets.items() if kind == kind_of(metric) else ():
            for (other, base, of), level in one.levels.items():
                if (other, of) == (encoder, group) and metric in (base, f"{base}-{name}"):
                    yield level, f"{base}-{name}"


def _concerns(problem: Problem, found: RunRecords, key: Key, *, snapshot: bool) -> bool:
    """A problem of one evaluation's record says nothing of another's numbers; one of a data set's is the mean's over all."""
    encoder, metric, _ = key
    part, kind = problem.file.stem, kind_of(metric)
    if part in found.curves:  # its last point and the run's own scores are one encoder's: which of the two is right?
        return snapshot or (problem.key == LAST and metric in {score.metric for score in found.curves[part].points[-1].scores})
    if problem.score is not None and problem.score != key:
        return problem.score[0] == encoder and problem.score[1].startswith(f"{metric}-") and kind in found.targets
    known = found.evaluations.keys()
    return part not in known or kind not in known or part == kind


# --- the files of one run ---------------------------------------------------------------------------------------------


def _files_of(state: Verification, name: str, found: RunRecords) -> None:
    """Hold the records of a run against its images, encoder and features, and evaluate again what can be."""
    if not found.records:
        return
    layout, path = state.layout, state.layout.encoder(name)
    if not path.is_file():
        state.notes.append(f"{name}: the encoder is not available ({state.shown(path)}), so its numbers are not re-evaluated")
        return
    folder = layout.prepared(state.params.runs[name].data.subset)
    if not _header(state, name, found) or not _snapshot_files(state, name, found):
        return
    if not (folder / "manifest.json").is_file():
        state.notes.append(
            f"{name}: the prepared images are not available ({state.shown(folder)}), so its numbers are not re-evaluated"
        )
        return
    try:
        if not _manifest(state, name, found, manifests.read_header(folder).identity):
            return
        subject = open_run(name, state.params, layout, state.progress, anew=True)
    except DataError as error:
        state.problem(path, "identity", error.message, "the run's own encoder and images", error.hint, name)
        return
    try:
        right = _labels(state, found, subject)
    except DataError as error:
        said = error.message.removeprefix(f"{folder / 'manifest.json'}: ")
        state.problem(folder, "prepared images", said, "those that `prepare` wrote", error.hint, name)
        return
    if right:
        _evaluations(state, name, found, subject)


def _evaluations(state: Verification, name: str, found: RunRecords, subject: Subject) -> None:
    """Repeat every evaluation that the options ask for; features are computed once for all."""
    left = []
    for kind, one in found.evaluations.items():
        if isinstance(one, Evaluation) and not _inputs(state, kind, one.record, subject):
            continue
        of_snapshots = isinstance(one, CurveRecord)
        if (of_snapshots and not state.options.snapshots) or (
            getattr(evaluations.load(kind), "TRAINS", False) and not state.options.linear
        ):
            left.append(f"{evaluations.title(kind)} (--{'snapshots' if of_snapshots else 'linear'})")
            continue
        _again(state, kind, found, subject)
    if left:
        state.notes.append(f"{name}: not re-evaluated unless the option is given: {', '.join(left)}")
    if "features" in vars(subject):
        _stored_features(state, name, found, subject.features)


def _header(state: Verification, name: str, found: RunRecords) -> bool:
    """The encoder file, and what it says of itself, against the run's records."""
    path, (first, record) = state.layout.encoder(name), next(iter(found.of_one_encoder.items()), ("", None))
    if record is None:
        return False
    sha256, expected = sha256_file(path), record.encoder_sha256
    if sha256 != expected:
        said = f"{expected}, as {name}/{first}.json says"
        state.problem(path, "sha256 of the file", sha256, said, _BRING_BACK.format("pretrain"), name)
        return False
    try:
        header = load_tensors(path, "encoder")[1]
    except DataError as error:
        state.problem(path, "tensors", error.message.removeprefix(f"{path}: "), "an encoder", error.hint, name)
        return False
    facts: dict[str, Any] = {"run": name, "profile": state.params.profile, "manifest": record.manifest.sha256}
    if found.pretrain is not None:
        facts |= {"fingerprint": found.pretrain.fingerprint, "encoders": list(found.pretrain.encoders)}
    wrong = [key for key, value in facts.items() if header.get(key) != value]
    for key in wrong:
        said = f"{facts[key]}, as the records of {name} say"
        state.problem(path, key, header.get(key), said, _BRING_BACK.format("pretrain"), name)
    return not wrong


def _snapshot_files(state: Verification, name: str, found: RunRecords) -> bool:
    """The snapshots that are here are those of the records; the last point is the run's own encoder."""
    whole = True
    for kind, record in found.curves.items():
        files = {point: state.layout.snapshots(name) / snapshot_name(point.epoch) for point in record.points[:-1]}
        here = {point: path for point, path in files.items() if path.is_file()}
        if len(here) < len(files):
            what = f"{len(files) - len(here)} of {len(files)} snapshots are not available"
            state.notes.append(f"{name}: {what}, so their numbers are recorded only")
        for point, path in here.items():
            if (sha256 := sha256_file(path)) != point.encoder_sha256:
                said, file = f"{point.encoder_sha256}, as {name}/{kind}.json says", state.layout.record(name, kind)
                key = f"epoch {point.epoch}: {state.shown(path)}"
                state.problem(file, key, sha256, said, _BRING_BACK.format("pretrain"), name)
                whole = False
    return whole


def _manifest(state: Verification, name: str, found: RunRecords, here: ManifestIdentity) -> bool:
    """The prepared images are what every record of the run says of them."""
    for kind, record in found.records.items():
        if here != record.manifest:
            ours, theirs = here.model_dump(mode="json"), record.manifest.model_dump(mode="json")
            key = next(key for key in ("sha256", *ours) if ours[key] != theirs[key])
            hint = "these are not the run's images: run `prepare` again with the run's parameters, or `dvc checkout`"
            file = state.layout.prepared(here.subset) / "manifest.json"
            state.problem(file, f"identity.{key}", ours[key], f"{theirs[key]}, as {name}/{kind}.json says", hint, name)
            return False
    return True


def _labels(state: Verification, found: RunRecords, subject: Subject) -> bool:
    """The labels of every record of the manifest's queries are those of the images."""
    label = subject.split("query").label
    same = [_same_labels(state, kind, found, subject, label) for kind in found.own if not evaluations.own_queries(kind)]
    return all(same)


def _same_labels(state: Verification, kind: str, found: RunRecords, subject: Subject, label: Tensor) -> bool:
    """The labels of a record are those of its queries."""
    name, stated, classes = subject.name, found.own[kind].label, subject.manifest.classes
    if stated.equal(label):
        return True
    file = state.layout.record(name, kind)
    if len(stated) != len(label):
        state.problem(file, "labels", f"{len(stated)} entries", f"{len(label)}, the queries of the images", _RESTORE, name)
        return False
    at = int((stated != label).nonzero()[0])
    truth = f"{classes[int(label[at])]}, as the manifest's images say"
    state.problem(file, f"labels[{at}]", classes[int(stated[at])], truth, _RESTORE, name)
    return False


def _inputs(state: Verification, kind: str, record: EvaluationRecord, subject: Subject) -> bool:
    """What a record says of the images that its evaluation learnt from, where its file says that of itself."""
    module, config = evaluations.load(kind), getattr(subject.settings, kind)
    if not hasattr(module, "inputs"):
        return True
    if missing := module.missing(config, record.settings):
        state.notes.append(f"{subject.name}: {kind} is not evaluated again: {missing}")
        return False
    stated, here = dict(text.flatten(record.settings)), dict(text.flatten(module.inputs(subject, config)))
    wrong = [key for key, value in here.items() if stated.get(key) != value]
    for key in wrong:
        truth = f"{here[key]}, as the images and the draw say"
        file = state.layout.record(subject.name, kind)
        state.problem(file, f"settings.{key}", stated.get(key), truth, _RESTORE, subject.name)
    return not wrong


def _stored_features(state: Verification, name: str, found: RunRecords, now: SplitFeatures) -> None:
    """The features file, where it is here: of this encoder, that which the evaluations used, and how far it is from now."""
    path = state.layout.features(name)
    if not path.is_file():
        return
    try:
        stored = load_features(path, sha256_file(state.layout.encoder(name)))
    except DataError as error:
        said = error.message.removeprefix(f"{path}: ")
        state.problem(path, "identity", said, "features of the run's encoder", _BRING_BACK.format("extract"), name)
        return
    pairs = [
        (rows, {"search": stored.search, "query": stored.query}[split].get(encoder))
        for split, by_encoder in now.items()
        for encoder, rows in by_encoder.items()
    ]
    far = max((_distance(ours, theirs) for ours, theirs in pairs), default=0.0)
    if far:
        state.notes.append(f"{name}: features computed here differ by {far:.2g} at most from {state.shown(path)}")
    sha256 = sha256_file(path)
    for kind, one in found.own.items():
        if one.record.features_sha256 not in (None, sha256):
            said = f"{one.record.features_sha256}, as {name}/{kind}.json says"
            state.problem(path, "sha256 of the file", sha256, said, _BRING_BACK.format("extract"), name)
            return


def _distance(ours: Tensor, theirs: Tensor | None) -> float:
    if theirs is None or ours.shape != theirs.shape:
        return float("inf")
    return max((float((a - b).abs().max()) for a, b in zip(ours.split(1024), theirs.split(1024), strict=True)), default=0.0)


# --- evaluating again -------------------------------------------------------------------------------------------------


def _again(state: Verification, kind: str, found: RunRecords, subject: Subject) -> None:
    """Repeat an evaluation and compare it with its record."""
    name, file, record = subject.name, state.layout.record(subject.name, kind), found.records[kind]
    assert not isinstance(record, PretrainRecord)
    config, evaluate = getattr(subject.settings, kind), evaluations.load(kind).evaluate
    if evaluations.changes(kind, subject.settings, record.settings):
        return  # which is a problem of the parameters
    try:
        if isinstance(record, EvaluationRecord):
            outcome = evaluate(subject, config)
            assert isinstance(outcome, Outcome)
            if outcome.label is not None and not _same_labels(state, kind, found, subject, outcome.label):
                return
            _compare(state, name, file, record, outcome.predictions, outcome.chosen)
        elif isinstance(record, CurveRecord):
            curve = evaluate(subject, config)
            assert isinstance(curve, Curve)
            _compare_points(state, name, file, record, {point.epoch: point for point in curve.points})
        else:
            for stated in record.evaluations:
                _again_on_target(state, subject, file, stated, evaluations.load(kind), config)
    except (ConfigError, DataError) as error:
        expected = f"an evaluation as in {name}/{kind}.json"
        state.problem(state.layout.encoder(name), f"{kind} again", error.message, expected, error.hint, name)


def _again_on_target(
    state: Verification, subject: Subject, file: Path, stated: EvaluationRecord, module: Any, config: Any
) -> None:
    """Repeat an evaluation on one other data set, where that is here."""
    key, name = stated.manifest.subset, subject.name
    if missing := module.absent(key):
        state.notes.append(f"{key} is not here, so the numbers on it are not re-evaluated: {missing}")
        return
    found = module.evaluate(subject, config.model_copy(update={"sets": (key,)}))
    assert isinstance(found, Targets)
    (now,) = found.evaluations
    if now.manifest != stated.manifest or now.labels != stated.labels:
        ours, theirs = stated.manifest.model_dump(mode="json"), now.manifest.model_dump(mode="json")
        other = next((field for field in ("sha256", *ours) if ours[field] != theirs[field]), "")
        where, said = (f"manifest.{other}", ours[other]) if other else ("labels", "other labels")
        truth = f"{theirs[other] if other else 'those of its images'}, as the data set's images here say"
        hint = "these are other images or classes than the run saw: name the folder that it saw, or restore the record"
        state.problem(file, f"{key}: {where}", said, truth, hint, name)
        return
    predictions = {which: unpack_labels(packed) for which, packed in now.predictions.items()}
    _compare(state, name, file, stated, predictions, now.settings, key)


def _compare(
    state: Verification,
    name: str,
    file: Path,
    record: EvaluationRecord,
    now: Mapping[str, Tensor],
    chosen: Mapping[str, Any],
    target: str = "",
) -> None:
    """Every stored prediction and choice against today's; what another arithmetic explains leaves the verdict alone."""
    prefix, suffix = (f"{target}: ", f"-{target}") if target else ("", "")
    classes, alike = record.manifest.classes, True
    for key, packed in sorted(record.predictions.items()):
        stored, (encoder, metric) = unpack_labels(packed), key.split("/")
        where = f"{prefix}predictions[{key!r}]"
        if key not in now or len(now[key]) != len(stored):
            state.problem(file, where, "predictions", "none: the evaluation does not give them", _RESTORE, name)
            alike = False
            continue
        other = (stored != now[key]).nonzero()[:, 0]
        if not len(other):
            state.repeated.add((name, encoder, metric + suffix))
            continue
        alike, said = False, f"{len(other)} of {len(stored)} predictions differ"
        if not same_arithmetic(record.provenance) and len(other) <= TOLERATED * len(stored):
            stays = "this machine or torch is not the record's, so it stays recomputed"
            state.notes.append(f"{name}: {prefix}{said} in {key}; {stays}")
            continue
        at = int(other[0])
        truth = f"{classes[int(now[key][at])]}, as the encoder here gives ({said})"
        state.problem(file, f"{where}[{at}]", classes[int(stored[at])], truth, _RESTORE, name)
    ours, theirs = dict(text.flatten(dict(chosen))) if chosen else {}, dict(text.flatten(record.settings))
    for key in (key for key in ours if alike and ours[key] != theirs.get(key)):
        state.problem(file, f"{prefix}settings.{key}", theirs.get(key), f"{ours[key]}, as the encoder here gives", _RESTORE, name)


def _compare_points(state: Verification, name: str, file: Path, record: CurveRecord, now: Mapping[int, CurvePoint]) -> None:
    """Every score of every snapshot that is here."""
    for point in (point for point in record.points if point.epoch in now):
        stated, given = (_by_key(one.scores) for one in (point, now[point.epoch]))
        other = sorted(key for key in stated.keys() | given.keys() if stated.get(key) != given.get(key))
        near = all(key in stated and key in given and _near(stated[key], given[key]) for key in other)
        if not other:
            state.snapshots.add((name, point.epoch))
        elif near and not same_arithmetic(record.provenance):
            stays = "on this machine or torch, so they stay recorded only"
            state.notes.append(f"{name}: epoch {point.epoch}: {len(other)} scores differ {stays}")
        else:
            for key in other:
                found, truth = (f"{one[key][0]} of {one[key][1]}" if key in one else "none" for one in (stated, given))
                where = f"epoch {point.epoch}: scores[{' '.join(key)}]"
                state.problem(file, where, found, f"{truth}, as the snapshot here gives", _RESTORE, name)


def _by_key(scores: tuple[Score, ...]) -> dict[tuple[str, str, str], tuple[int, int]]:
    return {(one.encoder, one.metric, one.group): (one.correct, one.n) for one in scores}


def _near(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    return ours[1] == theirs[1] and abs(ours[0] - theirs[0]) <= TOLERATED * ours[1]


def same_arithmetic(recorded: Provenance) -> bool:
    """Whether bits can be expected to be equal: the same processor, device and torch."""
    here = describe(0.0)
    ours, theirs = here.machine, recorded.machine
    return (ours.cpu, ours.gpu, ours.system) == (theirs.cpu, theirs.gpu, theirs.system) and (
        here.versions["torch"] == recorded.versions.get("torch")
    )


# --- what is printed --------------------------------------------------------------------------------------------------


def _failed(state: Verification) -> str:
    return f"{len(state.problems)} check{'' if len(state.problems) == 1 else 's'} failed"


def _by_run(numbers: list[Number]) -> dict[str, Counter[Verdict]]:
    """How many numbers have each verdict, by run; those of several runs under one name of their own."""
    found: dict[str, Counter[Verdict]] = {}
    for number in numbers:
        name = number.runs[0] if len(number.runs) == 1 else "differences and means"
        found.setdefault(name, Counter())[number.verdict] += 1
    return found


def _print(state: Verification, numbers: list[Number], seconds: float) -> None:
    """Failures first, then the summary; in a pipe nothing is cut."""
    total, by_run, notes = Counter(one.verdict for one in numbers), _by_run(numbers), list(dict.fromkeys(state.notes))
    problems = [
        {"file": one.file, "key": one.key, "found": one.found, "expected": one.expected, "do": one.hint} for one in state.problems
    ]
    if state.options.as_json:
        told = [{key: state.shown(value) for key, value in one.items()} for one in problems]
        tree = {
            "format": 1,
            "profile": state.params.profile,
            "ok": not state.problems,
            "counts": {str(verdict): total[verdict] for verdict in Verdict},
            "runs": {run: {str(verdict): of[verdict] for verdict in Verdict} for run, of in by_run.items()},
            "numbers": [{**one.as_json(), "reason": state.shown(one.reason) or None} for one in numbers],
            "failures": [{**one, "runs": list(problem.runs)} for one, problem in zip(told, state.problems, strict=True)],
            "notes": [state.shown(note) for note in notes],
            "seconds": round(seconds, 1),
        }
        sys.stdout.write(json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return
    out = Console(file=sys.stdout, highlight=False)
    out.width = out.width if out.is_terminal else max(out.width, 130)

    def say(words: object, style: str = "") -> None:
        out.print(state.shown(words), style=style, markup=False, soft_wrap=True)

    for one in problems:
        say(one.pop("file"), "bold red")
        for term, words in one.items():
            say(f"  {term:<9} {words}")
    title = Text(f"{state.params.profile}: numbers by verdict")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for verdict in Verdict:
        table.add_column(str(verdict), justify="right", no_wrap=True)
    for run, of in by_run.items():
        table.add_row(Text(run), *(Text(str(of[verdict] or ""), _STYLES[verdict]) for verdict in Verdict))
    out.print(table)
    for verdict, meaning in MEANING.items():
        if total[verdict]:
            say(f"{verdict}: {meaning}", "dim")
    for note in notes:
        say(f"note: {note}", "dim")
    each = ", ".join(f"{total[verdict]} {verdict}" for verdict in Verdict if total[verdict]) or "none"
    say(f"{len(numbers):,} numbers: {each}; {_failed(state)}; {text.duration(seconds)}")
