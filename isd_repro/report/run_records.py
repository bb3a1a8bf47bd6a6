"""Reads a profile's committed records and checks them against each other and against their own predictions.

Each check that fails is a `Problem`, told to an `OnProblem`. Rendering a report raises at the first; `verify` keeps them all and
goes on with what is left.
"""

from __future__ import annotations

import binascii
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from isd_repro import evaluations
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.evaluations import kind_of
from isd_repro.records import (
    MAX_QUERIES,
    AnyEvaluation,
    CurveRecord,
    EvaluationRecord,
    ExternalRecord,
    Labels,
    ManifestIdentity,
    Mask,
    PretrainRecord,
    Record,
    Score,
    TargetsRecord,
    mean_per_class,
    query_groups,
    read_evaluation,
    read_record,
    unpack_labels,
)
from isd_repro.report import consistency
from isd_repro.report.problems import AGAIN, OnProblem, Problem, refuse
from isd_repro.report.problems import Key as Key
from isd_repro.runtime.errors import DataError

EXTERNAL = "external.json"
PRETRAIN = "pretrain"
RECOMPUTED = "recomputed from stored predictions"
RECORDED = "recorded only"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation record that has passed every check."""

    record: EvaluationRecord
    scores: Mapping[Key, Score]  # by (encoder, metric, group)
    levels: Mapping[Key, str]  # how far each score was verified
    label: Labels  # class of every query, int64, N
    predictions: Mapping[str, Labels]  # predicted class of every query by "<encoder>/<metric>", int64, N
    masks: Mapping[str, Mask]  # queries of each group, bool, N

    def hits(self, encoder: str, metric: str, group: str) -> Mask | None:
        """Whether each query of a group was classified correctly, bool; None without stored predictions."""
        predicted = self.predictions.get(f"{encoder}/{metric}")
        return None if predicted is None or group not in self.masks else (predicted == self.label)[self.masks[group]]


@dataclass(frozen=True)
class CheckedTargets:
    """A record of several target data sets that has passed every check, and its evaluations by data set."""

    record: TargetsRecord
    sets: Mapping[str, Evaluation]


Checked = Evaluation | CheckedTargets | CurveRecord
Wrong = Callable[..., None]  # takes key, found, expected and perhaps the score that it makes worthless


def check(record: EvaluationRecord, path: Path, run: str, tell: OnProblem) -> Evaluation | None:
    """Recompute every score that has predictions; None where nothing can be unpacked and the tell takes that."""

    def wrong(key: str, found: str, expected: str, score: Key | None = None) -> None:
        tell(Problem(path, key, found, expected, AGAIN, (run,), score))

    manifest, classes = record.manifest, len(record.manifest.classes)
    groups = {"large": manifest.large, **{f"shots.{group}": names for group, names in manifest.shots.items()}}
    unknown = {where: sorted(set(of_group) - set(manifest.classes)) for where, of_group in groups.items()}
    if where := next(filter(unknown.get, unknown), None):
        wrong(f"manifest.{where}", ", ".join(unknown[where]), "names in manifest.classes")
        return None
    label = _unpack(record.labels, "labels", None if evaluations.own_queries(record.kind) else manifest.query, classes, wrong)
    if label is None:
        return None
    predictions: dict[str, Labels] = {}
    for name, packed in record.predictions.items():
        predicted = _unpack(packed, f"predictions[{name!r}]", len(label), classes, wrong)
        predictions |= {} if predicted is None else {name: predicted}
    if len(predictions) < len(record.predictions):
        return None
    masks, scores, levels = query_groups(label, manifest), dict[Key, Score](), dict[Key, str]()
    for one in record.scores:
        key = (one.encoder, one.metric, one.group)
        where, given = f"scores[{' '.join(key)}]", f"{one.correct} of {one.n}"
        if key in scores:
            wrong(where, "stated twice", "once", key)
        if not 0 <= one.correct <= one.n or one.n == 0:
            wrong(where, given, "a score", key)
            continue
        predicted = predictions.get(f"{one.encoder}/{one.metric}")
        scores[key], levels[key] = one, RECORDED if predicted is None else RECOMPUTED
        if predicted is not None:
            mask = masks.get(one.group, np.zeros(len(label), dtype=np.bool_))
            correct, n = int((predicted == label)[mask].sum()), int(mask.sum())
            if (correct, n) != (one.correct, one.n):
                wrong(where, given, f"{correct} of {n}, from its predictions", key)
    if lone := sorted(set(predictions) - {f"{encoder}/{metric}" for encoder, metric, _ in scores}):
        wrong(f"predictions[{lone[0]!r}]", "without a score", "a score of the same name")
    return Evaluation(record, scores, levels, label, predictions, masks)


def _unpack(packed: str, key: str, wanted: int | None, classes: int, wrong: Wrong) -> Labels | None:
    """Packed classes, `wanted` of them where that is known; None where they cannot be."""
    try:
        values = unpack_labels(packed, MAX_QUERIES if wanted is None else wanted)
    except (binascii.Error, zlib.error, ValueError) as error:
        wrong(key, f"no packed labels ({error})", "packed labels" if wanted is None else f"{wanted} packed labels")
        return None
    if wanted is not None and len(values) != wanted:
        wrong(key, f"{len(values)} entries", f"{wanted}, one for each query")
        return None
    if len(values) and int(values.max()) >= classes:
        wrong(key, f"class {int(values.max())}", f"0 to {classes - 1}")
        return None
    return values


def _check_targets(record: TargetsRecord, path: Path, tell: OnProblem) -> CheckedTargets:
    """Recompute both numbers of every target set."""
    checked: dict[str, Evaluation] = {}
    for part in record.evaluations:
        key = part.manifest.subset

        def tell_set(problem: Problem, key: str = key) -> None:
            """A problem of one target data set: it is that set's number which it makes worthless."""
            score = (problem.score[0], f"{problem.score[1]}-{key}", problem.score[2]) if problem.score else None
            tell(replace(problem, key=f"{key}: {problem.key}", score=score))

        if one := check(part, path, record.run, tell_set):
            checked[key] = one
            means = {name: mean_per_class(found, one.label) for name, found in one.predictions.items()}
            given = part.mean_per_class
            if given.keys() != means.keys() or any(abs(means[name] - given[name]) > 1e-9 for name in means):
                expected = f"{means}, from its predictions"
                tell(Problem(path, f"{key}: mean_per_class", f"{given}", expected, AGAIN, (record.run,)))
    return CheckedTargets(record, checked)


