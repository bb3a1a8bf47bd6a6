"""The contrast within classes: by hand, blind to which classes are large, and that of the committed records."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest

from isd_repro.records import EvaluationRecord, read_record, unpack_labels
from isd_repro.report.within_class import Contrast, within_class

ROOT = Path(__file__).parents[2]
Values = dict[str, list[float]]


def test_each_class_counts_once_and_is_compared_with_itself() -> None:
    rare, large = {"a": [1.0, 3.0], "b": [0.0], "only rare": [99.0]}, {"a": [1.0], "b": [4.0, 6.0], "only large": [-99.0]}
    found = within_class(rare, large)  # a: 2 - 1, b: 0 - 5
    assert found is not None
    assert (found.mean, found.classes) == (-2.0, 2)
    half = 12.706204736432095 * 3.0  # t of one degree of freedom; the standard error of 1 and -5 is 3
    assert (found.low, found.high) == pytest.approx((-2.0 - half, -2.0 + half))


def test_one_class_has_no_interval_and_none_has_no_contrast() -> None:
    single = within_class({"a": [1.0]}, {"a": [2.0]})
    assert single is not None
    assert single.mean == -1.0
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert within_class({"a": [1.0]}, {"b": [2.0], "a": []}) is None


def test_classes_that_are_good_in_both_groups_do_not_count_as_an_effect() -> None:
    """Large classes that are easier by 30 points move the plain contrast of the groups, and not this one."""
    rare, large = {"hard": [10.0, 10.0, 10.0], "easy": [40.0]}, {"hard": [10.0], "easy": [40.0, 40.0, 40.0]}
    assert within_class(rare, large) == Contrast(0.0, 0.0, 0.0, 2)


def accuracy(record: EvaluationRecord, metric: str) -> dict[str, float]:
    """Top-1 of the student in percent, by class."""
    label = unpack_labels(record.labels)
    hit = unpack_labels(record.predictions[f"student/{metric}"]) == label
    return {cls: 100 * float(hit[label == at].double().mean()) for at, cls in enumerate(record.manifest.classes)}


def of_records(metric: str) -> tuple[dict[str, Values], dict[str, Values]]:
    """ISD less MoCo v2 (`difference`) and both methods' scores in points, by class: where it is rare, and where it is large."""
    rare: dict[str, Values] = {which: defaultdict(list) for which in ("isd", "moco", "difference")}
    large: dict[str, Values] = {which: defaultdict(list) for which in rare}
    for number in range(1, 9):
        isd, moco = (
            read_record(ROOT / "reports" / "claim-r" / "records" / f"{method}-r{number}" / "knn.json", EvaluationRecord)
            for method in ("isd", "moco")
        )
        ours, theirs = accuracy(isd, metric), accuracy(moco, metric)
        for cls in isd.manifest.classes:
            group = large if cls in isd.manifest.large else rare
            group["isd"][cls].append(ours[cls])
            group["moco"][cls].append(theirs[cls])
            group["difference"][cls].append(ours[cls] - theirs[cls])
    return rare, large


def test_the_contrasts_of_the_findings_are_those_of_the_records() -> None:
    text = (ROOT / "reports" / "claim" / "FINDINGS.md").read_text("utf-8").replace("\n", " ").replace("\N{MINUS SIGN}", "-")
    for metric in ("1-NN", "20-NN"):
        rare, large = of_records(metric)
        found = within_class(rare["difference"], large["difference"])
        assert found is not None
        assert found.classes == 47
        assert f"{found.mean:+.2f} points, 95 % interval {found.low:+.2f} to {found.high:+.2f}" in " ".join(text.split())
    rare, large = of_records("1-NN")
    for method in ("isd", "moco"):
        found = within_class(large[method], rare[method])  # what being large is worth
        assert found is not None
        assert f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})" in " ".join(text.split())
