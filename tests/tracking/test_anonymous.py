"""Nothing of who, where and from which repository is in what `--anonymous` sends: looked for in the bytes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from isd_repro.config import reader as config
from isd_repro.report.dashboard import dashboard
from isd_repro.report.publish import Options, publish, replays
from isd_repro.runtime.errors import UserError
from isd_repro.tracking import media
from isd_repro.tracking.anonymous import REMOVED, Scrubber, secrets
from isd_repro.tracking.live_view import wandb_image
from isd_repro.tracking.publisher import Publisher, neutral_folder
from tests.tracking.server import Server

USER, HOST, REPOSITORY, AUTHOR = "jqdoe17", "gpubox-42", "secret-isd", "j.q.doe@example.org"
REMOTE = f"git@example.org:{USER}/{REPOSITORY}.git"
COMMIT = "feedfacefeedfacefeedfacefeedfacefeedface"
OF_WANDB = {  # what W&B itself takes from the environment
    **{f"WANDB_{name}": f"of-{USER}" for name in ("NOTES", "NAME", "TAGS", "RUN_GROUP", "JOB_TYPE", "RUN_ID", "PROJECT")},
    "WANDB_USERNAME": USER,
    "WANDB_EMAIL": AUTHOR,
    "WANDB_HOST": HOST,
    "WANDB_PROGRAM": f"/home/{USER}/train.py",
    "WANDB_GIT_REMOTE_URL": REMOTE,
    "WANDB_GIT_COMMIT": COMMIT,
    "WANDB_ARGS": f'["/home/{USER}"]',
    "WANDB_CONSOLE": "wrap",
    "WANDB_RESUME": "never",
    "WANDB_DISABLE_CODE": "false",
    "WANDB_SAVE_CODE": "true",
}


@pytest.fixture
def known(profile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """A profile in a user's home, in a git checkout with a remote, whose records and notes name all of it."""
    home = tmp_path / "home" / USER
    home.mkdir(parents=True)
    profile.rename(home / "profile")
    folder = home / "profile"
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.setenv("HOME", str(home))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    for name, value in OF_WANDB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: HOST)
    monkeypatch.setattr("socket.getfqdn", lambda *_: f"{HOST}.example.org")
    for git in ("init -q", f"remote add origin {REMOTE}", f"config user.email {AUTHOR}", "config user.name Q.Doe"):
        subprocess.run(["git", *git.split()], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    text = (folder / "params.yaml").read_text("utf-8")
    (folder / "params.yaml").write_text(text.replace("A profile for tests", f"Ask {AUTHOR} on {HOST}"), encoding="utf-8")
    for path in folder.rglob("records/isd/*.json"):
        record = json.loads(path.read_text("utf-8"))
        record["provenance"]["commit"] = COMMIT
        if "notes" in record:
            places = f"{home}/data/imagenet on {HOST} from {REMOTE} and https://example.org/{USER}/{REPOSITORY}"
            record["notes"] = [f"Trained by {USER} under {places}"]
        path.write_text(json.dumps(record), encoding="utf-8")
    words = {"user": USER, "host": HOST, "home": str(home), "cwd": str(folder), "remote": REMOTE, "repository": REPOSITORY}
    return {name: word.encode() for name, word in {**words, "author": AUTHOR, "commit": COMMIT, "folder": str(folder)}.items()}


def found_in(content: bytes, known: dict[str, bytes]) -> set[str]:
    return {name for name, word in known.items() if word in content}


def run_publish(folder: Path, *, anonymous: bool) -> None:
    params, layout = config.load(folder / "params.yaml")
    publish([], params, layout, Options(anonymous=anonymous), Console(quiet=True))


def test_the_bytes_that_a_server_gets(known: dict[str, bytes], online: Server) -> None:
    folder = Path(known["folder"].decode())
    try:
        run_publish(folder, anonymous=True)
    finally:
        shutil.rmtree(neutral_folder(folder), ignore_errors=True)
    content = online.bytes()
    assert len(online.runs) == 7
    assert b"tau_student" in content
    assert {run.project for run in online.runs.values()} == {"isd-repro-anonymous"}
    assert found_in(content, known) == set()
    real = subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True).stdout.strip()  # W&B does not ask Python
    value = (
        rb'[":\s]' + re.escape(real.encode()) + rb'["\\\s]'
    )  # as JSON or YAML has it; a short name stands in any picture's bytes
    assert re.search(value, f'"host":  "{real}"'.encode())
    assert not re.search(value, content)
    assert b"site-packages" not in content
    assert b"pytest" not in content


