"""Rules: what they draw depends on the rule and its seed alone, and what they cannot draw they refuse."""

from __future__ import annotations

import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from isd_repro.config import params
from isd_repro.data.lists import LIST_SHA256, parse_list
from isd_repro.data.manifests import Positions
from isd_repro.data.sources import Located
from isd_repro.data.subsets import Selection, select
from isd_repro.runtime.errors import DataError
from tests.data import trees

COUNTS = {f"n{number:02d}": 20 + number for number in range(12)}
IMAGES = trees.located(COUNTS)
SHARED = Path(__file__).parents[3] / "shared" / "data"


def unbalanced(**values: object) -> params.Unbalanced:
    return params.Unbalanced.model_validate({"name": "unbalanced", "classes": 8, "large": 3, "rare_images": 5, **values})


def names(images: list[Located], positions: Positions) -> set[tuple[str, str, str]]:
    return {images[at].key for at in positions.tolist()}


def counts(positions: Positions, split: str) -> dict[str, int]:
    rows = [IMAGES[at] for at in positions.tolist()]
    assert {row.split for row in rows} == {split}
    assert len(set(positions.tolist())) == len(positions)
    return dict(Counter(row.cls for row in rows))


def halves(**values: object) -> params.Halves:
    return params.Halves.model_validate(
        {"name": "halves", "tuning": 4, "part": "first", "large": 1, "rare_images": 5, **values}, strict=True
    )


RULES = [
    params.AllClasses(name="all", classes=5, seed=3),
    params.Balanced(name="balanced", classes=5, per_class=7, seed=3),
    unbalanced(seed=3),
    unbalanced(seed=3, large_classes=("n02", "n05", "n07")),
    halves(seed=3),
    halves(seed=3, part="tuning", large=2, large_by="name"),
    params.Exponential(name="exponential", classes=5, imbalance=4, seed=3),
    params.Pareto(name="pareto", classes=5, max_per_class=20, min_per_class=2, seed=3),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}")
def test_the_order_of_the_listing_changes_nothing(rule: params.Rule) -> None:
    subset = trees.subset(rule, search=4, query=6)
    first = select(IMAGES, subset, "x")
    shuffled = list(IMAGES)
    random.Random(0).shuffle(shuffled)
    second = select(shuffled, subset, "x")
    assert (first.classes, first.large) == (second.classes, second.large)
    for role in ("train", "search", "query"):
        assert names(IMAGES, getattr(first, role)) == names(shuffled, getattr(second, role))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}")
def test_another_seed_draws_other_images(rule: params.Rule) -> None:
    other = rule.model_copy(update={"seed": 4})
    first, second = (select(IMAGES, trees.subset(one, search=4, query=6), "x") for one in (rule, other))
    assert first.classes != second.classes
    common = set(first.classes) & set(second.classes)
    drawn = [{key for key in names(IMAGES, one.search) if key[1] in common} for one in (first, second)]
    assert drawn[0] != drawn[1]


def test_halves_share_no_class_with_each_other_nor_with_the_tuning_classes() -> None:
    def drawn(**values: object) -> Selection:
        return select(IMAGES, trees.subset(halves(**values)), "x")

    tuning = drawn(part="tuning", large=2)
    assert len(tuning.classes) == 4
    seen = set()
    for halving in range(5):
        first, second = (drawn(part=part, halving=halving) for part in ("first", "second"))
        assert len(first.classes) == len(second.classes) == 4
        assert sorted((*tuning.classes, *first.classes, *second.classes)) == sorted(COUNTS)
        assert drawn(part="tuning", large=2, halving=halving).classes == tuning.classes
        for half in (first, second):
            assert len(half.large) == 1
            rare = {cls: 5 for cls in half.classes if cls not in half.large}
            assert counts(half.train, "train") == rare | {half.large[0]: COUNTS[half.large[0]]}
        seen |= {first.classes, second.classes}
    assert len(seen) > 4, "every halving is the same"


@pytest.mark.parametrize("rule", [halves(seed=3, halving=2), unbalanced(seed=3)], ids=lambda rule: str(rule.name))
def test_a_balanced_control_holds_the_rare_images_and_changes_nothing_else(rule: params.Halves | params.Unbalanced) -> None:
    control = rule.model_copy(update={"per_class": 9})
    cut, even = (select(IMAGES, trees.subset(one, search=4, query=6), "x") for one in (rule, control))
    assert (even.classes, even.large) == (cut.classes, cut.large)
    assert counts(even.train, "train") == dict.fromkeys(even.classes, 9)
    rare = [{key for key in names(IMAGES, one.train) if key[1] not in cut.large} for one in (cut, even)]
    assert len(rare[0]) == rule.rare_images * (len(cut.classes) - len(cut.large))
    assert rare[0] < rare[1]
    assert even.search.tolist() == cut.search.tolist()
    assert even.query.tolist() == cut.query.tolist()


