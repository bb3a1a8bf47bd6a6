"""Every stage, killed at seeded moments and run again, ends with the files of an undisturbed run and with no other."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data import target_trees
from tests.faults import chain, world
from tests.faults.forks import Blow, Ended, Forks

EXTERNAL = ["--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--which", "both"]
STAGES: dict[str, list[str]] = {  # in the order in which each finds what it needs
    "prepare": ["prepare", "digits"],
    "prepare, external": ["prepare", "packed"],
    "pretrain": ["pretrain", "isd"],
    "extract": ["extract", "isd"],
    "knn": ["knn", "isd"],
    "linear": ["linear", "isd"],
    "evaluate": [
        "evaluate",
        *EXTERNAL,
        "--protocol",
        "all",
        "--linear-epochs",
        "2",
        "--out",
        "reports/tiny/records/other/external.json",
    ],
    "few-label": ["few-label", "isd"],
    "transfer": ["transfer", "isd"],
    "trajectory": ["trajectory", "isd"],
    "figures": ["figures", "isd"],
    "report": ["report"],
}
EXTENDED = world.PARAMS.replace("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}").replace(
    "subsets:\n",
    """\
evaluation:
  knn: {k: [1, 5]}
  linear: {epochs: 4, milestones: [2], protocol: short}
  few_label: {fractions: [0.5, 1.0]}
  transfer: {sets: [cifar10-folder], c_min: 0.01, c_max: 10.0, c_values: 3}
linear_runs: [isd]
few_label_runs: [isd]
transfer_runs: [isd]
trajectory_runs: [isd]
subsets:
  packed:
    source: {name: digits, dataset: MNIST}
    rule: {name: balanced, per_class: 4, seed: 0}
    search_per_class: 2
    query_per_class: 2
    store: {channels: 1, external: true}
""",
)
NORMAL, SLOW = 1, 26  # kills of each stage


@dataclass(frozen=True)
class Station:
    """A stage before and after, undisturbed."""

    name: str
    before: Path
    after: Path
    ended: Ended

    @property
    def words(self) -> list[str]:
        return STAGES[self.name]


def run(forks: Forks, place: Path, words: list[str], blow: Blow | None = None) -> Ended:
    roots = {"ISD_PACK_ROOT": str(place / "packs"), "ISD_CIFAR10_ROOT": str(place / "target")}
    return forks.run(place / "profile", *words, blow=blow, **roots)


def stations(forks: Forks, root: Path) -> dict[str, Station]:
    """All stages in a row."""
    place = root / "start"
    (place / "profile").mkdir(parents=True)
    (place / "packs").mkdir()
    target_trees.folder(target_trees.Tree(place / "target"), pytest.MonkeyPatch())
    (place / "profile" / "params.yaml").write_text(EXTENDED, "utf-8")
    found = {}
    for name, words in STAGES.items():
        after = root / name.replace(", ", "-")
        shutil.copytree(place, after)
        ended = run(forks, after, words)
        assert (ended.code, ended.orphans) == (0, False), f"{name}: {ended}"
        assert world.differences(world.tree(place), world.tree(after)), f"{name} wrote nothing"
        found[name] = Station(name, place, after, ended)
        place = after
    return found


def drawn(draws: random.Random, station: Station) -> Blow:
    """Before or within a file operation twice as often as anywhere in time."""
    if draws.random() < 2 / 3:
        return Blow(at=draws.randint(1, station.ended.operations), torn=draws.random() < 0.5)
    return Blow(after=draws.uniform(0, 0.9 * station.ended.seconds))


def kill_and_repeat(forks: Forks, station: Station, place: Path, seed: str) -> int:
    """One case: one kill, sometimes a second one of the repetition, and then the stage undisturbed; the number of kills."""
    draws = random.Random(seed)
    shutil.copytree(station.before, place)
    want = world.tree(station.after)
    kills = 0
    for turn in range(1 if draws.random() < 2 / 3 else 2):
        blow = drawn(draws, station)
        ended = run(forks, place, station.words, blow)
        about = f"seed {seed!r}, {blow}\n{ended.said}"
        assert ended.code in ((-9,) if blow.at and turn == 0 else (-9, 0)), about  # a repetition may have less to do
        assert not ended.orphans, about
        kills += ended.code == -9
        chain.logs(place / "profile")
        now = {name: content for name, content in whole(place).items() if ".state/" not in name and ".log/" not in name}
        before = world.tree(station.before)
        torn = [name for name, content in now.items() if content not in (want.get(name), before.get(name))]
        assert torn == [], f"half-written under a final name: {torn}; {about}"
    ended = run(forks, place, station.words)
    assert ended.code == 0, f"seed {seed!r}: the repetition failed\n{ended.said}"
    different = world.differences(world.tree(place), want)
    assert different == [], f"seed {seed!r}: differs or is left over: {different}\n{ended.said}"
    shutil.rmtree(place)
    return kills


def whole(place: Path) -> dict[str, object]:
    """Files under final names: what a reader may open."""
    found = {}
    for name, content in ((path, path.read_bytes()) for path in place.rglob("*") if path.is_file()):
        parts = name.relative_to(place).parts
        if not any(part.startswith((".partial", ".lock")) or part.endswith(".partial") for part in parts):
            found[name.relative_to(place).as_posix()] = content
    return {name: world.parsed(Path(name), content) for name, content in found.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_can_be_repeated(forks: Forks, line: dict[str, Station], tmp_path: Path, stage: str) -> None:
    kills = turn = 0
    while kills < NORMAL:
        kills += kill_and_repeat(forks, line[stage], tmp_path / str(turn), f"{stage} {turn}")
        turn += 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_can_be_repeated_many_times(forks: Forks, line: dict[str, Station], tmp_path: Path, stage: str) -> None:
    kills = turn = 0
    while kills < SLOW:
        kills += kill_and_repeat(forks, line[stage], tmp_path / str(turn), f"{stage} slow {turn}")
        turn += 1
