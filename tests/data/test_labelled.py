"""Which images are labelled: a draw by class whose shares nest, or a list of file names."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from isd_repro.data.labelled import drawn, labelled, percent
from isd_repro.data.manifests import Image, Manifest, Prepared
from isd_repro.runtime.errors import DataError

CLASSES = ("ant", "bee", "cat")
COUNTS = (20, 30, 5)
LISTS = "ISD_TEST_LISTS"


def prepared() -> Prepared:
    """55 search images among others that are trained on or asked."""
    images = [
        Image("train", cls, f"{cls}_{at}.JPEG", "") for cls, count in zip(CLASSES, COUNTS, strict=True) for at in range(count + 2)
    ]
    spare = {at for at, image in enumerate(images) if image.file.endswith(("_0.JPEG", "_1.JPEG"))}
    images += [Image("val", cls, f"val_{cls}.JPEG", "") for cls in CLASSES]
    search = np.array([at for at in range(len(images) - 3) if at not in spare], dtype=np.int64)
    query = np.arange(len(images) - 3, len(images), dtype=np.int64)
    manifest = Manifest("toy", "toy", {}, CLASSES, (), tuple(images), np.array(sorted(spare), dtype=np.int64), search, query)
    return Prepared(manifest=manifest, store=cast("Any", SimpleNamespace()))


def files(chosen: Prepared, at: torch.Tensor) -> list[str]:
    return [chosen.manifest.images[position].file for position in at.tolist()]


@pytest.mark.parametrize(("fraction", "counts"), [(0.1, (2, 3, 1)), (0.01, (1, 1, 1)), (0.5, (10, 15, 2)), (1.0, COUNTS)])
def test_a_draw_takes_the_same_share_of_each_class_and_at_least_one(fraction: float, counts: tuple[int, ...]) -> None:
    world = prepared()
    found = labelled(world, fraction, "", 0)
    assert tuple(Counter(found.split.label.tolist())[cls] for cls in range(3)) == counts
    names = files(world, found.split.index)
    assert len(set(names)) == sum(counts)
    assert {name.split("_")[1] for name in names}.isdisjoint({"0.JPEG", "1.JPEG"}), "only search images are labelled"
    assert [name.split("_")[0] for name in names] == [CLASSES[cls] for cls in found.split.label.tolist()]
    search = world.split("search")
    assert torch.equal(found.split.index, search.index[found.at])
    assert torch.equal(found.split.label, search.label[found.at])
    assert found.at.tolist() == sorted(found.at.tolist())
    text = "".join(f"{CLASSES[cls]}\t{name}\n" for cls, name in zip(found.split.label.tolist(), names, strict=True))
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (found.source, found.list_sha256) == ("drawn", None)


def test_shares_nest_seeds_differ_and_classes_do_not_know_each_other() -> None:
    label = torch.tensor([at % 4 for at in range(400)])
    shares = [set(drawn(label, fraction, 0)) for fraction in (0.01, 0.1, 0.37, 1.0)]
    assert all(small < large for small, large in itertools.pairwise(shares))
    assert drawn(label, 0.1, 0) == drawn(label, 0.1, 0)
    assert drawn(label, 0.1, 0) != drawn(label, 0.1, 1)
    fewer = torch.where(label == 3, torch.tensor(9), label)  # another class in place of 3
    kept = {at for at in drawn(fewer, 0.1, 0) if int(fewer[at]) < 3}
    assert kept == {at for at in drawn(label, 0.1, 0) if int(label[at]) < 3}


def test_a_list_is_read_by_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISD_TEST_LISTS", str(tmp_path))
    wanted = ["cat_4.JPEG", "ant_21.JPEG", "ant_2.JPEG", "bee_9.JPEG"]
    path = tmp_path / "10percent.txt"
    path.write_text("\n".join(wanted) + "\n\n")
    world = prepared()
    found = labelled(world, 0.1, LISTS, 0)
    assert files(world, found.split.index) == ["ant_2.JPEG", "ant_21.JPEG", "bee_9.JPEG", "cat_4.JPEG"]
    assert found.split.label.tolist() == [0, 0, 1, 2]
    assert found.source == "10percent.txt"
    assert found.list_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.facts() == {"images": 4, "source": "10percent.txt", "sha256": found.sha256, "list_sha256": found.list_sha256}
    path.write_text("\n".join(reversed(wanted)))
    assert labelled(world, 0.1, LISTS, 0).sha256 == found.sha256, "the order of a list is no part of what is labelled"
    monkeypatch.delenv("ISD_TEST_LISTS")
    assert labelled(world, 0.1, LISTS, 0).source == "drawn"
    monkeypatch.setenv("ISD_TEST_LISTS", str(tmp_path))
    assert labelled(world, 0.1, "", 0).source == "drawn", "a profile that names no variable reads none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "1percent.txt: no such list"),
        ("ant_2.JPEG\nbee_2.JPEG\ncat_2.JPEG\ndog_1.JPEG\n", "1 of its 4 images are not in the search set, first dog_1.JPEG"),
        ("ant_2.JPEG\nbee_2.JPEG\ncat_2.JPEG\nant_0.JPEG\n", "1 of its 4 images are not in the search set, first ant_0.JPEG"),
        ("ant_2.JPEG\nbee_2.JPEG\ncat_2.JPEG\nant_2.JPEG\n", "1 of its 4 lines name an image again"),
        ("ant_2.JPEG\nbee_2.JPEG\n", "1 classes have no labelled image; the first is cat"),
        ("", "3 classes have no labelled image; the first is ant"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISD_TEST_LISTS", str(tmp_path))
    if content is not None:
        (tmp_path / "1percent.txt").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        labelled(prepared(), 0.01, LISTS, 0)
    assert "UCDvision/CMSF" in caught.value.hint


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.01, "1"), (0.1, "10"), (0.07, "7"), (0.125, "12.5"), (0.29, "29"), (1.0, "100")]
)
def test_shares_have_plain_names(fraction: float, text: str) -> None:
    assert percent(fraction) == text
