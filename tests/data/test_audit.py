"""What `data audit` says of lists, counted by hand, and of the published ones where they are at hand."""

from __future__ import annotations

import itertools
import json
import math
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from isd_repro import cli
from isd_repro.data import audit as auditing
from isd_repro.data import manifests
from isd_repro.data.manifests import Image, Manifest
from isd_repro.runtime.errors import DataError
from tests.data import trees

SHARED = Path(__file__).parents[3] / "shared" / "data" / "isd-unbalanced-lists.tar.gz"


def write(path: Path, counts: Mapping[str, int], start: int = 0) -> Path:
    """A list with so many images of each class, numbered from `start`."""
    lines = [f"/train/{cls}/{cls}_{at}.JPEG" for cls, count in counts.items() for at in range(start, start + count)]
    path.write_text("\n".join(["class names : ", *counts, "Train Images: ", *lines]) + "\n")
    return path


def test_sizes_ranks_and_chance_by_hand(tmp_path: Path) -> None:
    """Large are the 1st and the 4th of six: of the 15 pairs of six, 6 lie among the first four."""
    path = write(tmp_path / "D7.txt", {"f": 3, "a": 9, "b": 3, "d": 7, "c": 3, "e": 2})
    [one] = auditing.inspect([path]).lists
    pairs = list(itertools.combinations("abcdef", 2))
    assert one.large == {"a": 9, "d": 7}
    assert (one.classes, one.images, one.rare_classes, one.rare_images, one.rare) == (6, 27, 4, 11, (2, 3))
    assert one.last_large == 4
    assert one.chance == pytest.approx(sum(set(pair) <= set("abcd") for pair in pairs) / len(pairs))
    assert one.chance == pytest.approx(6 / 15)
    assert (one.published, one.animals) == (None, None)


def test_animals_by_hand(tmp_path: Path) -> None:
    """Three animals of five classes, two of them large: of ten pairs, three are of animals alone."""
    counts = {"n01440764": 9, "n02655020": 9, "n02510455": 3, "n02666196": 3, "n07747607": 3}
    [one] = auditing.inspect([write(tmp_path / "x.txt", counts)]).lists
    assert one.animals is not None
    assert (one.animals.large, one.animals.rare) == (2, 1)
    assert one.animals.chance == pytest.approx(3 / 10)
    counts = {"n01440764": 9, "n02655020": 3, "n02510455": 3, "n02666196": 9, "n07747607": 3}
    [other] = auditing.inspect([write(tmp_path / "y.txt", counts)]).lists
    assert other.animals is not None
    assert other.animals.chance == pytest.approx((3 + 3 * 2) / 10)  # one animal or more


def test_overlap_by_hand(tmp_path: Path) -> None:
    one = write(tmp_path / "a.txt", {"p": 20, "q": 4, "r": 4, "s": 4})
    two = write(tmp_path / "b.txt", {"p": 4, "q": 4, "t": 20, "r": 4}, start=2)
    report = auditing.inspect([one, two])
    [pair] = report.overlaps
    assert (pair.classes, pair.large, pair.rare) == (3, 0, 2)  # p is large in one alone
    assert pair.images == 4 + 2 + 2
    assert pair.rare_images == 2 + 2
    assert pair.expected == pytest.approx(2 * 4 * 4 / 20)
    assert (report.distinct_classes, report.distinct_large) == (5, 2)


def test_a_folder_is_read_in_the_order_of_its_numbers_and_json_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("D10", "D2", "D1"):
        write(tmp_path / f"{name}.txt", {"a": 5, "b": 2, "c": 2})
    words = tmp_path / "words.tsv"
    words.write_text("a\tant, emmet\nz\tzebra\n")
    auditing.audit([tmp_path], words, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in told["lists"]] == ["D1.txt", "D2.txt", "D10.txt"]
    assert told["lists"][0]["names"] == {"a": "ant, emmet"}
    assert told["lists"][0]["chance"] == pytest.approx(1 / 3)
    assert len(told["overlaps"]) == 3
    auditing.audit([tmp_path], words, as_json=False)
    text = capsys.readouterr().out
    assert "D1.txt no 9 3 1 5 2 2 1 0.33 - - -" in [" ".join(line.split()) for line in text.splitlines()]
    assert "D1.txt a ant, emmet" in " ".join(text.split())


