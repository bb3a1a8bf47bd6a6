"""Manifests: their hash names the images and their roles, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from isd_repro.config import params
from isd_repro.data import manifests
from isd_repro.data.manifests import Image, Manifest
from isd_repro.data.store import StoreInfo
from isd_repro.records import query_groups
from isd_repro.runtime.errors import DataError


def make() -> Manifest:
    names = [(split, cls, number) for split in ("train", "val") for cls in ("ant", "bee") for number in range(2)]
    images = tuple(Image(split, cls, f"{cls}_{number}.JPEG", f"{at:064x}") for at, (split, cls, number) in enumerate(names))
    return Manifest(
        dataset="Insects",
        subset="tiny",
        rule={"name": "unbalanced", "large": 1},
        classes=("ant", "bee"),
        large=("bee",),
        images=images,
        train=np.array([0, 2, 3]),
        search=np.array([0, 1]),
        query=np.array([4, 5, 6, 7]),
    )


def renamed(key: str) -> tuple[Image, ...]:
    first, *others = make().images
    return (dataclasses.replace(first, **{key: "0_new"}), *others)


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    made = make()
    manifests.write(tmp_path, made, dropped=["train/ant/x.JPEG"])
    found = manifests.read(tmp_path)
    assert found.identity() == made.identity()
    assert found.images == made.images
    for role in ("train", "search", "query"):
        assert np.array_equal(getattr(found, role), getattr(made, role))
    assert manifests.read_header(tmp_path).dropped == ("train/ant/x.JPEG",)
    assert (tmp_path / "images.tsv").read_text().splitlines()[:3] == [
        "split\tclass\tfile\tsha256\troles",
        f"train\tant\tant_0.JPEG\t{0:064x}\tts",
        f"train\tant\tant_1.JPEG\t{1:064x}\ts",
    ]
    assert found.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        manifests.write(tmp_path / name, make())
    for file in ("manifest.json", "images.tsv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"train": np.array([0, 2])},
        {"search": np.array([0, 2])},
        {"query": np.array([4, 5, 7])},
        {"large": ()},
        {"shots": {"many": ("bee",), "medium": (), "few": ("ant",)}},
        *({"images": renamed(key)} for key in ("cls", "file", "sha256")),
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_identity_changes_the_hash(change: dict[str, object]) -> None:
    made = make()
    assert dataclasses.replace(made, **change).sha256 != made.sha256  # type: ignore[arg-type]


def test_names_of_the_subset_change_no_hash() -> None:
    made = make()
    assert dataclasses.replace(made, dataset="Other", subset="other", rule={}).sha256 == made.sha256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"{3:064x}", f"{9:064x}", "sha256 of its rows"),
        ("\tts\n", "\tt\n", "sha256 of its rows"),
        ("\tts\n", "\ttx\n", "the roles 'tx', expected some of 'ts'"),
        ("ant_1.JPEG", "ant_5.JPEG", "sha256 of its rows"),
        ("\tq\n", "\n", r"images\.tsv:6: expected"),
        ("\tq\n", "\t\n", r"images\.tsv:6: expected"),
        ("val\t", "test\t", r"images\.tsv:6: expected"),
        ("\tbee\t", "\twasp\t", "classes are not those"),
        ("split\tclass", "split\tkind", r"images\.tsv:1: expected split, class"),
    ],
)
def test_a_changed_table_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    manifests.write(tmp_path, make())
    path = tmp_path / "images.tsv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        manifests.read(tmp_path)


def test_groups_by_training_images_are_kept_and_named_in_the_header_where_there_are_any(tmp_path: Path) -> None:
    made = dataclasses.replace(make(), large=(), shots={"many": ("bee",), "medium": (), "few": ("ant",)})
    manifests.write(tmp_path, made)
    assert manifests.read(tmp_path).identity() == made.identity()
    masks = query_groups(np.array([0, 1, 0]), made.identity())
    assert {group: mask.tolist() for group, mask in masks.items()} == {
        "all": [True, True, True],
        "many": [False, True, False],
        "few": [True, False, True],
    }
    assert "shots" not in make().identity().model_dump(mode="json")


@pytest.mark.parametrize(
    ("key", "value"),
    [("sha256", "0" * 64), ("train", 9), ("large", ["ant"]), ("classes", ["bee", "ant"]), ("shots", {"few": ["wasp"]})],
)
def test_a_changed_header_is_refused(key: str, value: object, tmp_path: Path) -> None:
    manifests.write(tmp_path, make())
    path = tmp_path / "manifest.json"
    header = json.loads(path.read_text())
    header["identity"][key] = value
    path.write_text(json.dumps(header))
    with pytest.raises(DataError):
        manifests.read(tmp_path)


def test_a_store_that_is_not_packed_as_the_rule_says_is_refused(tmp_path: Path) -> None:
    said, made = params.StoreSettings(), params.StoreSettings(channels=1)
    info = StoreInfo(settings=made, images=8, bytes=8, sha256="", index_sha256="")
    for settings in (made, said):
        rule = {"store": settings.model_dump(mode="json", exclude={"external"})}
        manifests.write(tmp_path, dataclasses.replace(make(), rule=rule), store=info)
        if settings is made:
            manifests.read(tmp_path)
    with pytest.raises(DataError, match="the rule and the store have different settings"):
        manifests.read(tmp_path)


def test_missing_and_damaged_headers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        manifests.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
        manifests.read(tmp_path)
    manifests.write(tmp_path, make())
    (tmp_path / "images.tsv").unlink()
    with pytest.raises(DataError, match=r"images\.tsv: no such file"):
        manifests.read(tmp_path)
