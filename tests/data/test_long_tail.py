"""Long-tailed rules: class sizes against the numbers that the papers print, lists of images and of classes, groups by size."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from isd_repro.config import params
from isd_repro.data.lists import parse_labelled, read_classes
from isd_repro.data.subsets import Selection, exponential_sizes, pareto_sizes, select
from isd_repro.runtime.errors import DataError
from tests.data import trees

NAMES = [f"n{number:02d}" for number in range(10)]
IMAGES = trees.located(dict.fromkeys(NAMES, 50))


def rule(**values: Any) -> Any:
    return TypeAdapter(params.Rule).validate_python(values)


def drawn(shots: params.Shots | None = None, images: Any = IMAGES, **values: Any) -> Selection:
    return select(images, trees.subset(rule(**values), search=4, query=6, shots=shots), "x")


def sizes(selection: Selection, images: Any = IMAGES) -> dict[str, int]:
    return dict(Counter(images[at].cls for at in selection.train.tolist()))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_cifar_lt_has_the_sizes_of_its_authors() -> None:
    """Cao et al. 2019, repository kaidic/LDAM-DRW: 5,000 images of the first class, 5,000 / imbalance of the last."""
    assert exponential_sizes(10, 5000, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    totals = {imbalance: sum(exponential_sizes(10, 5000, imbalance)) for imbalance in (10, 50, 100)}
    assert totals == {10: 20431, 50: 13996, 100: 12406}
    found = exponential_sizes(100, 500, 100)
    assert (found[0], found[-1], sum(found)) == (500, 5, 10847)
    assert (exponential_sizes(7, 123, 1), exponential_sizes(1, 123, 3.5)) == ([123] * 7, [123])


def test_imagenet_lt_exp_has_about_the_images_that_its_paper_prints() -> None:
    """Jiang et al. 2021 (SDCLR): an exponential function, imbalance 256, the smallest class as in ImageNet-LT, 229.7K images."""
    found = exponential_sizes(1000, 1280, 256)
    assert (found[0], found[-1]) == (1280, 5)
    assert sum(found) == pytest.approx(229_700, rel=0.002)


def test_pareto_has_the_range_of_imagenet_lt_and_about_its_images() -> None:
    """Liu et al. 2019: power 6, 1,280 to 5 images a class, 115,846 images; theirs is one random sample of such sizes."""
    found = pareto_sizes(1000, 1280, 5, 6.0)
    assert (found[0], found[-1], len(found)) == (1280, 5, 1000)
    assert found == sorted(found, reverse=True)
    assert sum(found) == pytest.approx(115_846, rel=0.05)
    groups = [sum(size > 100 for size in found), sum(20 <= size <= 100 for size in found), sum(size < 20 for size in found)]
    assert groups == [404, 456, 140]


def test_pareto_sizes_follow_the_distribution() -> None:
    """A share q of the classes has more than the distribution's quantile 1 - q, scaled to the range."""
    found = pareto_sizes(500, 10_000, 0, 3.0)
    top = 500 ** (1 / 3) - 1
    for share in (0.02, 0.1, 0.5):
        assert found[int(share * 500) - 1] == pytest.approx(10_000 * (share ** (-1 / 3) - 1) / top, abs=1)


# --- which class, which images ----------------------------------------------------------------------------------------


def test_the_first_class_by_name_is_the_largest() -> None:
    selection = drawn(name="exponential", imbalance=10)
    assert sizes(selection) == dict(zip(NAMES, exponential_sizes(10, 50, 10), strict=True))
    assert (len(selection.search), len(selection.query), selection.large) == (40, 60, ())


def test_a_drawn_order_has_the_same_sizes_for_other_classes() -> None:
    found = [sizes(drawn(name="exponential", imbalance=10, order="draw", seed=seed)) for seed in range(3)]
    assert all(sorted(one.values(), reverse=True) == exponential_sizes(10, 50, 10) for one in found)
    assert len({max(one, key=one.__getitem__) for one in found}) > 1


def test_a_stronger_imbalance_has_a_part_of_the_images_of_a_weaker_one_and_of_the_balanced_control() -> None:
    weak, strong = (drawn(name="exponential", imbalance=imbalance, max_per_class=40) for imbalance in (5, 20))
    control = drawn(name="balanced", per_class=40)
    assert set(strong.train.tolist()) < set(weak.train.tolist()) < set(control.train.tolist())
    assert weak.query.tolist() == strong.query.tolist() == control.query.tolist()
    assert weak.search.tolist() == control.search.tolist()


def test_a_class_with_too_few_images_takes_a_smaller_size() -> None:
    """The class that should be the largest has 20 images: the next one by name is the largest."""
    images = trees.located({"a": 20, "b": 50, "c": 50, "d": 9})
    found = sizes(drawn(images=images, name="pareto", max_per_class=50, min_per_class=5, order="name"), images)
    assert found["b"] == 50
    assert sorted(found.values(), reverse=True) == pareto_sizes(4, 50, 5, 6.0)
    with pytest.raises(DataError, match="a class needs 60 training images, and the 4 that are left have fewer") as caught:
        drawn(images=images, name="pareto", max_per_class=60)
    assert "lower `max_per_class`" in caught.value.hint