def test_a_name_that_tells_is_refused_before_anything_is_sent(known: dict[str, bytes], online: Server) -> None:
    folder = Path(known["folder"].decode())
    text = (folder / "params.yaml").read_text("utf-8")
    (folder / "params.yaml").write_text(
        text.replace("subset: digits", f"subset: {USER}").replace("  digits:", f"  {USER}:"), "utf-8"
    )
    for path in folder.rglob("records/isd/*.json"):
        path.write_text(path.read_text("utf-8").replace('"subset": "digits"', f'"subset": "{USER}"'), encoding="utf-8")
    with pytest.raises(UserError, match="reveals who or where you are"):
        run_publish(folder, anonymous=True)
    assert online.runs == {}


def test_a_picture_is_its_pixels(known: dict[str, bytes], tmp_path: Path) -> None:
    """What else its file says, such as who made it, stays here."""
    (picture,) = [media.save(tmp_path, "views", torch.zeros(3, 4, 4, dtype=torch.uint8), f"by {USER}")]
    assert USER.encode() in picture.path.read_bytes()
    sent = Path(wandb_image(picture)._path).read_bytes()
    assert sent.startswith(b"\x89PNG")
    assert USER.encode() not in sent


def test_the_same_search_finds_them_without_the_switch(known: dict[str, bytes], online: Server) -> None:
    """Otherwise the search would prove nothing."""
    params, layout = config.load(Path(known["folder"].decode()) / "params.yaml")
    publisher = Publisher(params.tracking, layout.root)
    for replay in replays(["isd"], params, layout, Options()):
        if replay.run.job_type in {"knn", "report"}:
            publisher.send(replay)
    assert {"commit", "author", "host"} <= found_in(online.bytes(), known)


def test_the_offline_files_and_artifacts(known: dict[str, bytes], wandb_on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `wandb sync` would send, the paths of artifacts that wait for it included; its own logs stay here."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = Path(known["folder"].decode())
    staging = neutral_folder(folder)
    try:
        run_publish(folder, anonymous=True)
        runs = [path for path in (folder / "wandb").glob("offline-run-*/**/*") if path.is_file() and "logs" not in path.parts]
        staged = [path for path in staging.rglob("*") if path.is_file()]
        contents = {path: path.read_bytes() for path in [*runs, *staged]}
    finally:
        shutil.rmtree(staging)
    assert sum(path.suffix == ".wandb" for path in runs) == 7
    assert any(b"student/1-NN" in contents[path] for path in staged)
    assert any(str(staging).encode() in content for content in contents.values())
    for path, content in contents.items():
        assert found_in(content, known) == set(), path


def test_the_dashboard(known: dict[str, bytes], wandb_on: None) -> None:
    folder = Path(known["folder"].decode())
    params, layout = config.load(folder / "params.yaml")
    found = {}
    for anonymous in (False, True):
        path = folder / f"spec-{anonymous}.json"
        dashboard(params, layout, path, anonymous=anonymous, console=Console(quiet=True))
        found[anonymous] = path.read_bytes()
    assert {"author", "host"} <= found_in(found[False], known)
    assert found_in(found[True], known) == set()
    assert REMOVED.encode() in found[True]


def test_words_that_only_look_alike_stay() -> None:
    scrub = Scrubber(["vm", "/home/ada", "Ada Lovelace"])
    assert scrub.text("vm, on vm; the vmap of /home/ada/x/y by ada lovelace") == (
        f"{REMOVED}, on {REMOVED}; the vmap of {REMOVED} by {REMOVED}"
    )
    assert scrub.text("file:///srv/x/y, ../../ada/data/x, git@host:ada/isd.git") == f"{REMOVED} {REMOVED}, {REMOVED}"
    assert scrub.value({"of Ada Lovelace": 1}) == {f"of {REMOVED}": 1}
    kept = "student/1-NN/all, images/nearest-student, 0.98 of 1/2, https://example.org/a/b, a / b, n/a"
    assert scrub.text(kept) == kept
    assert scrub.text("from /mnt/x/data.tar and ~/.netrc/a, mail a.b@c.org") == f"from {REMOVED} and {REMOVED}, mail {REMOVED}"
    assert scrub.value({"commit": "c", "seconds": 1.5, "rule": {"notes": ["vm"]}}) == {
        "seconds": 1.5,
        "rule": {"notes": [REMOVED]},
    }


def test_a_name_that_names_nobody_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOGNAME", "root")
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    monkeypatch.setattr("socket.getfqdn", lambda *_: "localhost")
    assert not {"root", "localhost", ""} & set(secrets(tmp_path))
