"""Images chosen by their result, and images that are learnt from and asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.data import manifests, prepare, subsets
from isd_repro.data.manifests import IMAGES, Image, Manifest, check_shared
from isd_repro.data.subsets import Selection
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file
from tests.cheats.author import RECORDS, failed, write_lock
from tests.verify.world import Profile


def prepared_as(profile: Profile, choose: Callable[[Selection], Selection], *, render: bool = True) -> Manifest:
    """Prepare the subset with code that draws otherwise, and make all records and the lock say so."""
    params, layout = config.load(profile.folder / "params.yaml")
    select = subsets.select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subsets, "select", lambda *given: choose(select(*given)))
        prepare.prepare("digits", params, layout, Console(quiet=True))
    manifest = manifests.read(layout.prepared("digits"))
    identity = manifest.identity().model_dump(mode="json")

    def change(tree: dict[str, Any]) -> None:
        tree["manifest"] = identity
        if "config" in tree:
            tree["config"]["manifest"] = identity["sha256"]
            tree["fingerprint"] = config.fingerprint(tree["config"])

    for path in sorted((profile.folder / RECORDS).glob("*/*.json")):
        profile.edit(path, change)
    write_lock(profile)
    if render:
        profile.report()
    return manifest


def easy(selection: Selection) -> Selection:
    """Other queries of the same classes than the rule draws: the next image of each."""
    return dataclasses.replace(selection, query=selection.query + 1)


def test_the_images_of_the_rule_are_proved(profile: Profile) -> None:
    answer = profile.verify("--run", "untrained")
    assert answer.code == 0
    assert answer.tree["checks"]["draw of the images"]["proved"] == 1
    assert answer.tree["checks"]["copies among the queries"]["proved"] == 1


@pytest.mark.parametrize("here", [True, False], ids=["prepared images here", "the source alone"])
def test_queries_that_the_rule_does_not_draw(clean: Profile, here: bool) -> None:
    prepared_as(clean, easy)
    if not here:
        for path in (clean.folder / "data/prepared/digits").iterdir():
            path.unlink()
    answer = clean.verify()
    if here:
        failed(answer, "draw of the images", f"data/prepared/digits/{IMAGES}", "query images")
    else:
        failed(answer, "draw of the images", f"{RECORDS}/untrained/pretrain.json", "manifest.sha256")
    assert answer.verdicts() == {"failed"}


def test_other_large_classes_than_the_seed_draws(clean: Profile) -> None:
    prepared_as(
        clean, lambda one: dataclasses.replace(one, large=tuple(c for c in one.classes if c not in one.large)[:2]), render=False
    )
    failed(clean.verify(), "draw of the images", f"{RECORDS}/untrained/pretrain.json", "manifest.large")


def test_names_of_the_rule_over_other_pixels(profile: Profile) -> None:
    """The manifest is the rule's, and the store holds one easy image in place of each query."""
    folder = profile.folder / "data/prepared/digits"
    manifest, header = manifests.read(folder), json.loads((folder / "manifest.json").read_text("utf-8"))
    store = np.fromfile(folder / "store.u8", dtype=np.uint8).reshape(len(manifest.images), -1)
    store[manifest.query] = store[manifest.search[0]]
    store.tofile(folder / "store.u8")
    header["store"]["sha256"] = sha256_file(folder / "store.u8")
    (folder / "manifest.json").write_text(json.dumps(header), encoding="utf-8")
    failed(profile.verify("--run", "untrained"), "draw of the images", "data/prepared/digits", "pixels of val/")


def test_without_the_source_that_is_said(clean: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise DataError("ISD_ROOT is not set")

    monkeypatch.setattr("isd_repro.data.sources.open_source", absent)
    answer = clean.verify()
    assert answer.code == 0
    assert answer.tree["checks"]["draw of the images"]["not checked"] == 1
    assert "ISD_ROOT is not set" in answer.tree["checks"]["draw of the images"]["reasons"][0]


# --- roles and copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [("val\t0", "\tq"), ("train\t0", "\tts")])
def test_a_role_of_the_other_split_is_refused(profile: Profile, old: str, new: str) -> None:
    """The search set as queries, and training on the queries."""
    path = profile.folder / "data/prepared/digits" / IMAGES
    lines = path.read_text("utf-8").splitlines(keepends=True)
    at = next(at for at, line in enumerate(lines) if line.startswith(old))
    roles = "ts" if new == "\tq" else "q"
    lines[at] = lines[at].rsplit("\t", 1)[0] + f"\t{roles}\n"
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{IMAGES}:{at + 1}: an image of \w+ has the roles '{roles}'"):
        manifests.read(path.parent)


def manifest_with(copies: int, queries: int = 200) -> Manifest:
    """Queries of which some have the bytes of a training image under other names."""
    train = [Image("train", "a", f"{at}.png", f"t{at}") for at in range(10)]
    query = [Image("val", "a", f"{at}.png", f"t{at}" if at < copies else f"v{at}") for at in range(queries)]
    learnt, asked = np.arange(10), np.arange(10, 10 + queries)
    return Manifest("images", "one", {}, ("a",), (), (*train, *query), train=learnt, search=learnt, query=asked)


def test_copies_are_counted_and_refused_above_one_in_a_hundred(tmp_path: Path) -> None:
    assert check_shared(manifest_with(0).shared, 200, place="x", allow="allow", allowed=False) == ""
    few = check_shared(manifest_with(2).shared, 200, place="x", allow="allow", allowed=False)
    assert few == "2 of 200 queries (1.0%) have the bytes of a training or search image"
    with pytest.raises(DataError, match=r"x: 3 of 200 queries \(1\.5%\) have the bytes .*, more than 1%") as error:
        check_shared(manifest_with(3).shared, 200, place="x", allow="allow them", allowed=False)
    assert error.value.hint.endswith("allow them")
    assert check_shared(3, 200, place="x", allow="allow", allowed=True).startswith("3 of 200")
    manifests.write(tmp_path, manifest_with(3))
    assert "shared" not in (tmp_path / "manifest.json").read_text("utf-8"), "equal images are equal bytes for every version"
    assert manifests.read(tmp_path).identity().shared == 3
    assert manifests.read_header(tmp_path).identity == manifests.read(tmp_path).identity()


def test_validation_files_that_also_lie_in_train(clean: Profile) -> None:
    """As an author's own images would be: every query's bytes under another name in train, and a record that counts none."""

    def count(shared: int) -> None:
        for path in sorted((clean.folder / RECORDS).glob("*/*.json")):
            clean.edit(path, lambda tree: tree["manifest"].update(shared=shared))
        write_lock(clean)
        clean.report()

    count(30)
    one = failed(clean.verify("--quick"), "copies among the queries", f"{RECORDS}/untrained/pretrain.json", "manifest.shared")
    assert one["found"] == "30 of 30 queries are copies of training or search images"
    page = (clean.folder / "reports/tiny/tables/index.html").read_text("utf-8")
    assert "30 of 30 queries have the bytes of a training or search image" in page
    count(1)
    assert (
        "counted by the hashes"
        in failed(clean.verify(), "copies among the queries", f"{RECORDS}/untrained/pretrain.json", "manifest.shared")["expected"]
    )