def test_a_rule_without_a_balanced_control_does_not_mention_it() -> None:
    """So the manifests and fingerprints from before there was one stay what they are."""
    for rule in (halves(), unbalanced()):
        assert "per_class" not in rule.model_dump(mode="json")
        assert rule.model_copy(update={"per_class": 9}).model_dump(mode="json")["per_class"] == 9


def test_large_by_name_changes_the_large_classes_and_nothing_else() -> None:
    draw, name = (select(IMAGES, trees.subset(halves(large_by=by, halving=1)), "x") for by in ("draw", "name"))
    assert draw.classes == name.classes
    assert name.large == name.classes[:1] != draw.large
    rare = set(draw.classes) - set(draw.large) - set(name.large)
    kept = [{key for key in names(IMAGES, one.train) if key[1] in rare} for one in (draw, name)]
    assert kept[0] == kept[1] != set()


@pytest.mark.parametrize(
    ("rule", "train"),
    [
        (params.AllClasses(name="all", classes=6), COUNTS),
        (params.Balanced(name="balanced", classes=6, per_class=7), dict.fromkeys(COUNTS, 7)),
        (unbalanced(classes=6), dict.fromkeys(COUNTS, 5)),
        (unbalanced(classes=6, large_classes=("n07", "n02", "n05")), dict.fromkeys(COUNTS, 5)),
    ],
    ids=["all", "balanced", "drawn large classes", "named large classes"],
)
def test_a_rule_takes_so_many_of_each_class(rule: params.Rule, train: dict[str, int]) -> None:
    selection = select(IMAGES, trees.subset(rule, search=3, query=5), "x")
    assert len(selection.classes) == 6
    assert len(selection.large) == (3 if rule.name == "unbalanced" else 0)
    assert set(selection.large) <= set(selection.classes)
    if isinstance(rule, params.Unbalanced) and rule.large_classes:
        assert selection.large == ("n02", "n05", "n07")
    wanted = {cls: COUNTS[cls] if cls in selection.large else train[cls] for cls in selection.classes}
    assert counts(selection.train, "train") == wanted
    assert counts(selection.search, "train") == dict.fromkeys(selection.classes, 3)
    assert counts(selection.query, "val") == dict.fromkeys(selection.classes, 5)


def test_rare_draws_are_nested_and_leave_the_evaluation_alone() -> None:
    few, many = (select(IMAGES, trees.subset(unbalanced(rare_images=n), search=4, query=6), "x") for n in (3, 9))
    assert set(few.train.tolist()) < set(many.train.tolist())
    assert few.search.tolist() == many.search.tolist()
    assert few.query.tolist() == many.query.tolist()


def test_a_class_drawn_does_not_depend_on_its_neighbours() -> None:
    """Balanced draws of one class are the same whatever other classes the source has."""
    rule = params.Balanced(name="balanced", per_class=5)
    alone = [image for image in IMAGES if image.cls == "n03"]
    whole = names(IMAGES, select(IMAGES, trees.subset(rule), "x").train)
    assert names(alone, select(alone, trees.subset(rule), "x").train) == {key for key in whole if key[1] == "n03"}


