"""What DVC knows of finished work: a lock that a stop tore, and an empty workspace.

DVC and `dvc.yaml` are the real ones. The stages are played by a script that copies the lock as every stage does and writes files
of the right names at once.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import threading
from pathlib import Path

import pytest

from isd_repro.runtime import dvc_lock
from isd_repro.runtime.dvc_lock import DvcLock
from isd_repro.runtime.errors import UserError
from tests.faults import world
from tests.pipeline import test_repro
from tests.pipeline.test_repro import CARRIED, ROOT, ran

LISTS = [f"{name}_runs" for name in ("linear", "knn_dense", "few_label", "transfer", "trajectory")]
PLAYED = """\
#!{python}
import os, sys
from pathlib import Path
stage, *names = sys.argv[1:]
if stage == "rescue":
    from isd_repro.cli import main
    main()
if "KEEP" in os.environ:
    from isd_repro.cli import _profile
    _profile(Path("params.yaml"))
records = Path("reports/tiny/records", *names)
files = {{
    "prepare": [Path("data/prepared", *names, "manifest.json")],
    "pretrain": [Path("runs", *names, name) for name in ("encoder.safetensors", "metrics.jsonl", "snapshots/epoch-1")],
    "extract": [Path("runs", *names, "features.safetensors")],
    "report": [Path("reports/tiny", name) for name in ("cards/README.md", "tables/table.md", "plots/scores.csv", "metrics.json")],
}}.get(stage, [])
for path in [*files, *([records / f"{{stage.replace('-', '_')}}.json"] if stage not in ("prepare", "extract", "report") else [])]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{stage}} {{names}}")
with Path("../played").open("a") as log:
    log.write(f"{{stage}}\\n")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one subset and one run, every stage played; `isd-repro` on the path plays them."""
    folder, programs = tmp_path / "project", tmp_path / "programs"
    for name in CARRIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    lists = "".join(f"{name}: []\n" for name in LISTS)
    text = world.PARAMS + f"evaluation: {{knn: {{k: [1, 3]}}, linear: {{}}, transfer: {{}}}}\n{lists}"
    (folder / "params.yaml").write_text(text, "utf-8")
    programs.mkdir()
    (programs / "isd-repro").write_text(PLAYED.format(python=sys.executable), "utf-8")
    (programs / "isd-repro").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("DVC_ROOT", raising=False)
    call(folder, "git", "init", "--quiet")
    call(folder, "dvc", "repro")
    call(folder, "git", "add", ".")
    call(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "done")
    return folder


def call(folder: Path, *command: str, **env: str) -> str:
    """A command's output, with the played stages first on the path."""
    return test_repro.shell(folder, *command, env={"PATH": os.environ["PATH"], **env})


# --- a lock that a stop tore ----------------------------------------------------------------------------------------------

TORN = {"empty": 0.0, "cut off": 0.6, "gone": None}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TORN)
def test_a_lock_that_dvc_tore_is_restored_and_nothing_is_trained(kind: str, project: Path) -> None:
    lock = project / "dvc.lock"
    world.edit(project, ("tau_student: 0.1", "tau_student: 0.2"))
    assert ran(call(project, "dvc", "repro", "pretrain", KEEP="1")) == {"pretrain@isd"}
    whole = lock.read_bytes()
    if (share := TORN[kind]) is None:
        lock.unlink()
    else:
        lock.write_bytes(whole[: int(share * len(whole))])
    said = call(project, "isd-repro", "rescue")
    assert "restored as it was when pretrain@isd started" in said
    assert "pretrain@isd: had finished" in said
    assert lock.read_bytes() == whole
    assert ran(call(project, "dvc", "repro", "pretrain")) == set()
    assert "nothing to restore" in call(project, "isd-repro", "rescue")


@pytest.mark.slow
def test_a_stage_that_had_not_finished_or_ran_with_other_parameters_is_not_taken_over(project: Path) -> None:
    lock = project / "dvc.lock"
    world.edit(project, ("tau_student: 0.1", "tau_student: 0.2"))
    call(project, "dvc", "repro", "pretrain", KEEP="1")
    lock.write_bytes(b"")
    world.edit(project, ("tau_student: 0.2", "tau_student: 0.3"))
    assert "was started with other parameters or code" in call(project, "isd-repro", "rescue")
    lock.write_bytes(b"")
    world.edit(project, ("tau_student: 0.3", "tau_student: 0.2"))
    (project / "runs/isd/encoder.safetensors").unlink()
    assert "had not finished" in call(project, "isd-repro", "rescue")
    assert ran(call(project, "dvc", "repro", "pretrain")) == {"pretrain@isd"}


