"""One flipped bit or a file cut short, in every kind of artefact: named with exit code 4, or without any effect on a number."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from isd_repro.data.manifests import open_prepared
from isd_repro.runtime import files
from isd_repro.runtime.files import _hashed, sha256_file
from tests.faults import chain
from tests.faults.test_resume import flipped

READERS = {  # artefact -> the first stage that reads it
    "data/prepared/digits/store.u8": "extract",
    "data/prepared/digits/store.npy": "extract",
    "data/prepared/digits/manifest.json": "extract",
    "data/prepared/digits/images.tsv": "extract",
    "runs/isd/encoder.safetensors": "extract",
    "runs/isd/features.safetensors": "knn",
    "reports/tiny/records/isd/pretrain.json": "report",
    "reports/tiny/records/isd/knn.json": "report",
    "reports/tiny/records/isd/linear.json": "report",
}
ALWAYS = {name for name in READERS if name.rsplit(".", 1)[1] in {"u8", "npy", "tsv"} or "features" in name}


def numbers(folder: Path, stage: str) -> Any:
    """What a stage says, of a report without what stands behind it."""
    if stage != "report":
        return chain.files(folder)[chain.OUTPUTS[stage][0]]
    cells = json.loads((folder / "reports/tiny/tables/cells.json").read_text("utf-8"))["cells"]
    return [{key: cell[key] for key in ("row", "metric", "encoder", "group", "value", "correct", "n")} for cell in cells]


def damage(done: Path, name: str, flips: int) -> int:
    """Flip bits one by one, and cut the file short; how many flips were refused. The others must have changed no number."""
    stage, path = READERS[name], done / name
    whole, wanted = path.read_bytes(), numbers(done, stage)
    draws, refused = random.Random(name), 0
    bits = [flipped(whole, draws.randrange(8 * len(whole))) for _ in range(flips)]
    for content in [*bits, b"", whole[: len(whole) // 2], whole[:-2]]:  # a record's last byte is a line's end
        path.write_bytes(content)
        before = chain.files(done)
        result = chain.call(done, *chain.STAGES[stage])
        if result.code == 0:
            assert name not in ALWAYS, f"a change of {name} was not noticed"
            assert len(content) == len(whole), f"{len(content)} bytes of {name} were taken for all"
            assert numbers(done, stage) == wanted, f"a change of {name} changed a number"
        else:
            chain.refused(result, "digits" if name.endswith("manifest.json") else path.name)  # it judges the other files
            assert chain.files(done) == before, "a refusal overwrites nothing"
            refused += len(content) == len(whole)
    return refused


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file(name: str, done: Path) -> None:
    assert damage(done, name, 3) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_flipped_bits(name: str, done: Path) -> None:
    assert damage(done, name, 60) >= 3


@pytest.mark.parametrize("stage", ["pretrain", "extract", "knn", "linear", "evaluate"])
def test_every_reader_of_the_store_sees_a_changed_byte(stage: str, done: Path) -> None:
    """Also one whose file keeps its size and its time of change, as a careless copy leaves it."""
    path = done / "data/prepared/digits/store.u8"
    open_prepared(path.parent, done / ".state/verified")  # it is remembered
    status = path.stat()
    path.write_bytes(flipped(path.read_bytes(), 4321))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    result = chain.call(done, *(chain.EVALUATE if stage == "evaluate" else chain.STAGES[stage]))
    chain.refused(result, "store.u8: sha256 is", "the manifest says")


def test_a_large_store_is_hashed_once(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory outlives the process, and holds for the very same file alone."""
    hashed: list[Path] = []

    def count(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    def opened() -> int:
        _hashed.cache_clear()
        open_prepared(folder, memory)
        return len(hashed)

    monkeypatch.setattr(files, "sha256_file", count)
    folder, memory = done / "data/prepared/digits", done / ".state/verified"
    shutil.rmtree(memory, ignore_errors=True)
    assert [opened(), opened()] == [1, 1]
    (remembered,) = memory.iterdir()
    for at, nonsense in enumerate(("", "[]", '{"file": [], "sha256": "0"}', "[" * 100_000), 2):
        remembered.write_text(nonsense, "utf-8")
        assert opened() == at
    (folder / "store.u8").write_bytes((folder / "store.u8").read_bytes())
    assert opened() == 6


def test_flipped_bits_of_an_encoder_and_of_kept_features_are_seen_by_evaluate(done: Path) -> None:
    """`evaluate` keeps features; those that are damaged are computed again."""
    ask = [*chain.EVALUATE, "--json", "--out", "out.json"]

    def found() -> list[dict[str, Any]]:
        result = chain.call(done, *ask)
        assert result.code == 0, result
        evaluations = json.loads((done / "out.json").read_text("utf-8"))["evaluations"]
        return [{key: value for key, value in one.items() if key != "provenance"} for one in evaluations]

    wanted = found()
    kept = [path for path in (done / ".state/features").rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.name for path in kept} == {"identity.json", "search.npy", "search.shards", "query.npy", "query.shards"}
    draws = random.Random(3)
    for path in kept:
        path.write_bytes(flipped(path.read_bytes(), draws.randrange(8 * path.stat().st_size)))
        assert found() == wanted, path.name
    path = done / "runs/isd/encoder.safetensors"
    path.write_bytes(flipped(path.read_bytes(), 8 * (path.stat().st_size - 100)))
    chain.refused(chain.call(done, *ask), "encoder.safetensors: damaged")
