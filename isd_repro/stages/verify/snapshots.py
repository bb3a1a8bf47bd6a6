"""Encoders kept during training: are the files the record's, and do they give its scores again?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from isd_repro.config.layout import snapshot_name
from isd_repro.data.manifests import Prepared
from isd_repro.evaluations import replay
from isd_repro.evaluations.encoders import load_encoders
from isd_repro.records import CurvePoint, CurveRecord, Score, score_groups
from isd_repro.runtime.errors import ConfigError, DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.stages.verify.again import Subject, neighbours, same_arithmetic
from isd_repro.stages.verify.walk import RESTORE, Walk, bring_back
from isd_repro.tensor_files import load_tensors


def of_run(walk: Walk, subject: Subject, opened: Prepared) -> None:
    """Hash every snapshot that is here, and evaluate it where that is asked for; the last point is the run's own encoder."""
    record = subject.found.trajectory
    if record is None:
        return
    files = {point: walk.layout.snapshots(subject.name) / snapshot_name(point.epoch) for point in record.points[:-1]}
    here = {point: path for point, path in files.items() if path.is_file()}
    missing = len(files) - len(here)
    if missing:
        walk.notes.append(f"{subject.name}: {missing} of {len(files)} snapshots are not here, so their numbers are recorded only")
    whole = {point: path for point, path in here.items() if _is_the_records(walk, subject.name, point, path)}
    if whole and not walk.asked.snapshots:
        walk.notes.append(f"{subject.name}: snapshots were not evaluated again; --snapshots does it")
        return
    for point, path in whole.items():
        _again(walk, subject, opened, record, point, path)


def _is_the_records(walk: Walk, name: str, point: CurvePoint, path: Path) -> bool:
    found = sha256_file(path)
    if found != point.encoder_sha256:
        said = f"{point.encoder_sha256}, as {name}/trajectory.json says of epoch {point.epoch}"
        file = walk.layout.record(name, "trajectory")
        walk.fault(file, f"epoch {point.epoch}: {walk.shown(path)}", found, said, bring_back("pretrain"), name)
    return found == point.encoder_sha256


def _again(walk: Walk, subject: Subject, opened: Prepared, record: CurveRecord, point: CurvePoint, path: Path) -> None:
    """Every score of one snapshot anew."""
    name, file, at = subject.name, walk.layout.record(subject.name, "trajectory"), f"epoch {point.epoch}"
    try:
        encoders, identity = load_encoders(path)
        header = load_tensors(path, "encoder")[1]
        expected = {"run": name, "epoch": point.epoch, "manifest": record.manifest.sha256}
        for key, value in expected.items():
            if header.get(key) != value:
                walk.fault(file, f"{at}: {key} of {walk.shown(path)}", header.get(key), value, bring_back("pretrain"), name)
                return
        frame = Subject(name, subject.found, encoders, identity).frame
        given = neighbours(walk, f"{name}: {at}", encoders, frame, opened, tuple(record.settings["k"]))
    except (ConfigError, DataError) as error:
        walk.fault(file, f"{at}: features", error.message, "features that can be searched", error.hint, name)
        return
    label = opened.split("query").label
    groups, now = opened.groups(label), list[Score]()
    for key, predicted in given.predictions.items():
        encoder, metric = key.split("/")
        now += score_groups(cast("Literal['student', 'teacher']", encoder), metric, predicted, label, groups)
    stated, true = ({(s.encoder, s.metric, s.group): (s.correct, s.n) for s in scores} for scores in (point.scores, now))
    other = {key for key in stated.keys() | true.keys() if stated.get(key) != true.get(key)}
    near = all(key in stated and key in true and _near(stated[key], true[key]) for key in other)
    if not other:
        walk.snapshots.add((name, point.epoch))
    elif near and not same_arithmetic(record):
        walk.notes.append(f"{name}: {at}: {len(other)} scores differ on this machine or torch, so they stay recorded only")
    else:
        for which in sorted(other):
            said = f"{_words(true.get(which))}, as the snapshot here gives"
            walk.fault(file, f"{at}: scores[{' '.join(which)}]", _words(stated.get(which)), said, RESTORE, name)


def _near(ours: tuple[int, int], theirs: tuple[int, int]) -> bool:
    return ours[1] == theirs[1] and abs(ours[0] - theirs[0]) <= replay.TOLERATED * ours[1]


def _words(score: tuple[int, int] | None) -> str:
    return "none" if score is None else f"{score[0]} of {score[1]}"
