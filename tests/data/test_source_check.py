"""Other images behind the same variable are noticed, cheaply; an absent data set is no obstacle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isd_repro.data import manifests, source_check, sources
from isd_repro.data.source_check import check_source
from isd_repro.runtime.errors import DataError
from tests.data import trees
from tests.pipeline.test_prepare import FILES, Bench

SUBSET = trees.subset(search=4, query=2)


class Source(Bench):
    """A prepared subset, and its images in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "profile")
        self.root, self.memory = folder / "images", folder / "memory"
        trees.write_plain(self.root, FILES)

    def check(self) -> None:
        check_source("x", SUBSET, self.folder, self.memory)

    def refused(self, words: str) -> None:
        for _ in range(2):  # a refusal is not remembered as seen
            with pytest.raises(DataError, match=words) as caught:
                self.check()
            assert "ISD_TEST_ROOT=" in caught.value.message
            assert "unset it" in caught.value.hint
            assert "prepare@x" in caught.value.hint


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    found = Source(tmp_path)
    monkeypatch.setenv("ISD_TEST_ROOT", str(found.root))
    found.run(SUBSET)
    return found


def test_the_same_images_pass_and_are_listed_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source.check()

    def listed(*_: object) -> None:
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "open_source", listed)
        source.check()
        os.utime(source.root / "train")
        with pytest.raises(AssertionError, match="listed again"):
            source.check()
    source.check()


def test_an_absent_data_set_and_equal_images_elsewhere_are_no_obstacle(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    named = {f"{split}/{cls}/{file}": content for (split, cls, file), content in FILES.items()}
    for place in (tmp_path / "nowhere", tmp_path / "mount", trees.write_zip(tmp_path / "images.zip", named)):
        monkeypatch.setenv("ISD_TEST_ROOT", str(place))
        source.check()
    monkeypatch.delenv("ISD_TEST_ROOT")
    source.check()


def test_other_images_are_refused(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.check()
    other = trees.images({"n07": 6, "n08": 7, "n09": 8}, val=3)
    monkeypatch.setenv("ISD_TEST_ROOT", str(trees.write_plain(tmp_path / "other", other)))
    source.refused(r"27 of its 27 images are absent, first train/n01/")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    monkeypatch.setenv("ISD_TEST_ROOT", str(tmp_path / "texts"))
    source.refused("has no folder 'train'")


def test_a_sample_is_spread_over_all_images(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first and last image are those of the manifest; one between them may change unnoticed where there are more."""
    monkeypatch.setattr(source_check, "SAMPLE", 2)
    images = manifests.read(source.folder).images
    for image, noticed in ((images[0], True), (images[3], False), (images[-1], True)):
        path = source.root / image.split / image.cls / image.file
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        if noticed:
            source.refused(f"{image.file} has other bytes")
        else:
            source.check()
        path.write_bytes(content)
