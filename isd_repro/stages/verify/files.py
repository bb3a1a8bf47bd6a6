"""The files of one run, as far as they are here: images, encoder, features, snapshots."""

from __future__ import annotations

from typing import Any

import torch

from isd_repro.data import manifests
from isd_repro.data.manifests import Prepared
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.evaluations.extract import load_features
from isd_repro.records import EvaluationRecord
from isd_repro.report import text
from isd_repro.report.evaluation import Evaluation
from isd_repro.report.records import RunRecords
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.stages.verify import again, snapshots, targets
from isd_repro.stages.verify.again import Subject
from isd_repro.stages.verify.walk import RESTORE, Walk, bring_back
from isd_repro.tensor_files import load_tensors


def walk_files(walk: Walk, name: str, found: RunRecords) -> None:
    """Hold the records of a run against its images, encoder and features, and evaluate anew what can be."""
    parts = found.parts
    if not parts:
        return
    opened = _images(walk, name, found)
    sets = targets.of_run(walk, name, found)
    path, (first, record) = walk.layout.encoder(name), next(iter(parts.items()))
    expected = record.encoder_sha256
    if not path.is_file():
        walk.notes.append(f"{name}: no encoder here ({walk.shown(path)}), so its numbers are not re-evaluated")
        return
    sha256 = sha256_file(path)
    if sha256 != expected:
        said = f"{expected}, as {name}/{first}.json says"
        walk.fault(path, "sha256 of the file", sha256, said, bring_back("pretrain"), name)
        return
    _features_file(walk, name, found, sha256)
    try:
        encoders, identity = load_encoders(path)
        header = load_tensors(path, "encoder")[1]
    except DataError as error:
        walk.fault(path, "tensors", error.message.removeprefix(f"{path}: "), "an encoder", error.hint, name)
        return
    if not _header(walk, name, found, header):
        return
    subject = Subject(name, found, encoders, identity)
    if opened is not None:
        again.own_images(walk, subject, opened)
        snapshots.of_run(walk, subject, opened)
    targets.again(walk, subject, sets)
    trained = {"linear heads": found.linear, "few-label heads": found.few_label, "classifiers of transfer": found.transfer}
    left = [words for words, part in trained.items() if part]
    if left and not walk.asked.linear:
        walk.notes.append(f"{name}: {text.listing(left)} were not trained again; --linear does it")


def _images(walk: Walk, name: str, found: RunRecords) -> Prepared | None:
    """The prepared subset of a run where it is here and is what the records say."""
    subset = walk.params.runs[name].data.subset
    folder = walk.layout.prepared(subset)
    if subset not in walk.subsets:
        walk.subsets[subset] = None
        if not (folder / "manifest.json").is_file():
            walk.notes.append(f"subset {subset}: no prepared images here ({walk.shown(folder)}), so its manifest is not read")
            return None
        try:
            walk.subsets[subset] = manifests.open_prepared(folder)
        except DataError as error:
            said = error.message.removeprefix(f"{folder / 'manifest.json'}: ")
            runs = [run for run, config in walk.params.runs.items() if config.data.subset == subset]
            walk.fault(folder, "prepared images", said, "those that `prepare` wrote", error.hint, *runs)
    here = walk.subsets[subset]
    if here is None or found.manifest is None:
        return None
    if here.identity != found.manifest:
        ours, theirs = here.identity.model_dump(mode="json"), found.manifest.model_dump(mode="json")
        key = next(key for key in ("sha256", *ours) if ours[key] != theirs[key])
        said = f"{theirs[key]}, as the records of {name} say"
        hint = "these are other images than the run saw: run `prepare` again with the run's parameters, or `dvc checkout`"
        walk.fault(folder / "manifest.json", f"identity.{key}", ours[key], said, hint, name)
        return None
    wrong = [part for part in found.own if not _labels(walk, name, part, here.split("query").label)]
    return None if wrong else here


def _labels(walk: Walk, name: str, evaluation: Evaluation, label: torch.Tensor) -> bool:
    """Whether a record's labels are those of the images."""
    if evaluation.label.equal(label):
        return True
    at, classes = int((evaluation.label != label).nonzero()[0]), evaluation.record.manifest.classes
    said, truth = classes[int(evaluation.label[at])], f"{classes[int(label[at])]}, as the manifest's images say"
    walk.fault(walk.layout.record(name, evaluation.record.kind), f"labels[{at}]", said, truth, RESTORE, name)
    return False


def _features_file(walk: Walk, name: str, found: RunRecords, sha256: str) -> None:
    """The stored features, where they are here: of this encoder, and those that the evaluations used."""
    path = walk.layout.features(name)
    if not path.is_file():
        return
    hint = bring_back("extract")
    try:
        load_features(path, sha256)
    except DataError as error:
        said = error.message.removeprefix(f"{path}: ")
        walk.fault(path, "encoder_sha256", said, f"features of encoder {sha256[:12]}", hint, name)
        return
    evaluations = [part for part in found.parts.values() if isinstance(part, EvaluationRecord) and part.features_sha256]
    here = sha256_file(path) if evaluations else ""
    for record in evaluations:
        if record.features_sha256 != here:
            said = f"{record.features_sha256}, as {name}/{record.kind}.json says"
            walk.fault(path, "sha256 of the file", here, said, hint, name)
            return


def _header(walk: Walk, name: str, found: RunRecords, header: dict[str, Any]) -> bool:
    """What the encoder file says of itself against its run's records."""
    manifest = found.manifest.sha256 if found.manifest else ""
    expected: dict[str, Any] = {"run": name, "profile": walk.params.profile, "manifest": manifest}
    if found.pretrain is not None:
        expected |= {"fingerprint": found.pretrain.fingerprint, "encoders": list(found.pretrain.encoders)}
    wrong = [key for key, value in expected.items() if header.get(key) != value]
    for key in wrong:
        said = f"{expected[key]}, as the records of {name} say"
        walk.fault(walk.layout.encoder(name), key, header.get(key), said, bring_back("pretrain"), name)
    return not wrong