def test_the_largest_class_has_as_many_images_as_every_class_has() -> None:
    images = trees.located({"a": 30, "b": 24, "c": 50})
    assert sizes(drawn(images=images, name="exponential", imbalance=2), images) == {"a": 24, "b": 16, "c": 12}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "exponential", "imbalance": 0.5}, "greater than or equal to 1"),
        ({"name": "pareto", "max_per_class": 4}, "min_per_class 5 is above max_per_class 4"),
        ({"name": "classes", "classes": ["n01", "n01"]}, "'n01' is listed twice"),
        ({"name": "classes"}, "either as a list in `classes` or as a `file`"),
        ({"name": "classes", "classes": ["a"], "file": "b"}, "either as a list in `classes` or as a `file`"),
        ({"name": "classes", "classes": ["a"], "sha256": "0" * 64}, "sha256 is of a `file`"),
        ({"name": "file", "path": "x", "sha256": "12"}, "should match pattern"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rule(**values)


# --- classes by name --------------------------------------------------------------------------------------------------


def test_named_classes_have_all_their_images_or_the_same_number() -> None:
    assert sizes(drawn(name="classes", classes=["n07", "n02"])) == {"n02": 50, "n07": 50}
    assert sizes(drawn(name="classes", classes=["n07", "n02"], per_class=3)) == {"n02": 3, "n07": 3}
    assert sizes(drawn(name="exponential", imbalance=5, classes=["n07", "n02"])) == {"n02": 50, "n07": 10}


def test_a_file_of_classes_may_have_words_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISD_LISTS_ROOT", str(tmp_path))
    path = tmp_path / "imagenet100.txt"
    path.write_text("# ImageNet-100\nn03 great white shark\n\nn01\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    selection = drawn(name="classes", file=path.name)
    assert selection.classes == ("n01", "n03")
    [note] = selection.notes
    assert digest in note
    assert drawn(name="classes", file=path.name, sha256=digest).notes == ()
    with pytest.raises(DataError, match=f"not the file that the rule names .sha256 {digest}, expected 000") as caught:
        drawn(name="classes", file=path.name, sha256="0" * 64)
    assert caught.value.hint
    assert read_classes(path, {"n03 great white shark"})[0] == ("n03 great white shark", "n01")


def test_classes_that_the_source_lacks_are_named() -> None:
    with pytest.raises(DataError, match="1 of the 2 classes named are not in the source; the first is 'n11'") as caught:
        drawn(name="classes", classes=["n01", "n11"])
    assert "did you mean 'n01'" in caught.value.hint


@pytest.mark.parametrize(("text", "message"), [("", "names no class"), ("a\nb\na\n", "class a is named twice")])
def test_a_wrong_file_of_classes_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "x.txt", ())


# --- published lists of images ----------------------------------------------------------------------------------------

LISTED = "train/n04/n04_3.JPEG 0\ntrain/n04/n04_4.JPEG 0\ntrain/n01/n01_0.JPEG 1\n"


def test_a_list_of_labelled_files_gives_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form of ImageNet-LT: labels may count the classes in any order, since the folder says the class."""
    monkeypatch.setenv("ISD_LISTS_ROOT", str(tmp_path))
    (tmp_path / "lt.txt").write_text(LISTED)
    digest = hashlib.sha256(LISTED.encode()).hexdigest()
    selection = drawn(name="file", path="lt.txt", sha256=digest, shots=params.Shots(many_above=1, few_below=2))
    assert [(IMAGES[at].cls, IMAGES[at].file) for at in selection.train.tolist()] == [
        ("n01", "n01_0.JPEG"),
        ("n04", "n04_3.JPEG"),
        ("n04", "n04_4.JPEG"),
    ]
    assert (selection.classes, selection.large, selection.notes) == (("n01", "n04"), (), ())
    assert selection.shots == {"many": ("n04",), "medium": (), "few": ("n01",)}
    assert "state it in the rule" in drawn(name="file", path="lt.txt").notes[0]
    with pytest.raises(DataError, match="not the file that the rule names"):
        drawn(name="file", path="lt.txt", sha256="0" * 64)
    with pytest.raises(DataError, match=r"other\.txt: no such file") as caught:
        drawn(name="file", path="other.txt")
    assert "ISD_LISTS_ROOT" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no line"),
        ("n01_0.JPEG 0\n", ":1: expected a path with a folder and a label"),
        ("train/n01/a.JPEG\n", ":1: expected a path with a folder and a label"),
        ("train/n01/a.JPEG cat\n", ":1: expected a path with a folder and a label"),
        ("train/n01/a.JPEG 0\nval/n01/a.JPEG 0\n", ":2: n01/a.JPEG is named a second time, first on line 1"),
        ("train/n01/a.JPEG 0\ntrain/n01/b.JPEG 1\n", ":2: folder n01 has label 0, label 1"),
        ("train/n01/a.JPEG 0\ntrain/n02/b.JPEG 0\n", ":2: folder n02 has label 0, label 0 has n01"),
    ],
)
def test_a_damaged_list_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        parse_labelled(tmp_path / "x.txt")


# --- groups -----------------------------------------------------------------------------------------------------------


def test_groups_have_imagenet_lts_thresholds() -> None:
    """Many: more than 100 training images; medium: 20 to 100; few: fewer than 20 (Liu et al. 2019)."""
    images = trees.located({"a": 101, "b": 100, "c": 20, "d": 19})
    selection = drawn(params.Shots(), images, name="all")
    assert selection.shots == {"many": ("a",), "medium": ("b", "c"), "few": ("d",)}
    assert drawn(images=images, name="all").shots == {}
    with pytest.raises(ValidationError, match="few_below 12 is above many_above 10, so the groups overlap"):
        params.Shots(many_above=10, few_below=12)
