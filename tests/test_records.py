"""Every committed record is read, and its scores are those of its stored predictions."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from isd_repro.records import (
    CurveRecord,
    EvaluationRecord,
    PretrainRecord,
    TargetsRecord,
    balancedness,
    mean_per_class,
    pack_labels,
    read_evaluation,
    read_record,
    unpack_labels,
    write_record,
)
from isd_repro.runtime.errors import DataError

FILES = sorted(Path(__file__).parents[1].glob("reports/*/records/*/*.json"))
PROFILES = sorted({path.parents[2].name for path in FILES})


def assert_scores(record: EvaluationRecord) -> None:
    label, manifest = unpack_labels(record.labels), record.manifest
    names: dict[str, Collection[str]] = {
        "all": manifest.classes,
        "large": manifest.large,
        "rare": set(manifest.classes) - set(manifest.large),
        **{str(group): classes for group, classes in manifest.shots.items()},
    }
    for score in record.scores:
        predicted = unpack_labels(record.predictions[f"{score.encoder}/{score.metric}"])
        pairs = [
            (int(a), int(b)) for a, b in zip(predicted, label, strict=True) if manifest.classes[int(b)] in names[score.group]
        ]
        assert (score.correct, score.n) == (sum(a == b for a, b in pairs), len(pairs))


def test_balancedness_by_hand() -> None:
    """Classes 0, 1 and 3 have 1 of 2, 2 of 2 and 0 of 1 right: the deviation of 50, 100 and 0 from their mean of 50."""
    predicted, label = np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 3])
    assert balancedness(predicted, label) == pytest.approx((5000 / 3) ** 0.5)
    assert mean_per_class(predicted, label) == pytest.approx(50)


@pytest.mark.parametrize("wrong", [70_000, 65_536, -1])
def test_a_class_that_no_record_holds_is_refused(wrong: int) -> None:
    assert unpack_labels(pack_labels(np.array([0, 65_535]))).tolist() == [0, 65_535]
    with pytest.raises(DataError, match=f"class indices from .*{wrong}"):
        pack_labels(np.array([0, wrong]))


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_records_give_their_scores(profile: str, tmp_path: Path) -> None:
    """Read, rescored from the predictions, and written again as they stand."""
    seen = set()
    for path in (one for one in FILES if one.parents[2].name == profile):
        record = read_record(path, PretrainRecord) if path.stem == "pretrain" else read_evaluation(path)
        assert (record.kind, record.profile, record.run) == (path.stem, profile, path.parent.name)
        if isinstance(record, EvaluationRecord):
            assert_scores(record)
        if isinstance(record, TargetsRecord):
            for one in record.evaluations:
                assert_scores(one)
                label = unpack_labels(one.labels)
                given = {key: mean_per_class(unpack_labels(text), label) for key, text in one.predictions.items()}
                assert given == pytest.approx(one.mean_per_class, abs=1e-9)
        if isinstance(record, CurveRecord):
            last = json.loads((path.parent / "knn.json").read_text("utf-8"))
            assert record.points[-1].encoder_sha256 == last["encoder_sha256"]
        write_record(tmp_path / "again.json", record)
        assert json.loads((tmp_path / "again.json").read_bytes()) == json.loads(path.read_bytes())
        seen.add(type(record))
    assert {PretrainRecord, EvaluationRecord} <= seen