def lock_in(folder: Path, *known: str) -> DvcLock:
    return DvcLock(folder / "dvc.lock", folder / "copy.lock", "these", known)


def lock_of(*stages: str) -> str:
    return "schema: '2.0'\nstages:\n" + "".join(f"  {stage}:\n    cmd: x\n    deps:\n    - path: y\n" for stage in stages)


def test_a_lock_that_another_dvc_is_writing_is_waited_for(tmp_path: Path) -> None:
    """Two runs are trained side by side, and each DVC writes the lock in place when its own has finished."""
    lock, whole = lock_in(tmp_path, "a", "b"), lock_of("pretrain@a", "pretrain@b")
    lock.path.write_text(whole, "utf-8")
    lock.keep("knn@a")
    lock.path.write_text("", "utf-8")
    writer = threading.Timer(0.3, lock.path.write_text, (whole, "utf-8"))
    writer.start()
    lock.keep("knn@b")
    writer.join()
    assert lock.copy.read_text("utf-8").endswith(whole)


def test_a_stage_does_not_start_with_a_lock_that_has_lost_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off where the rest is still a lock: DVC takes the other stages for new."""
    monkeypatch.setattr(dvc_lock, "PATIENCE", 0.1)
    lock = lock_in(tmp_path, "a", "b")
    lock.path.write_text(lock_of("prepare@d", "pretrain@a", "pretrain@b"), "utf-8")
    lock.keep("pretrain@c")
    kept = lock.copy.read_bytes()
    lock.path.write_text(lock_of("prepare@d", "pretrain@a"), "utf-8")
    with pytest.raises(UserError, match="has lost 1 stages that it had, such as pretrain@b") as caught:
        lock.keep("pretrain@b")
    assert "`isd-repro rescue`" in caught.value.hint
    lock.path.write_text(lock_of("prepare@d", "pretrain@a", "pretrain@b").removesuffix("y\n"), "utf-8")
    with pytest.raises(UserError, match="is cut off"):
        lock.keep("pretrain@b")
    assert lock.copy.read_bytes() == kept
    lock.path.write_text(lock_of("prepare@d", "pretrain@a"), "utf-8")
    lock_in(tmp_path, "a").keep("pretrain@b")  # that run is gone from the parameters
    assert lock.copy.read_bytes() != kept


def test_a_copy_that_cannot_be_written_stops_no_stage(tmp_path: Path) -> None:
    (tmp_path / "copy.lock").mkdir()
    lock_in(tmp_path).keep("knn@a")


def test_a_damaged_lock_without_a_copy_is_said(tmp_path: Path) -> None:
    lock = lock_in(tmp_path)
    said: list[str] = []
    lock.rescue(said.append)
    assert said == [f"{lock.path}: nothing to restore"]
    lock.path.write_bytes(b"")
    lock.copy.write_bytes(b"torn as well")
    with pytest.raises(UserError, match="is empty or cut off, and no stage has left a copy"):
        lock.rescue(said.append)


# --- an empty workspace ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_cache_fills_an_empty_workspace(project: Path) -> None:
    """As the README says. Without `--pull` DVC would train: the records are in git, and it restores no stage in part."""
    for name in ("data", "runs"):
        shutil.rmtree(project / name)
    assert ran(call(project, "dvc", "repro", "--pull")) == set()
    assert (project / "runs/isd/encoder.safetensors").is_file()
    assert (project / "data/prepared/digits/manifest.json").is_file()
    assert ran(call(project, "dvc", "repro")) == set()


@pytest.mark.slow
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with other profiles"])
def test_make_demo_works_without_a_git_repository(others: bool, project: Path) -> None:
    """As from an archive of the sources; other profiles are hidden from DVC, which would fail on this one, while it runs."""
    shutil.rmtree(project / ".git")
    shutil.rmtree(project / ".dvc/cache")
    for name in ("data", "runs"):
        shutil.rmtree(project / name)
    shutil.copy(ROOT / "Makefile", project)
    programs = project.parent / "programs"
    (programs / "dvc").symlink_to(Path(sys.executable).parent / "dvc")
    broken = project / "pipelines" / "other" / "dvc.yaml"
    if others:
        broken.parent.mkdir(parents=True)
        broken.write_text("stages: [")
    said = call(project, "make", "--old-file=venv", "demo", f"BIN={programs}")
    assert "pretrain@isd" in ran(said)
    assert (project / "runs/isd/encoder.safetensors").is_file()
    assert not (project / "pipelines" / ".dvcignore").exists()