@dataclass(frozen=True)
class RunRecords:
    """The records of one run that exist: of its pretraining, and of its evaluations by their names."""

    run: str
    pretrain: PretrainRecord | None = None
    evaluations: Mapping[str, Checked] = field(default_factory=dict)

    @property
    def records(self) -> dict[str, PretrainRecord | AnyEvaluation]:
        """Every record by its file's name, that of the pretraining first."""
        own: dict[str, PretrainRecord | AnyEvaluation] = {PRETRAIN: self.pretrain} if self.pretrain else {}
        return own | {kind: one if isinstance(one, CurveRecord) else one.record for kind, one in self.evaluations.items()}

    @property
    def of_one_encoder(self) -> dict[str, PretrainRecord | EvaluationRecord | TargetsRecord]:
        """The records that name the run's encoder: all but curves, which name many."""
        return {kind: record for kind, record in self.records.items() if not isinstance(record, CurveRecord)}

    @property
    def own(self) -> dict[str, Evaluation]:
        """Every checked evaluation on the run's own images, by its name."""
        return {kind: one for kind, one in self.evaluations.items() if isinstance(one, Evaluation)}

    @property
    def targets(self) -> dict[str, CheckedTargets]:
        """Every checked evaluation on other data sets, by its name."""
        return {kind: one for kind, one in self.evaluations.items() if isinstance(one, CheckedTargets)}

    @property
    def curves(self) -> dict[str, CurveRecord]:
        """Every record of scores over training, by its evaluation's name."""
        return {kind: one for kind, one in self.evaluations.items() if isinstance(one, CurveRecord)}

    @property
    def manifest(self) -> ManifestIdentity | None:
        """The images behind every record; None where nothing was run."""
        return next((record.manifest for record in self.of_one_encoder.values()), None)

    def evaluation(self, metric: str) -> Evaluation | None:
        """The evaluation on the run's own images that a metric belongs to."""
        return self.own.get(kind_of(metric))


@dataclass(frozen=True)
class External:
    """An evaluated checkpoint that no run of the profile made: what is said of the file, and its checked evaluations."""

    record: ExternalRecord
    found: RunRecords

    @property
    def label(self) -> str:
        """Of its row, which tells it from runs and from other checkpoints."""
        return f"{self.record.label} (checkpoint {self.record.name})"


@dataclass(frozen=True)
class Records:
    """All records of a profile: one entry per run of the params, in their order."""

    runs: Mapping[str, RunRecords]
    strays: tuple[str, ...]  # record folders whose run is not in the params
    externals: tuple[External, ...] = ()  # record folders with external.json, by name


def load(params: Params, layout: Layout, tell: OnProblem = refuse) -> Records:
    """Read and check all records of a profile.

    Raises:
        DataError: a record is damaged, belongs to another run, disagrees with another part or run about encoder, images or
            labels, or states a score that its predictions do not give; unless `tell` takes it.
    """
    runs = {name: _load_run(name, params, layout, tell) for name in params.runs}
    _same_images(runs, params, layout, tell)
    folders = sorted(path for path in layout.records.iterdir() if path.is_dir()) if layout.records.is_dir() else []
    others = [path for path in folders if path.name not in params.runs and not path.name.startswith(".")]
    externals = (_load_external(path / EXTERNAL, tell) for path in others if (path / EXTERNAL).is_file())
    strays = tuple(path.name for path in others if not (path / EXTERNAL).is_file())
    return Records(runs, strays, tuple(filter(None, externals)))