def test_what_is_no_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        auditing.find_sets([tmp_path / "D1.txt"])
    with pytest.raises(DataError, match="has no folder 'train'"):
        auditing.inspect(auditing.find_sets([tmp_path]))
    flat = write(tmp_path / "flat.txt", {"a": 2, "b": 2})
    report = auditing.inspect([flat])
    assert (report.lists, report.sets[0].gini, report.sets[0].imbalance) == ((), 0, 1)
    (tmp_path / "words.txt").write_text("a ant\n")
    with pytest.raises(DataError, match=r"words\.txt:1: expected class, tab and name"):
        auditing.read_words(tmp_path / "words.txt")


def test_images_beside_text_files_are_a_set_of_images_and_a_tar_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "kaggle" / "ILSVRC").mkdir(parents=True)
    (tmp_path / "kaggle" / "LOC_synset_mapping.txt").touch()
    assert auditing.find_sets([tmp_path / "kaggle"]) == [tmp_path / "kaggle"]
    with tarfile.open(tmp_path / "images.tar", "w") as packed:
        packed.add(tmp_path / "kaggle")
    with pytest.raises(DataError, match="a tar file, which is not read in place"):
        auditing.inspect([tmp_path / "images.tar"])


# --- class sizes of any set -------------------------------------------------------------------------------------------


def test_class_sizes_by_hand(tmp_path: Path) -> None:
    """Gini of 10, 30, 200: half the mean difference of all pairs, 2 * (20 + 190 + 170) / 9, over the mean of 80."""
    path = tmp_path / "lt.txt"
    counts = {"a": 30, "b": 200, "c": 10}
    lines = [f"train/{cls}/{at}.JPEG {label}" for label, (cls, count) in enumerate(counts.items()) for at in range(count)]
    path.write_text("\n".join(lines))
    [one] = auditing.inspect([path]).sets
    assert (one.images, one.classes, one.largest, one.median, one.smallest, one.imbalance) == (240, 3, 200, 30, 10, 20)
    assert one.gini == pytest.approx(2 * (20 + 190 + 170) / 9 / 2 / 80)
    assert one.shots == {"many": 1, "medium": 1, "few": 1}
    assert one.counts == counts


def test_the_same_images_have_the_same_sizes_as_folder_zip_and_prepared_subset(
    tmp_path: Path,
) -> None:
    images = trees.images({"n01": 3, "n02": 5})
    root = trees.write_official(tmp_path / "tiny", images)
    packed = trees.write_zip(tmp_path / "tiny.zip", trees.official(images))
    rows = [Image(*key, f"{at:064x}") for at, key in enumerate(sorted(images))]
    train, val = (np.array([at for at, row in enumerate(rows) if row.split == split]) for split in ("train", "val"))
    manifests.write(tmp_path / "prepared", Manifest("Tiny", "x", {}, ("n01", "n02"), (), tuple(rows), train, train, val))
    paths = auditing.find_sets([root, packed, tmp_path / "prepared"])
    assert [one.counts for one in auditing.inspect(paths).sets] == [{"n01": 3, "n02": 5}] * 3


def test_the_command_prints_a_row_a_set_and_draws_a_line_a_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    path, plot = write(tmp_path / "D3.txt", {"a": 200, "b": 50, "c": 10}), tmp_path / "sizes.svg"
    monkeypatch.setattr("sys.argv", ["isd-repro", "data", "audit", str(path), "--plot", str(plot)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert "D3.txt 260 3 200 50 10 20 0.487 1 1 1" in [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert plot.read_text().startswith("<svg")
    for text in ("D3.txt", ">100</text>", "training images"):  # the set, a tick in plain digits, the axis
        assert text in plot.read_text()


# --- the published lists ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SHARED.is_file():
        pytest.skip(f"the published lists are not here: no {SHARED.name} in ../shared/data")
    root = tmp_path_factory.mktemp("lists")
    with tarfile.open(SHARED) as archive:
        archive.extractall(root, filter="data")
    return next(path.parent for path in root.rglob("D1.txt"))


def test_all_large_classes_of_the_published_lists_are_the_smallest_names(published: Path) -> None:
    report = auditing.inspect(auditing.find_sets([published]))
    assert [one.published for one in report.lists] == [f"D{number}" for number in range(1, 11)]
    for one in report.lists:
        assert (one.last_large, one.rare_classes, one.rare) == (8, 30, (100, 100))
        assert one.chance == pytest.approx(1 / math.comb(38, 8))
        assert one.animals is not None
        assert one.animals.large == 8
    assert sum(one.animals.rare for one in report.lists if one.animals) == 72
    assert (report.distinct_classes, report.distinct_large) == (323, 74)
    alone = [pair for pair in report.overlaps if pair.rare == 1]
    assert {pair.rare_images for pair in alone} <= set(range(1, 16))
    assert {round(pair.expected, 1) for pair in alone} == {7.7}
