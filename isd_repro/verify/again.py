"""The files of a run: its encoder, images and features, and every evaluation once more by the function that made its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from isd_repro import evaluations
from isd_repro.config.layout import snapshot_name
from isd_repro.data import manifests
from isd_repro.evaluations.subject import Outcome, Subject, open_run
from isd_repro.provenance import Provenance, describe
from isd_repro.records import (
    CurvePoint,
    CurveRecord,
    EvaluationRecord,
    Labels,
    ManifestIdentity,
    Mask,
    unpack_labels,
)
from isd_repro.report import intervals, text
from isd_repro.report.run_records import RunRecords
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
    if found.manifest is None:
        return
    layout, folder = state.layout, state.layout.prepared(state.params.runs[name].data.subset)
    encoder, images = ("encoder", layout.encoder(name), _encoder), ("prepared images", folder / manifests.HEADER, _images)
    for what, file, check in (encoder, images):
        if not file.is_file():
            are = "is" if check is _encoder else "are"
            state.notes.append(
                f"{name}: the {what} {are} not available ({state.shown(file)}), so its numbers are not re-evaluated"
            )
            return
        try:
            if not state.note(what, name, check(state, name, found), name):
                return
        except DataError as error:
            state.problem(file, "form", error.message.removeprefix(f"{file}: "), "a whole file", error.hint, name)
            return
    try:
        subject = open_run(name, state.params, layout, state.progress, anew=True)
        run, label = _Again(state, found, subject), subject.split("query").label.numpy()
    except DataError as error:
        said = error.message.removeprefix(f"{folder / manifests.HEADER}: ")
        state.problem(folder, "prepared images", said, "those that `prepare` wrote", error.hint, name)
        return
    same = [run.same_labels(kind, label) for kind in found.own if not evaluations.own_queries(kind)]
    if all(same):
        run.evaluate()


def _encoder(state: Verification, name: str, found: RunRecords) -> Iterator[Answer]:
    """The files of encoder, snapshots and features are those of the records, and so is what the encoder says of itself."""
    layout, (first, record) = state.layout, next(iter(found.of_one_encoder.items()))
    path, stated = layout.encoder(name), {kind: one.record.features_sha256 for kind, one in found.own.items()}
    files = {layout.features(name): (sha256, kind, "extract") for kind, sha256 in stated.items() if sha256}
    for file, (expected, kind, stage) in {**files, path: (record.encoder_sha256, first, "pretrain")}.items():
        if file.is_file() and (sha256 := sha256_file(file)) != expected:
            yield Wrong(file, "sha256 of the file", sha256, f"{expected}, as {name}/{kind}.json says", _BRING_BACK.format(stage))
    for kind, curve in found.curves.items():
        kept = {point: layout.snapshots(name) / snapshot_name(point.epoch) for point in curve.points[:-1]}  # the last is `path`
        if absent := sum(not file.is_file() for file in kept.values()):
            what = f"{absent} of {len(kept)} snapshots are not available"
            state.notes.append(f"{name}: {what}, so their numbers are recorded only")
        for point, file in kept.items():
            if file.is_file() and (sha256 := sha256_file(file)) != point.encoder_sha256:
                where, said = f"epoch {point.epoch}: {state.shown(file)}", f"{point.encoder_sha256}, as {name}/{kind}.json says"
                yield Wrong(kind, where, sha256, said, _BRING_BACK.format("pretrain"))
    header = load_tensors(path, "encoder")[1]
    facts: dict[str, Any] = {"run": name, "profile": state.params.profile, "manifest": record.manifest.sha256}
    if found.pretrain is not None:
        facts |= {"fingerprint": found.pretrain.fingerprint, "encoders": list(found.pretrain.encoders)}
    for key, value in facts.items():
        if header.get(key) != value:
            said = f"{value}, as the records of {name} say"
            yield Wrong(path, key, header.get(key), said, _BRING_BACK.format("pretrain"))


def _images(state: Verification, name: str, found: RunRecords) -> Iterator[Answer]:
    """The prepared images are what every record of the run says of them."""
    folder = state.layout.prepared(state.params.runs[name].data.subset)
    here = manifests.read_header(folder).identity
    for kind, record in found.records.items():
        if differing := _difference(here, record.manifest):
            hint = "these are not the run's images: run `prepare` again with the run's parameters, or `dvc checkout`"
            key, ours, theirs = differing
            file, said = folder / manifests.HEADER, f"{theirs}, as {name}/{kind}.json says"
            yield Wrong(file, f"identity.{key}", ours, said, hint)
            return


def _difference(one: ManifestIdentity, other: ManifestIdentity) -> tuple[str, Any, Any] | None:
    """The key in which two descriptions of images differ, and both values."""
    ours, theirs = one.model_dump(mode="json"), other.model_dump(mode="json")
    keys = [key for key in ("sha256", *ours, *theirs) if ours.get(key) != theirs.get(key)]
    return (keys[0], ours.get(keys[0]), theirs.get(keys[0])) if one != other else None


# --- evaluating again -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Again:
    """The evaluations of a run whose files are here and its own."""

    state: Verification
    found: RunRecords
    subject: Subject

    def wrong(self, kind: str, key: str, found: object, expected: object) -> None:
        """A problem of a record."""
        name = self.subject.name
        self.state.problem(self.state.layout.record(name, kind), key, found, expected, RESTORE, name)

    def same_labels(self, kind: str, label: Labels) -> bool:
        """The labels of a record are those of its queries."""
        stated, classes = self.found.own[kind].label, self.subject.manifest.classes
        if np.array_equal(stated, label):
            return True
        if len(stated) != len(label):
            self.wrong(kind, "labels", f"{len(stated)} entries", f"{len(label)}, the queries of the images")
            return False
        at = int(np.flatnonzero(stated != label)[0])
        self.wrong(kind, f"labels[{at}]", classes[int(stated[at])], f"{classes[int(label[at])]}, as the manifest's images say")
        return False

    def evaluate(self) -> None:
        """Repeat every evaluation that the options ask for; features are computed once for all."""
        left, settings = list[str](), self.subject.settings
        for kind, one in self.found.evaluations.items():
            module, config = evaluations.load(kind), getattr(settings, kind)
            record = one if isinstance(one, CurveRecord) else one.record
            if isinstance(record, EvaluationRecord) and not self._inputs(kind, record, module):
                continue
            option = "snapshots" if isinstance(one, CurveRecord) else "linear" if evaluations.trains(kind) else ""
            if option and not getattr(self.state.options, option):
                left.append(f"{evaluations.title(kind)} (--{option})")
                continue
            if evaluations.changes(kind, settings, record.settings):
                continue  # which is a problem of the parameters
            try:
                if isinstance(record, EvaluationRecord):
                    outcome: Outcome = module.evaluate(self.subject, config)
                    if outcome.label is None or self.same_labels(kind, outcome.label.cpu().numpy()):
                        self._compare(kind, record, outcome.arrays, outcome.chosen)
                elif isinstance(record, CurveRecord):
                    points = module.evaluate(self.subject, config).points
                    self._compare_points(kind, record, {point.epoch: point for point in points})
                else:
                    for stated in record.evaluations:
                        self._on_target(kind, stated, module, config)
            except (ConfigError, DataError) as error:
                name, expected = self.subject.name, f"an evaluation as in {self.subject.name}/{kind}.json"
                self.state.problem(self.state.layout.encoder(name), f"{kind} again", error.message, expected, error.hint, name)
        if left:
            self.state.notes.append(f"{self.subject.name}: not re-evaluated unless the option is given: {', '.join(left)}")

    def _inputs(self, kind: str, record: EvaluationRecord, module: ModuleType) -> bool:
        """What a record says of the images from which its evaluation learnt, for evaluations that have `inputs`."""
        config = getattr(self.subject.settings, kind)
        if not hasattr(module, "inputs"):
            return True
        if missing := module.missing(config, record.settings):
            self.state.notes.append(f"{self.subject.name}: {kind} is not evaluated again: {missing}")
            return False
        return self._same_settings(kind, record, module.inputs(self.subject, config), "", "as the images and the draw say")

    def _same_settings(self, kind: str, record: EvaluationRecord, now: Mapping[str, Any], prefix: str, source: str) -> bool:
        """Settings of a record that come out of the evaluation itself."""
        stated, here = dict(text.flatten(record.settings)), dict(text.flatten(dict(now))) if now else {}
        wrong = [key for key, value in here.items() if stated.get(key) != value]
        for key in wrong:
            self.wrong(kind, f"{prefix}settings.{key}", stated.get(key), f"{here[key]}, {source}")
        return not wrong

    def _on_target(self, kind: str, stated: EvaluationRecord, module: ModuleType, config: Any) -> None:
        """Repeat an evaluation on one other data set, if it is available."""
        key = stated.manifest.subset
        if missing := module.absent(key):
            self.state.notes.append(f"{key} is not here, so the numbers on it are not re-evaluated: {missing}")
            return
        (now,) = module.evaluate(self.subject, config.model_copy(update={"sets": (key,)})).evaluations
        differing = _difference(stated.manifest, now.manifest)
        if differing or now.labels != stated.labels:
            where, said, truth = differing or ("", "other labels", "those of its images")
            where, file = f"manifest.{where}" if where else "labels", self.state.layout.record(self.subject.name, kind)
            hint = "these are other images or classes than the run saw: name the folder that it saw, or restore the record"
            truth = f"{truth}, as the data set's images here say"
            self.state.problem(file, f"{key}: {where}", said, truth, hint, self.subject.name)
            return
        predictions = {which: unpack_labels(packed) for which, packed in now.predictions.items()}
        self._compare(kind, stated, predictions, now.settings, key)

    def _compare(
        self, kind: str, record: EvaluationRecord, now: Mapping[str, Labels], chosen: Mapping[str, Any], target: str = ""
    ) -> None:
        """Compare every stored prediction and choice with those of now; a difference that rounding explains is only a note.

        An evaluation on another data set, the `target`, is not repeated with changed features.
        """
        name, label = self.subject.name, unpack_labels(record.labels)
        prefix, suffix = (f"{target}: ", f"-{target}") if target else ("", "")
        classes, alike = record.manifest.classes, True
        for key, packed in sorted(record.predictions.items()):
            stored, (encoder, metric) = unpack_labels(packed), key.split("/")
            where = f"{prefix}predictions[{key!r}]"
            if key not in now or len(now[key]) != len(stored):
                self.wrong(kind, where, "predictions", "none: the evaluation does not give them")
                alike = False
                continue
            other = np.flatnonzero(stored != now[key])
            if not len(other):
                self.state.repeated.add((name, encoder, metric + suffix))
                continue
            alike, said = False, f"{len(other)} of {len(stored)} predictions differ"
            if not same_arithmetic(record.provenance) and len(other) <= TOLERATED * len(stored):
                unclear = None if target else self._unclear(kind, key, now[key])
                clear = other[~unclear[other]] if unclear is not None else other[:0]
                if not len(clear):
                    better, worse = (int((one[other] == label[other]).sum()) for one in (stored, now[key]))
                    self.state.flips.append((len(other), better, worse))
                    ties = "all near ties" if unclear is not None else "their margins were not checked"
                    stays = "this machine or torch is not the record's, so it stays recomputed"
                    self.state.notes.append(f"{name}: {prefix}{said} in {key} ({ties}; {better} better, {worse} worse); {stays}")
                    continue
                other = clear
                said = f"{said}, of which {len(clear)} are no near ties, so that another machine does not explain them"
            at = int(other[0])
            truth = f"{classes[int(now[key][at])]}, as the encoder here gives ({said})"
            self.wrong(kind, f"{where}[{at}]", classes[int(stored[at])], truth)
        if alike:
            self._same_settings(kind, record, chosen, prefix, "as the encoder here gives")

    def _unclear(self, kind: str, key: str, now: Labels) -> Mask | None:
        """Which queries are near ties: their class changes in one of TRIALS when every feature is changed a little, bool, Q.

        None for an evaluation that trains, where the same change would be another training.
        """
        module, config = evaluations.load(kind), getattr(self.subject.settings, kind)
        if evaluations.trains(kind):
            return None
        found = np.zeros(len(now), dtype=np.bool_)
        for trial in range(TRIALS):
            generator = torch.Generator().manual_seed(trial)
            changed = {
                split: {name: rows * (1 + NOISE * torch.randn(rows.shape, generator=generator)) for name, rows in of.items()}
                for split, of in self.subject.features.items()
            }
            other = replace(self.subject, read_features=lambda _, changed=changed: changed)  # type: ignore[misc]
            found |= module.evaluate(other, config).arrays[key] != now
        return found

    def _compare_points(self, kind: str, record: CurveRecord, now: Mapping[int, CurvePoint]) -> None:
        """Every score of every available snapshot."""
        name = self.subject.name
        for point in (point for point in record.points if point.epoch in now):
            stated, given = (
                {(score.encoder, score.metric, score.group): (score.correct, score.n) for score in one.scores}
                for one in (point, now[point.epoch])
            )
            other = sorted(key for key in stated.keys() | given.keys() if stated.get(key) != given.get(key))
            near = all(key in stated and key in given and _near(stated[key], given[key]) for key in other)
            if not other:
                self.state.snapshots.add((name, point.epoch))
            elif near and not same_arithmetic(record.provenance):
                stays = "on this machine or torch, so they stay recorded only"
                self.state.notes.append(f"{name}: epoch {point.epoch}: {len(other)} scores differ {stays}")
            else:
                for key in other:
                    found, truth = (f"{one[key][0]} of {one[key][1]}" if key in one else "none" for one in (stated, given))
                    where = f"epoch {point.epoch}: scores[{' '.join(key)}]"
                    self.wrong(kind, where, found, f"{truth}, as the snapshot here gives")


def _near(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    return ours[1] == theirs[1] and abs(ours[0] - theirs[0]) <= TOLERATED * ours[1]


def same_arithmetic(recorded: Provenance) -> bool:
    """Whether bits can be expected to be equal: the same processor, device and torch."""
    here = describe(0.0)
    ours, theirs = here.machine, recorded.machine
    return (ours.cpu, ours.gpu, ours.system) == (theirs.cpu, theirs.gpu, theirs.system) and (
        here.versions["torch"] == recorded.versions.get("torch")
    )


def check_flips(state: Verification) -> None:
    """Rounding favours neither side: of the predictions that differ on another machine, as many must be better as worse."""
    if not state.flips:
        return
    every, better, worse = (sum(one[at] for one in state.flips) for at in range(3))
    said = f"{every} predictions differ here: {better} stored ones are better, {worse} worse"
    answer: Answer = Unproved(said, State.RECORDED)
    if better > worse and intervals.sign_test(better, worse) < ONE_SIDED:
        expected = f"as many better as worse (sign test below {ONE_SIDED})"
        answer = Wrong(state.layout.records, "predictions of another machine", said, expected)
    state.note("predictions of another machine", "profile", [answer])