def kinds_in(folder: Path) -> list[str]:
    """The evaluations that have a record in a run's folder, in their usual order; unknown ones last."""
    known = evaluations.names()
    found = {path.stem for path in folder.glob("*.json") if not path.name.startswith(".")} - {PRETRAIN}
    return [*(kind for kind in known if kind in found), *sorted(found - set(known))]


def _read(path: Path, read: Callable[[Path], Record], run: str, tell: OnProblem) -> Record | None:
    """One record; None where the file is missing, or is none and the tell takes that. A link to nowhere is not missing."""
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        record = read(path)
    except DataError as error:
        if tell is refuse:
            raise
        tell(Problem(path, "form", error.message.removeprefix(f"{path}: "), "a record", error.hint, (run,)))
        return None
    if isinstance(record, EvaluationRecord | TargetsRecord | CurveRecord) and (
        wrong := evaluations.problem(record.kind, record.settings)
    ):
        tell(Problem(path, "settings", wrong, f"settings of `{record.kind}`", AGAIN, (run,)))
        return None
    return record


def _load_run(name: str, params: Params, layout: Layout, tell: OnProblem) -> RunRecords:
    paths = {kind: layout.record(name, kind) for kind in (PRETRAIN, *kinds_in(layout.records / name))}
    pretrain = _read(paths[PRETRAIN], partial(read_record, model=PretrainRecord), name, tell)
    found: dict[str, PretrainRecord | AnyEvaluation] = {PRETRAIN: pretrain} if pretrain else {}
    checked: dict[str, Checked] = {}
    for kind, path in paths.items():
        one: AnyEvaluation | None = None if kind == PRETRAIN else _read(path, read_evaluation, name, tell)
        if one is None:
            continue
        found[kind] = one
        if isinstance(one, CurveRecord | TargetsRecord):
            checked[kind] = one if isinstance(one, CurveRecord) else _check_targets(one, path, tell)
        elif evaluation := check(one, path, name, tell):
            checked[kind] = evaluation
    for part, key, ours, theirs, said in consistency.facts(found, params.profile, name, params.runs[name].data.subset):
        if ours != theirs:
            other_run = key in ("encoder_sha256", "manifest.sha256")
            hint = "the records come from different runs; run the later stages again" if other_run else AGAIN
            tell(Problem(paths[part], key, repr(ours), f"{theirs!r}{said}", hint, (name,)))
    return RunRecords(name, pretrain, checked)


def _load_external(path: Path, tell: OnProblem) -> External | None:
    """A record that `evaluate --out` wrote; checked like a run's, and against what it says of its own file."""
    name = path.parent.name
    record = _read(path, partial(read_record, model=ExternalRecord), name, tell)
    if record is None:
        return None
    kinds = [one.kind for one in record.evaluations]
    facts = [("name", record.name, name), ("evaluations", len(kinds), len(set(kinds)))]
    for part in record.evaluations:
        facts += [(f"{part.kind}.run", part.run, name), (f"{part.kind}.encoder_sha256", part.encoder_sha256, record.sha256)]
        facts += [(f"{part.kind}.manifest.sha256", part.manifest.sha256, record.evaluations[0].manifest.sha256)]
    for key, found, expected in facts:
        if found != expected:
            tell(Problem(path, key, repr(found), repr(expected), "run `evaluate` again", (name,)))
    checked = {part.kind: one for part in record.evaluations if (one := check(part, path, name, tell))}
    return External(record, RunRecords(name, None, checked))


def _same_images(runs: Mapping[str, RunRecords], params: Params, layout: Layout, tell: OnProblem) -> None:
    """Rows of one table must be about the same queries over the same images, under the same settings."""
    seen: dict[tuple[str, ...], tuple[Path, object]] = {}

    def same(of: tuple[str, ...], name: str, kind: str, key: str, value: object, hint: str, what: str = "") -> None:
        """The value must be that of the first record of the same kind; `what` is said instead of values too long to read."""
        path = layout.record(name, kind)
        other, first = seen.setdefault(of, (path, value))
        if value != first:
            found, expected = (f"other {what}", f"those of {other}") if what else (f"{value}", f"{first}, as {other} says")
            tell(Problem(path, key, found, expected, hint, (name,)))

    for name, found in runs.items():
        subset = params.runs[name].data.subset
        for kind, record in found.of_one_encoder.items():
            hint = f"runs of subset {subset!r} used different images; run the older ones again"
            same(("manifest", subset), name, kind, "manifest.sha256", record.manifest.sha256, hint)
            if not isinstance(record, PretrainRecord):
                said = record.protocol, record.asked if isinstance(record, EvaluationRecord) else record.settings
                same(("settings", kind), name, kind, "settings", said, f"run `{kind}` again for the older")
        for kind, evaluation in found.own.items():
            whose = kind if evaluations.own_queries(kind) else ""
            same(("labels", subset, whose), name, kind, "labels", evaluation.label.tolist(), AGAIN, "labels")
        for kind, of_sets in found.targets.items():
            hint = f"the images or their division changed; run `{kind}` again for the older"
            for key, one in of_sets.sets.items():
                images = (one.record.manifest, one.label.tolist())
                same(("target", kind, key), name, kind, f"{key}: manifest", images, hint, "images")
