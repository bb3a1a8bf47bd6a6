"""One flipped bit or a file cut short, in every kind of artefact: named with exit code 4, or without any effect on a number."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from isd_repro.config import reader as config
from isd_repro.data.manifests import open_prepared
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import _hashed, sha256_file
from isd_repro.train import checkpoint, loop
from isd_repro.train.pretrain import make_plan
from tests.faults import chain, world

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
FLIPS, MANY = 3, 120


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(bytes(content))


def numbers(folder: Path) -> list[Any]:
    """What the tables say, without what stands behind it."""
    cells = json.loads((folder / "reports/tiny/tables/cells.json").read_text("utf-8"))["cells"]
    return [{key: cell[key] for key in ("row", "metric", "encoder", "group", "value", "correct", "n")} for cell in cells]


def result_of(folder: Path, stage: str) -> Any:
    return numbers(folder) if stage == "report" else chain.meaning(chain.files(folder))[chain.OUTPUTS[stage][0]]


def damage(done: Path, name: str, flips: int) -> int:
    """Flip bits one by one; how many of them were refused. The others must have changed no number."""
    stage, path = READERS[name], done / name
    whole, wanted = path.read_bytes(), result_of(done, READERS[name])
    draws = random.Random(name)
    refused = 0
    for bit in [draws.randrange(8 * len(whole)) for _ in range(flips)]:
        flip(path, bit)
        before = chain.files(done)
        result = chain.call(done, *chain.STAGES[stage])
        if result.code == 0:
            assert name not in ALWAYS, f"bit {bit} of {name} was not noticed"
            assert result_of(done, stage) == wanted, f"bit {bit} of {name} changed a number"
        else:
            chain.refused(result, "digits" if name.endswith("manifest.json") else Path(name).name)  # it judges the other files
            assert chain.files(done) == before, "a refusal overwrites nothing"
            refused += 1
        path.write_bytes(whole)
    return refused


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit(name: str, done: Path) -> None:
    assert damage(done, name, FLIPS) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_flipped_bits(name: str, done: Path) -> None:
    assert damage(done, name, MANY) >= MANY // 20


@pytest.mark.parametrize("name", READERS)
def test_a_file_cut_short(name: str, done: Path) -> None:
    path = done / name
    whole = path.read_bytes()
    for length in {0, 1, len(whole) // 2, len(whole) - 2}:  # a record's last byte is a line's end
        path.write_bytes(whole[:length])
        chain.refused(chain.call(done, *chain.STAGES[READERS[name]]), Path(name).name)


@pytest.mark.parametrize("stage", ["pretrain", "extract", "knn", "linear", "evaluate"])
def test_every_reader_of_the_store_sees_a_changed_byte(stage: str, done: Path) -> None:
    """Also one whose file keeps its size and its time of change, as a careless copy leaves it."""
    path = done / "data/prepared/digits/store.u8"
    open_prepared(path.parent, done / ".state/verified")  # it is remembered
    status = path.stat()
    flip(path, 4321)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    evaluate = ("evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--k", "1")
    result = chain.call(done, *(evaluate if stage == "evaluate" else chain.STAGES[stage]))
    chain.refused(result, "store.u8: sha256 is", "the manifest says")


def test_a_large_store_is_hashed_once(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory outlives the process, and holds for the very same file alone."""
    hashed: list[Path] = []
    real = sha256_file

    def count(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(files, "sha256_file", count)
    folder, memory = done / "data/prepared/digits", done / ".state/verified"
    shutil.rmtree(memory, ignore_errors=True)
    for _ in range(2):
        _hashed.cache_clear()
        open_prepared(folder, memory)
    assert hashed == [folder / "store.u8"]
    (remembered,) = memory.iterdir()
    for nonsense in ("", "{", "[]", '{"file": 1}', '{"file": [], "sha256": "0"}', "[" * 100_000):
        remembered.write_text(nonsense, "utf-8")
        _hashed.cache_clear()
        open_prepared(folder, memory)
    assert len(hashed) == 7
    (folder / "store.u8").write_bytes((folder / "store.u8").read_bytes())
    open_prepared(folder, memory)
    assert len(hashed) == 8


def test_a_flipped_encoder_is_seen_by_evaluate(done: Path) -> None:
    path = done / "runs/isd/encoder.safetensors"
    flip(path, 8 * (path.stat().st_size - 100))
    result = chain.call(done, "evaluate", "--ckpt", str(path), "--prepared", str(done / "data/prepared/digits"), "--k", "1")
    chain.refused(result, "encoder.safetensors: damaged")


def test_flipped_rows_of_the_cache_are_computed_again(done: Path) -> None:
    """`evaluate` keeps features; those that are damaged are no help and no harm."""
    ask = ["evaluate", "--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--k", "1"]
    ask += ["--json", "--out", "out.json"]
    assert chain.call(done, *ask).code == 0
    wanted = json.loads((done / "out.json").read_text("utf-8"))["evaluations"]
    files = [path for path in (done / ".state/features").rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.name for path in files} == {"identity.json", "search.npy", "search.shards", "query.npy", "query.shards"}
    draws = random.Random(3)
    for path in files:
        for _ in range(4):
            flip(path, draws.randrange(8 * path.stat().st_size))
            result = chain.call(done, *ask)
            assert result.code == 0, result
            found = json.loads((done / "out.json").read_text("utf-8"))["evaluations"]
            assert [strip(one) for one in found] == [strip(one) for one in wanted], path.name


def strip(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key != "provenance"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Reader:
    """Loads a checkpoint as the stage does."""

    def __init__(self, folder: Path) -> None:
        params, layout = config.load(folder / "params.yaml")
        prepared = open_prepared(layout.prepared("digits"))
        self.plan = make_plan("isd", params.runs["isd"], prepared, layout)
        self.optimizer = loop.optimizer_of(self.plan.method, self.plan.run.optim)

    def load(self, path: Path) -> checkpoint.Progress:
        return checkpoint.load(path, self.plan.fingerprint, self.plan.method, self.optimizer, torch.device("cpu"))


@pytest.fixture
def resume_point(stopped: Path, tmp_path: Path) -> tuple[Reader, bytes, Path]:
    (state,) = world.states(stopped)
    return Reader(stopped), (state / "checkpoint.pt").read_bytes(), tmp_path / "checkpoint.pt"


def test_a_resume_point_cut_at_every_page(resume_point: tuple[Reader, bytes, Path]) -> None:
    reader, whole, path = resume_point
    cuts = [*range(0, len(whole), 4096), len(whole) - 1]
    assert len(cuts) > 30
    for length in cuts:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged checkpoint") as caught:
            reader.load(path)
        assert str(path) in caught.value.message
    path.write_bytes(whole)
    assert reader.load(path).step == 10


def flipped_resume_points(reader: Reader, whole: bytes, path: Path, flips: int) -> int:
    """How many flipped bits were refused; the others are in names and times of the archive, which nothing reads."""
    path.write_bytes(whole)
    progress = reader.load(path)
    wanted = {key: value.clone() for key, value in reader.plan.method.state_dict().items()}
    draws, refused = random.Random(11), 0
    for _ in range(flips):
        path.write_bytes(whole)
        flip(path, draws.randrange(8 * len(whole)))
        found, said = None, ""
        try:
            found = reader.load(path)
        except DataError as error:
            said = error.message
        if found is None:
            assert "damaged checkpoint" in said or "belongs to configuration" in said
            refused += 1
            continue
        assert (found.step, found.curve, found.sources) == (progress.step, progress.curve, progress.sources)
        assert all(torch.equal(value, wanted[key]) for key, value in reader.plan.method.state_dict().items())
    return refused


def test_flipped_bits_of_a_resume_point(resume_point: tuple[Reader, bytes, Path]) -> None:
    assert flipped_resume_points(*resume_point, 60) >= 40


@pytest.mark.slow
def test_many_flipped_bits_of_a_resume_point(resume_point: tuple[Reader, bytes, Path]) -> None:
    assert flipped_resume_points(*resume_point, 4000) >= 3000
