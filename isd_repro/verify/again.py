"""The files of a run: its encoder, images and features, and every evaluation once more by the function that made its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isd_repro import evaluations
from isd_repro.config.layout import snapshot_name
from isd_repro.data import manifests
from isd_repro.evaluations.features import load_features
from isd_repro.evaluations.subject import Curve, Outcome, SplitFeatures, Subject, Targets, open_run
from isd_repro.provenance import Provenance, describe
from isd_repro.records import (
    CurvePoint,
    CurveRecord,
    EvaluationRecord,
    ManifestIdentity,
    PretrainRecord,
    Score,
    unpack_labels,
)
from isd_repro.report import intervals, text
from isd_repro.report.run_records import Evaluation, RunRecords
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.tensor_files import load_tensors
from isd_repro.verify.findings import RESTORE, Answer, State, Unproved, Verification, Wrong

TOLERATED = 0.005  # share of queries that may be classified otherwise under another arithmetic; docs/verify.md says why
NOISE, TRIALS = 1e-4, 8  # relative change of a feature, ten times what float32 rounding leaves, and how often it is drawn
ONE_SIDED = 0.001  # of a sign test, below which differences that all help are no rounding
_BRING_BACK = "restore the run's own file with `dvc checkout`; or run `{}` and all later stages again"


def check_files(state: Verification, name: str, found: RunRecords) -> None:
    """Compare the records of a run with its images, encoder and features, and repeat the evaluations that can be repeated."""
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
    """The available snapshots are those of the records; the last point is the run's own encoder."""
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
        state.problem(file, "labels", f"{len(stated)} entries", f"{len(label)}, the queries of the images", RESTORE, name)
        return False
    at = int((stated != label).nonzero()[0])
    truth = f"{classes[int(label[at])]}, as the manifest's images say"
    state.problem(file, f"labels[{at}]", classes[int(stated[at])], truth, RESTORE, name)
    return False


def _inputs(state: Verification, kind: str, record: EvaluationRecord, subject: Subject) -> bool:
    """What a record says of the images from which its evaluation learnt, for evaluations that have `inputs`."""
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
        state.problem(file, f"settings.{key}", stated.get(key), truth, RESTORE, subject.name)
    return not wrong


def _stored_features(state: Verification, name: str, found: RunRecords, now: SplitFeatures) -> None:
    """The features file, if available: that of the encoder and of the evaluations, and how far it is from the features of now."""
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
            _compare(state, subject, kind, file, record, outcome.predictions, outcome.chosen)
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
    """Repeat an evaluation on one other data set, if it is available."""
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
    _compare(state, subject, "", file, stated, predictions, now.settings, key)


def _compare(
    state: Verification,
    subject: Subject,
    kind: str,
    file: Path,
    record: EvaluationRecord,
    now: Mapping[str, Tensor],
    chosen: Mapping[str, Any],
    target: str = "",
) -> None:
    """Compare every stored prediction and choice with those of now; a difference that rounding explains is only a note.

    `kind` is empty for an evaluation on another data set, which is not repeated with changed features.
    """
    name, label = subject.name, unpack_labels(record.labels)
    prefix, suffix = (f"{target}: ", f"-{target}") if target else ("", "")
    classes, alike = record.manifest.classes, True
    for key, packed in sorted(record.predictions.items()):
        stored, (encoder, metric) = unpack_labels(packed), key.split("/")
        where = f"{prefix}predictions[{key!r}]"
        if key not in now or len(now[key]) != len(stored):
            state.problem(file, where, "predictions", "none: the evaluation does not give them", RESTORE, name)
            alike = False
            continue
        other = (stored != now[key]).nonzero()[:, 0]
        if not len(other):
            state.repeated.add((name, encoder, metric + suffix))
            continue
        alike, said = False, f"{len(other)} of {len(stored)} predictions differ"
        if not same_arithmetic(record.provenance) and len(other) <= TOLERATED * len(stored):
            unclear = _unclear(subject, kind, key, now[key]) if kind else None
            clear = other[~unclear[other]] if unclear is not None else other[:0]
            if not len(clear):
                better, worse = (int((one[other] == label[other]).sum()) for one in (stored, now[key]))
                state.flips.append((len(other), better, worse))
                ties = "all near ties" if unclear is not None else "their margins were not checked"
                stays = "this machine or torch is not the record's, so it stays recomputed"
                state.notes.append(f"{name}: {prefix}{said} in {key} ({ties}; {better} better, {worse} worse); {stays}")
                continue
            other, said = clear, f"{said}, of which {len(clear)} are no near ties, so that another machine does not explain them"
        at = int(other[0])
        truth = f"{classes[int(now[key][at])]}, as the encoder here gives ({said})"
        state.problem(file, f"{where}[{at}]", classes[int(stored[at])], truth, RESTORE, name)
    ours, theirs = dict(text.flatten(dict(chosen))) if chosen else {}, dict(text.flatten(record.settings))
    for key in (key for key in ours if alike and ours[key] != theirs.get(key)):
        state.problem(file, f"{prefix}settings.{key}", theirs.get(key), f"{ours[key]}, as the encoder here gives", RESTORE, name)


def _unclear(subject: Subject, kind: str, key: str, now: Tensor) -> Tensor | None:
    """Which queries are near ties: their class changes in one of TRIALS when every feature is changed a little, bool, Q.

    None for an evaluation that trains, where the same change would be another training.
    """
    module, config = evaluations.load(kind), getattr(subject.settings, kind)
    if getattr(module, "TRAINS", False):
        return None
    found = torch.zeros(len(now), dtype=torch.bool)
    for trial in range(TRIALS):
        generator = torch.Generator().manual_seed(trial)
        changed = {
            split: {name: rows * (1 + NOISE * torch.randn(rows.shape, generator=generator)) for name, rows in of.items()}
            for split, of in subject.features.items()
        }
        other = replace(subject, read_features=lambda _, changed=changed: changed)  # type: ignore[misc]
        found |= module.evaluate(other, config).predictions[key] != now
    return found


def check_flips(state: Verification) -> None:
    """Rounding favours neither side: of the predictions that differ on another machine, as many must be better as worse."""
    better, worse = (sum(one[at] for one in state.flips) for at in (1, 2))
    if not state.flips:
        return
    said = f"{sum(one[0] for one in state.flips)} predictions differ here: {better} stored ones are better, {worse} worse"
    answers: list[Answer] = [Unproved(said, State.RECORDED)]
    if better > worse and intervals.sign_test(better, worse) < ONE_SIDED:
        expected = f"as many better as worse (sign test below {ONE_SIDED})"
        answers = [Wrong(state.layout.records, "predictions of another machine", said, expected)]
    state.note("predictions of another machine", "profile", answers)


def _compare_points(state: Verification, name: str, file: Path, record: CurveRecord, now: Mapping[int, CurvePoint]) -> None:
    """Every score of every available snapshot."""
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
                state.problem(file, where, found, f"{truth}, as the snapshot here gives", RESTORE, name)


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
