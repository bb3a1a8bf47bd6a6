"""Every stage, killed, signalled and run again, ends with the files of an undisturbed run and with no other."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data import target_trees
from tests.faults import chain, forks, world
from tests.faults.forks import Blow, Ended

CKPT = ["--ckpt", "runs/isd/encoder.safetensors", "--prepared", "data/prepared/digits", "--which", "both"]
OUT = "reports/tiny/records/other/external.json"
STAGES: dict[str, list[str]] = {  # in the order in which each finds what it needs
    "prepare": ["prepare", "digits"],
    "prepare, external": ["prepare", "packed"],
    "pretrain": ["pretrain", "isd"],
    "extract": ["extract", "isd"],
    "knn": ["knn", "isd"],
    "linear": ["linear", "isd"],
    "evaluate": ["evaluate", *CKPT, "--protocol", "all", "--linear-epochs", "2", "--out", OUT],
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


@dataclass(frozen=True)
class Station:
    """A stage before and after, undisturbed."""

    name: str
    before: Path
    after: Path
    ended: Ended


def run(place: Path, stage: str, blow: Blow = Blow()) -> Ended:  # noqa: B008 - it is frozen
    packs, target = str(place / "packs"), str(place / "target")
    return forks.run(place / "profile", *STAGES[stage], blow=blow, ISD_PACK_ROOT=packs, ISD_CIFAR10_ROOT=target)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Station]:
    """All stages in a row."""
    root = tmp_path_factory.mktemp("line")
    place = root / "start"
    (place / "profile").mkdir(parents=True)
    (place / "packs").mkdir()
    target_trees.folder(target_trees.Tree(place / "target"), pytest.MonkeyPatch())
    (place / "profile" / "params.yaml").write_text(EXTENDED, "utf-8")
    found = {}
    for name in STAGES:
        after = root / name.replace(", ", "-")
        shutil.copytree(place, after)
        ended = run(after, name)
        assert ended.code == 0, f"{name}: {ended}"
        assert world.differences(world.tree(place), world.tree(after)), f"{name} wrote nothing"
        found[name] = Station(name, place, after, ended)
        place = after
    return found


def moment(draws: random.Random, station: Station, number: int) -> Blow:
    """Before or within a file operation twice as often as anywhere in time."""
    if draws.random() < 2 / 3:
        return Blow(at=draws.randint(1, station.ended.operations), torn=draws.random() < 0.5, number=number)
    return Blow(after=draws.uniform(0, 0.9 * station.ended.seconds), number=number)


def disturb_and_repeat(station: Station, place: Path, seed: str) -> set[int]:
    """One case: a kill, a signal to the repetition, and then the stage undisturbed; the codes of the first two."""
    draws, codes = random.Random(seed), set()
    shutil.copytree(station.before, place)
    before, want = world.tree(station.before), world.tree(station.after)
    for numbers in ([signal.SIGKILL], [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]):
        blow = moment(draws, station, draws.choice(numbers))
        ended = run(place, station.name, blow)
        about = f"seed {seed!r}, {blow}\n{ended.said}"
        # Before the command's handlers are there, a signal ends the process itself; before `evaluate` has begun with features
        # there is nothing to go on with; and a repetition may have less to do.
        resumed = {"pretrain": {75}, "evaluate": {75, 130}}.get(station.name, {130})
        unbegun = ended.code in {1, 130} and not ended.operations and not ended.said  # 1: Ctrl-C in the fork server's own code
        assert unbegun or ended.code in {0, -blow.number, *resumed}, about
        assert "Traceback" not in ended.said, about
        codes.add(ended.code)
        chain.logs(place / "profile")
        torn = [name for name, content in finished(place).items() if content not in (want.get(name), before.get(name))]
        assert torn == [], f"half-written under a final name: {torn}; {about}"
    ended = run(place, station.name)
    assert ended.code == 0, f"seed {seed!r}: the repetition failed\n{ended.said}"
    different = world.differences(world.tree(place), want)
    assert different == [], f"seed {seed!r}: differs or is left over: {different}\n{ended.said}"
    shutil.rmtree(place)
    return codes


def finished(place: Path) -> dict[str, object]:
    """Files under final names: what a reader may open. State and logs are read by those who know that they may be torn."""
    return {
        name: content
        for name, content in world.tree(place).items()
        if not any(part in name for part in (".partial", ".lock", ".state/", ".log/")) and not name.endswith("/")
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_disturbed_stage_can_be_repeated(line: dict[str, Station], tmp_path: Path, stage: str) -> None:
    assert disturb_and_repeat(line[stage], tmp_path / "place", stage) != {0}, "nothing came in time"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_can_be_disturbed_at_any_moment(line: dict[str, Station], tmp_path: Path, stage: str) -> None:
    found = [disturb_and_repeat(line[stage], tmp_path / str(turn), f"{stage} slow {turn}") for turn in range(4)]
    assert sum(-9 in codes for codes in found) >= 2