def test_classes_of_one_size_are_drawn_independently() -> None:
    images = trees.located(dict.fromkeys(("n01", "n02", "n03"), 50))
    drawn = names(images, select(images, trees.subset(params.Balanced(name="balanced", per_class=5)), "x").train)
    numbers = [frozenset(file.removeprefix(cls) for _, cls, file in drawn if cls == one) for one in ("n01", "n02", "n03")]
    assert len(set(numbers)) == 3


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        (trees.subset(params.AllClasses(name="all", classes=13)), "needs 13 classes, but the source has 12"),
        (trees.subset(halves(large=4)), "4 large classes of 4 in part 'first' of 12 leave no rare one"),
        (trees.subset(halves(tuning=12)), "1 large classes of 0 in part 'first' of 12 leave no rare one"),
        (trees.subset(params.Balanced(name="balanced", per_class=21)), "class n00 has 20 train images, but 21 train images"),
        (trees.subset(halves(per_class=33)), "train images, but 33 rare images are needed"),
        (trees.subset(search=21), "class n00 has 20 train images, but 21 search images"),
        (trees.subset(query=11), "class n00 has 10 val images, but 11 query images"),
        (
            trees.subset(unbalanced(classes=12, large=1, large_classes=("n11",), rare_images=25)),
            "has 20 train images, but 25 rare",
        ),
        (trees.subset(unbalanced(classes=None, large=12)), "12 large classes of 12 leave no rare one"),
        (trees.subset(unbalanced(classes=13)), "needs 13 classes"),
        (
            trees.subset(unbalanced(large_classes=("n00", "n01", "n99"))),
            "1 of the 3 classes named are not in the source; the first is 'n99'",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(subset: params.Subset, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        select(IMAGES, subset, "x")
    assert "subset 'x'" in caught.value.message
    assert caught.value.hint


def test_large_and_large_classes_must_agree() -> None:
    with pytest.raises(ValueError, match="large: 3, but large_classes names 2 classes"):
        unbalanced(large_classes=("n00", "n01"))


# --- the authors' lists -----------------------------------------------------------------------------------------------

LISTED = {"n01": 5, "n04": 7, "n05": 5, "n08": 5, "n10": 20}


def write_list(folder: Path) -> Path:
    lines = ["class names : ", *LISTED, "Train Images: "]
    lines += [f"/train/{cls}/{cls}_{number}.JPEG" for cls, count in LISTED.items() for number in range(count)]
    path = folder / "D1.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def of_list(folder: Path, monkeypatch: pytest.MonkeyPatch, query: int | None = None) -> Selection:
    monkeypatch.setenv("ISD_LISTS_ROOT", str(folder))
    return select(IMAGES, trees.subset(params.ListFile(name="list", list="D1"), query=query), "x")


def test_a_list_gives_its_images_and_the_whole_classes_to_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_list(tmp_path)
    selection = of_list(tmp_path, monkeypatch, query=5)
    assert selection.classes == tuple(LISTED)
    assert selection.large == ("n04", "n10")
    assert counts(selection.train, "train") == LISTED
    assert ("train", "n10", "n10_19.JPEG") in names(IMAGES, selection.train)
    assert ("train", "n10", "n10_20.JPEG") not in names(IMAGES, selection.train)
    assert counts(selection.search, "train") == {cls: COUNTS[cls] for cls in LISTED}
    assert counts(selection.query, "val") == dict.fromkeys(LISTED, 5)
    [note] = selection.notes
    assert "not the published D1" in note


def test_a_missing_list_says_where_the_published_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subset = trees.subset(params.ListFile(name="list", list="D1"))
    with pytest.raises(DataError, match="ISD_LISTS_ROOT is not set") as caught:
        select(IMAGES, subset, "x")
    assert "UMBCvision/ISD, commit 4bdd603, folder unbalanced_dataset" in caught.value.hint
    with pytest.raises(DataError, match=r"D1\.txt: no such file") as caught:
        of_list(tmp_path, monkeypatch)
    assert "UMBCvision/ISD, commit 4bdd603, folder unbalanced_dataset" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: expected 'class names"),
        ("classes\n", ":1: expected 'class names"),
        ("class names : \nn01\n", "contains no line 'Train Images"),
        ("class names : \nn01\nTrain Images: \n/train/n01/a.JPEG\n/val/n01/a.JPEG\n", ":5: expected /train/"),
        ("class names : \nn01\nTrain Images: \n/train/n02/a.JPEG\n", ":4: expected /train/"),
        ("class names : \nn01\nTrain Images: \n/train/n01/a.JPEG\n/train/n01/a.JPEG\n", "twice"),
        ("class names : \nn01\nn02\nTrain Images: \n/train/n01/a.JPEG\n", "a class without images"),
    ],
)
def test_a_damaged_list_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "D2.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        parse_list(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n10", "n77", "1 of its 5 classes are not in the source; the first is n77"),
        ("n08_3", "n08_77", r"1 of its 42 images are not in the source; the first is n08/n08_77\.JPEG"),
    ],
)
def test_what_a_list_names_and_the_source_lacks_is_counted(
    old: str, new: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_list(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        of_list(tmp_path, monkeypatch)


PUBLISHED = {  # images, and large classes that have fewer than 1,300: what the paper's authors published
    "D1": (13400, {}),
    "D2": (13036, {"n02095889": 936}),
    "D3": (13217, {"n01688243": 1117}),
    "D4": (13400, {}),
    "D5": (13400, {}),
    "D6": (13171, {"n01744401": 1071}),
    "D7": (12872, {"n02085782": 772}),
    "D8": (13400, {}),
    "D9": (13250, {"n02066245": 1150}),
    "D10": (13390, {"n02090379": 1290}),
}


@pytest.mark.skipif(not (SHARED / "isd-unbalanced-lists.tar.gz").is_file(), reason="data folder absent")
def test_the_published_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(SHARED / "isd-unbalanced-lists.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "isd-unbalanced-lists"
    for name, (total, smaller) in PUBLISHED.items():
        authors = parse_list(folder / f"{name}.txt")
        per_class = Counter(cls for cls, _ in authors.images)
        assert len(authors.images) == total
        assert len(authors.classes) == 38
        assert authors.sha256 == LIST_SHA256[name]
        assert authors.large == tuple(sorted(authors.classes)[:8])
        assert {cls: n for cls, n in per_class.items() if n != 1300} == {**dict.fromkeys(authors.classes[8:], 100), **smaller}
    authors = parse_list(folder / "D7.txt")
    images = [Located("train", cls, file, "") for cls, file in authors.images]
    images += [Located("val", cls, f"{number}.JPEG", "") for cls in authors.classes for number in range(50)]
    monkeypatch.setenv("ISD_LISTS_ROOT", str(folder))
    selection = select(images, trees.subset(params.ListFile(name="list", list="D7")), "x")
    assert (len(selection.train), len(selection.query), selection.notes) == (12872, 1900, ())
