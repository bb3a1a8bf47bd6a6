"""Stage `trajectory`: each snapshot scores as the stages `extract` and `knn` score it, and an interrupted stage goes on."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from isd_repro.config.layout import snapshot_name
from isd_repro.evaluations.stage import extract, run_evaluation
from isd_repro.records import CurveRecord, EvaluationRecord, read_record
from isd_repro.runtime.errors import DataError
from tests.evaluations.test_stages import NARROW, World, world, write_encoder  # noqa: F401 - a fixture

knn = partial(run_evaluation, "knn")
trajectory = partial(run_evaluation, "trajectory")

EPOCHS = {1: 11, 10: 12}  # epoch -> seed of its encoders; the run's own are another


@pytest.fixture
def snapshots(world: World, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Two snapshots of a run of twelve epochs."""
    monkeypatch.setenv("ISD_STATE_ROOT", str(world.layout.root))
    run = world.params.runs["isd"]
    longer = run.model_copy(update={"optim": run.optim.model_copy(update={"epochs": 12})})
    world.params = world.params.model_copy(update={"runs": {**world.params.runs, "isd": longer}})
    folder = world.layout.snapshots("isd")
    for epoch, seed in EPOCHS.items():
        write_encoder(folder / snapshot_name(epoch), NARROW, ("student", "teacher"), world.manifest.sha256, seed, "isd")
    return folder


def test_each_point_is_what_extract_and_knn_give(world: World, snapshots: Path) -> None:  # noqa: F811
    printed = world.run(trajectory, "isd").splitlines()
    record = read_record(world.layout.record("isd", "trajectory"), CurveRecord)
    assert [point.epoch for point in record.points] == [1, 10, 12]
    files = [snapshots / snapshot_name(1), snapshots / snapshot_name(10), world.layout.encoder("isd")]
    final = files[2].read_bytes()
    seen = set()
    for point, path in zip(record.points, files, strict=True):
        content = final if path == files[2] else path.read_bytes()
        world.layout.encoder("isd").write_bytes(content)
        world.run(extract, "isd")
        world.run(knn, "isd")
        direct = read_record(world.layout.record("isd", "knn"), EvaluationRecord)
        assert point.scores == direct.scores
        assert point.encoder_sha256 == direct.encoder_sha256
        seen.add(tuple(score.correct for score in point.scores))
    assert len(seen) == 3  # the three encoders differ in what they answer
    assert len(printed) == sum(len(point.scores) for point in record.points)
    assert printed[0].startswith("isd epoch 1 student 1-NN all ")
    assert [path.name for path in (world.layout.root / ".state").glob("*")] in ([], ["verified"])


def test_snapshots_of_another_run_or_other_images_and_none_at_all_are_refused(world: World, snapshots: Path) -> None:  # noqa: F811
    (snapshots / "epoch-00010 (copy).safetensors").write_bytes(b"of somebody who looked at it")  # left alone
    second = snapshots / snapshot_name(10)
    write_encoder(second, NARROW, ("student", "teacher"), world.manifest.sha256, run="byol")
    with pytest.raises(DataError, match=r"epoch-00010\.safetensors: belongs to run 'byol', not 'isd'"):
        world.run(trajectory, "isd")
    write_encoder(second, NARROW, ("student", "teacher"), "of other images", run="isd")
    with pytest.raises(DataError, match=r"epoch-00010\.safetensors: manifest changed since"):
        world.run(trajectory, "isd")
    shutil.rmtree(snapshots)
    with pytest.raises(DataError, match="no snapshot in it"):
        world.run(trajectory, "isd")
