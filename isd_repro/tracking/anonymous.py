"""Removes identifying information (persons, machines, repositories) from data that is published with `--anonymous`."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isd_repro.runtime.errors import UserError
from isd_repro.tracking.replay import Artifact, Replay

REMOVED = "[removed]"
DROPPED = frozenset({"commit", "dirty", "written", "command", "host", "hostname", "user", "username", "email", "remote"})  # keys
_NOBODY = frozenset({"admin", "nobody", "root", "runner", "ubuntu", "user"})  # names of accounts that name no one
_PATH = re.compile(r"\bfile:/+[^\s\"']+|(?<![\w/.:>])(?:~?/|(?:\.\./)+)(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Za-z]:\\[^\s\"']+")
_EMAIL = re.compile(r"[\w.+-]+@[\w.-]+:[\w./~+-]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+")  # or a git remote in the form of one
_ACCOUNT = ("USER", "LOGNAME", "USERNAME", "SUDO_USER", "WANDB_USERNAME", "WANDB_EMAIL")


def secrets(root: Path) -> list[str]:
    """Identifying words: host, account, folders, git remotes and git's author."""
    found = {socket.gethostname(), socket.getfqdn(), str(Path.home()), str(Path.cwd()), str(root.resolve())}
    try:
        account = getpass.getuser()
    except (KeyError, OSError):
        account = ""
    found |= {account, *(os.environ.get(name, "") for name in _ACCOUNT)} - _NOBODY
    command = ["git", "config", "--get-regexp", r"^(remote\..*url|user\.(name|email))$"]
    try:
        lines = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    for key, _, value in (line.partition(" ") for line in lines):
        found.add(value)
        if key.startswith("remote."):
            found.add("/".join(re.split("[/:]", value.removesuffix(".git"))[-2:]))
    trivial = {"", "/", "localhost", "localhost.localdomain", os.sep}
    return sorted(found - trivial, key=lambda word: (-len(word), word))


class Scrubber:
    """Removes identifying words, and anything that looks like a path or an address, from text and from nested values."""

    def __init__(self, words: Sequence[str]) -> None:
        parts = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in words]
        self._known = re.compile("|".join(parts), re.IGNORECASE) if parts else None

    def text(self, text: str) -> str:
        """The text without identifying words."""
        text = _PATH.sub(REMOVED, _EMAIL.sub(REMOVED, text))
        return text if self._known is None else self._known.sub(REMOVED, text)

    def value(self, value: Any) -> Any:
        """A JSON-like value without identifying words; keys that only identify a person, place or time are dropped."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(each) for key, each in value.items() if key not in DROPPED}
        if isinstance(value, list | tuple):
            return [self.value(each) for each in value]
        return value

    def artifact(self, one: Artifact) -> Artifact:
        """An artifact without identifying words."""
        texts = {}
        for name, content in one.texts.items():
            tree = self.value(json.loads(content)) if name.endswith(".json") else None
            kept = self.text(content.decode()) if tree is None else json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False)
            texts[name] = kept.encode()
        return replace(one, texts=texts, metadata=self.value(one.metadata))

    def replay(self, replay: Replay) -> Replay:
        """A stage without identifying words, also in captions of pictures; of picture files W&B gets only the pixels.

        Raises:
            UserError: the name of the profile, a run or a subset contains one of the words; names cannot be changed, because runs
                are found by them.
        """
        run = replay.run
        for name in [run.title, run.group, *run.tags, *(one.name for one in (*replay.needs, *replay.makes))]:
            if self.text(name) != name:
                hint = "rename it in params.yaml, or publish from another account and machine"
                raise UserError(f"{run.title}: the name {name!r} reveals who or where you are", hint)
        return replace(
            replay,
            run=replace(run, config=self.value(run.config)),
            rows=self.value(replay.rows),
            summary=self.value(replay.summary),
            tables={key: (self.value(columns), self.value(rows)) for key, (columns, rows) in replay.tables.items()},
            pictures=[replace(picture, caption=self.text(picture.caption)) for picture in replay.pictures],
            needs=[self.artifact(one) for one in replay.needs],
            makes=[self.artifact(one) for one in replay.makes],
        )
