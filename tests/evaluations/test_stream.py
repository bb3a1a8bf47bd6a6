"""Features on disk: equal to those in memory, resumed at the shard after a kill, and reused on an exact match alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isd_repro.evaluations import feature_cache as stream
from isd_repro.evaluations.feature_cache import SHARD
from isd_repro.evaluations.features import BLOCK, features
from isd_repro.runtime.errors import DataError, UserError

CPU = torch.device("cpu")
COUNT = 2 * SHARD + BLOCK + 7
IDENTITY = {"encoder_sha256": "a", "encoder": "student", "manifest": "m", "transform": {"size": 2}, "dtype": "float32"}


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).eval()


def picture(position: Tensor) -> Tensor:
    return (position[:, None] * torch.arange(1, 13)).remainder(17).float().view(-1, 3, 2, 2)


class World:
    """Counts what is computed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[int] = []
        self.kept = 0

    def images(self, position: Tensor) -> Tensor:
        self.asked.append(int(position[0]))
        return picture(position)

    def keep(self, count: int) -> None:
        self.kept += count

    def run(self, identity: dict[str, object] | None = None, nets: dict[str, nn.Module] | None = None) -> Tensor:
        self.asked, self.kept = [], 0
        nets = nets or {"student": network(1)}
        said = {name: {**(identity or IDENTITY), "encoder": name} for name in nets}
        found = stream.stream(self.root, nets, said, {"query": (self.images, COUNT)}, CPU, on_kept=self.keep)
        return found["query"]["student"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def expected() -> Tensor:
    return features({"student": network(1)}, picture, COUNT, CPU)["student"]


def test_equals_features_in_memory_and_is_reused(world: World) -> None:
    first = world.run()
    assert torch.equal(first, expected())
    assert world.asked == list(range(0, COUNT, BLOCK))
    before = stream.digest(world.root, {"student": IDENTITY})
    first[0] = 9  # the mapping is private
    again = world.run()
    assert world.asked == []
    assert world.kept == COUNT
    assert torch.equal(again, expected())
    assert stream.digest(world.root, {"student": IDENTITY}) == before
    assert list(world.root.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    "change",
    [{"encoder_sha256": "b"}, {"manifest": "n"}, {"transform": {"size": 3}}, {"dtype": "float16"}],
    ids=lambda change: next(iter(change)),
)
def test_another_identity_shares_nothing(world: World, change: dict[str, object]) -> None:
    world.run()
    world.run({**IDENTITY, **change})
    assert len(world.asked) == len(range(0, COUNT, BLOCK))


def test_a_folder_that_says_another_identity_is_emptied(world: World) -> None:
    world.run()
    (said,) = world.root.rglob("identity.json")
    said.write_text("{}")
    assert torch.equal(world.run(), expected())
    assert len(world.asked) == len(range(0, COUNT, BLOCK))


def test_a_second_encoder_computes_only_what_it_lacks(world: World) -> None:
    world.run()
    nets = {"student": network(1), "teacher": network(2)}
    calls: list[str] = []
    for name, net in nets.items():
        net.register_forward_hook(lambda *_, name=name: calls.append(name))
    world.run(nets=nets)
    assert set(calls) == {"teacher"}


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    import test_stream
    world = test_stream.World(Path({root!r}))
    def images(position):
        if int(position[0]) >= test_stream.SHARD + test_stream.BLOCK:  # in the middle of the second shard
            os.kill(os.getpid(), signal.SIGKILL)
        return test_stream.picture(position)
    world.images = images
    world.run()
"""


def test_a_killed_extraction_goes_on_at_its_shard(world: World) -> None:
    code = textwrap.dedent(KILLED.format(here=str(Path(__file__).parent), root=str(world.root)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.equal(world.run(), expected())
    assert world.asked == list(range(SHARD, COUNT, BLOCK))
    assert world.kept == SHARD


def test_damaged_rows_and_a_cut_log_are_computed_again(world: World) -> None:
    world.run()
    (path,) = world.root.rglob("query.npy")
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # in the first shard
    path.write_bytes(content)
    (log,) = world.root.rglob("query.shards")
    log.write_bytes(log.read_bytes()[:-20])  # in the last line
    assert torch.equal(world.run(), expected())
    assert world.asked == [*range(0, SHARD, BLOCK), *range(2 * SHARD, COUNT, BLOCK)]
    path.write_bytes(path.read_bytes()[:-100])
    assert torch.equal(world.run(), expected())
    assert len(world.asked) == len(range(0, COUNT, BLOCK))


def test_features_that_are_not_finite_are_refused_and_not_kept(world: World) -> None:
    world.images = lambda position: torch.where(position.view(-1, 1, 1, 1) == SHARD, torch.nan, picture(position))  # type: ignore[method-assign]
    with pytest.raises(DataError, match="'student': 1 of 1024 rows are not finite"):
        world.run()
    del world.images
    assert torch.equal(world.run(), expected())
    assert world.kept == SHARD


def test_two_processes_do_not_write_one_folder(world: World) -> None:
    with stream._folder(world.root, IDENTITY), pytest.raises(UserError, match="these features are already being extracted"):
        world.run()
