"""Images chosen by their result, and images that are learnt from and asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
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
from tests.verify.world import RECORDS, Profile, write_lock


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


IMAGES_TSV = f"data/prepared/digits/{IMAGES}"


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
        answer.failed("draw of the images", IMAGES_TSV, "line ")
    else:
        answer.failed("draw of the images", f"{RECORDS}/untrained/pretrain.json", "manifest.sha256")
    assert answer.verdicts() == {"failed"}


def test_other_large_classes_than_the_seed_draws(clean: Profile) -> None:
    prepared_as(
        clean, lambda one: dataclasses.replace(one, large=tuple(c for c in one.classes if c not in one.large)[:2]), render=False
    )
    clean.verify().failed("draw of the images", f"{RECORDS}/untrained/pretrain.json", "manifest.large")


def test_readable_queries_left_out_as_unreadable(clean: Profile) -> None:
    clean.replace(clean.folder / "params.yaml", "query_per_class: 3", "query_per_class: 3\n    corrupt_share: 0.1")
    folder = clean.folder / "data/prepared/digits"
    whole = prepared_as(clean, lambda one: one, render=False)
    prepared_as(clean, lambda one: dataclasses.replace(one, query=one.query[1:]), render=False)
    first = whole.images[int(whole.query[0])]
    name = f"{first.split}/{first.cls}/{first.file}"
    clean.edit(folder / "manifest.json", lambda tree: tree.update(dropped=[name]))
    assert clean.verify().failed("draw of the images", "data/prepared/digits/manifest.json", "dropped")["found"] == name


def test_names_of_the_rule_over_other_pixels(profile: Profile) -> None:
    """The manifest is the rule's, and the store holds one easy image in place of each query."""
    folder = profile.folder / "data/prepared/digits"
    manifest, header = manifests.read(folder), json.loads((folder / "manifest.json").read_text("utf-8"))
    store = np.fromfile(folder / "store.u8", dtype=np.uint8).reshape(len(manifest.images), -1)
    store[manifest.query] = store[manifest.search[0]]
    store.tofile(folder / "store.u8")
    header["store"]["sha256"] = sha256_file(folder / "store.u8")
    (folder / "manifest.json").write_text(json.dumps(header), encoding="utf-8")
    profile.verify("--run", "untrained").failed("draw of the images", "data/prepared/digits", "pixels of val/")


def test_without_the_source_that_is_said(clean: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise DataError("ISD_ROOT is not set")

    monkeypatch.setattr("isd_repro.data.sources.open_source", absent)
    answer = clean.verify()
    assert answer.code == 0
    assert answer.tree["checks"]["draw of the images"]["not checked"] == 1
    assert "ISD_ROOT is not set" in answer.tree["checks"]["draw of the images"]["reasons"][0]


# --- lists --------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "file": "".join(f"train/{cls}/{cls}_{at:05d}.png {cls}\n" for cls in range(10) for at in range(4)),
    "classes": "0\n1\n2\n3\n4\n5\n",
}
MINE = {"file": PUBLISHED["file"].replace("_00000", "_00009"), "classes": PUBLISHED["classes"].replace("5", "9")}


@pytest.mark.parametrize(("rule", "key"), [("file", "path"), ("classes", "file")])
def test_a_list_of_ones_own_under_the_name_of_the_rules(
    rule: str, key: str, clean: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images drawn by an edited list, and the parameters put back to the published one."""
    monkeypatch.setenv("ISD_LISTS_ROOT", str(tmp_path))
    path, params = tmp_path / "lt.txt", (clean.folder / "params.yaml").read_text("utf-8")
    true, mine = (hashlib.sha256(one[rule].encode()).hexdigest() for one in (PUBLISHED, MINE))

    def state(text: str, digest: str) -> None:
        path.write_text(text, encoding="utf-8")
        said = f"rule: {{name: {rule}, {key}: lt.txt{digest and f', sha256: {digest}'}}}"
        (clean.folder / "params.yaml").write_text(re.sub(r"rule: .*", said, params), encoding="utf-8")

    state(MINE[rule], mine)
    prepared_as(clean, lambda one: one, render=False)
    state(PUBLISHED[rule], true)
    record = f"{RECORDS}/untrained/pretrain.json"
    assert clean.verify().failed("list of the images", record, "manifest.rule.sha256")["found"] == mine
    state(MINE[rule], "")
    said = clean.verify().tree["checks"]["list of the images"]["reasons"]
    assert said == ["recorded only (digits): the rule states no sha256 of its list lt.txt: any list of this name passes"]
    for file in (*sorted((clean.folder / RECORDS).glob("*/*.json")), clean.folder / "data/prepared/digits/manifest.json"):
        clean.replace(file, mine, true)  # and the hash forged, too
    state(MINE[rule], true)
    said = clean.verify().tree["checks"]["draw of the images"]["reasons"]
    assert "not the file that the rule names" in said[0]
    state(PUBLISHED[rule], true)
    answer = clean.verify()
    assert answer.tree["checks"]["list of the images"]["proved"] == 1
    answer.failed("draw of the images", *{"file": (IMAGES_TSV, "line "), "classes": (record, "manifest.classes")}[rule])


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
    one = clean.verify("--quick").failed("copies among the queries", f"{RECORDS}/untrained/pretrain.json", "manifest.shared")
    assert one["found"] == "30 of 30 queries are copies of training or search images"
    page = (clean.folder / "reports/tiny/tables/index.html").read_text("utf-8")
    assert "30 of 30 queries have the bytes of a training or search image" in page
    count(1)
    assert (
        "counted by the hashes"
        in clean.verify().failed("copies among the queries", f"{RECORDS}/untrained/pretrain.json", "manifest.shared")["expected"]
    )
