"""A profile of three runs of seconds, whole from images to page, and ways to tamper with it as carefully as a cheat would."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from isd_repro import cli
from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.records import pack_labels, unpack_labels

RECORDS = "reports/tiny/records"
PARAMS = """\
profile: tiny
root: .
report: {title: Tiny, caption: A profile for tests, reference: untrained}
efficiency: {log_every: 2, checkpoint_every: 1}
tracking: {wandb: "off"}
evaluation:
  knn: {k: [1, 5]}
  linear: {protocol: short, epochs: 3, batch_size: 10, milestones: [2], flip: 0.0}
subsets:
  digits:
    source: {name: digits, dataset: MNIST}
    rule: {name: unbalanced, large: 2, rare_images: 5, seed: 0}
    search_per_class: 4
    query_per_class: 3
    store: {channels: 1}
linear_runs: [isd]
runs:
  untrained:
    label: Untrained
    notes: [DEV-07]
    backbone: &narrow {arch: resnet-narrow, width: 4, channels: 1}
    method: {name: supervised}
    optim: {epochs: 0, batch_size: 32, lr: 0.05, schedule: {name: cosine}}
    data: &data
      subset: digits
      image_size: 20
      crop_ratio: 1.0
      mean: [0.13]
      std: [0.31]
      view_student: {crop_min: 0.4, flip: 0.0}
      view_teacher: {crop_min: 0.4, flip: 0.0}
  moco:
    label: MoCo v2
    notes: [DEV-07]
    backbone: *narrow
    method: {name: moco, tau: 0.2, momentum: 0.9, bank_size: 64, dim: 8}
    optim: &optim {epochs: 1, batch_size: 32, lr: 0.05, schedule: {name: cosine}}
    data: *data
  isd:
    label: ISD
    notes: [DEV-01, DEV-07]
    backbone: *narrow
    method: {name: isd, tau_student: 0.1, tau_teacher: 0.02, momentum: 0.9, bank_size: 64, bank_init: unit, heads: none}
    optim: *optim
    data: *data
"""


PROTOCOLS = (  # with every protocol: dense queries, few labels, another data set, snapshots
    PARAMS.replace("checkpoint_every: 1}", "checkpoint_every: 1, snapshot_every: 1}")
    .replace("{epochs: 1, batch_size", "{epochs: 3, batch_size")
    .replace(
        "  linear: {protocol",
        "  knn_dense: {k: [1, 5]}\n"
        "  few_label: {fractions: [0.25, 0.5], seed: 3}\n"
        "  transfer: {sets: [cifar10-folder], c_min: 0.01, c_max: 100.0, c_values: 5}\n"
        "  linear: {protocol",
    )
    .replace(
        "linear_runs: [isd]",
        "linear_runs: [isd]\nknn_dense_runs: [isd]\nfew_label_runs: [isd]\ntransfer_runs: [moco, isd]\ntrajectory_runs: [isd]",
    )
)
NAMES = ("bird", "cat", "dog")
SIDE = 24


def write_target(root: Path) -> None:
    """Stripes of a direction for each class under noise, grey, PNG so that pixels are exact."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 8)):
        for label, cls in enumerate(NAMES):
            (root / part / cls).mkdir(parents=True)
            for number in range(count):
                pattern = np.indices((SIDE, SIDE))[label % 2] * (1 + label // 2) % 2 * 60.0
                pixels = (pattern + draw.normal(90, 60, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / cls / f"{number:02d}.png")


@dataclass(frozen=True)
class Answer:
    """What one call of `verify --json` said."""

    code: int
    tree: dict[str, Any]
    err: str

    @property
    def failures(self) -> list[tuple[str, str]]:
        """(file, key) of everything that failed."""
        return [(one["file"], one["key"]) for one in self.tree["failures"]]

    def verdicts(self, **wanted: Any) -> set[str]:
        """Verdicts of the numbers whose fields are as given; `run` is one of its runs."""
        run = wanted.pop("run", None)
        chosen = [
            number
            for number in self.tree["numbers"]
            if (run is None or run in number["runs"]) and all(number[key] == value for key, value in wanted.items())
        ]
        assert chosen, f"no number has {wanted} of {run}"
        return {number["verdict"] for number in chosen}

    def caught(self, file: str, key: str, hint: str = "") -> dict[str, Any]:
        """The failure of this file and key: exit code 4, every field filled, and found is not expected."""
        assert (self.code, self.tree["ok"]) == (4, False), self.tree
        found = [one for one in self.tree["failures"] if (one["file"], one["key"]) == (file, key)]
        assert len(found) == 1, self.failures
        one: dict[str, Any] = found[0]
        assert all(one[field] for field in ("found", "expected", "do"))
        assert one["found"] != one["expected"]
        assert hint in one["do"]
        return one

    def failed(self, check: str, file: str, key: str) -> dict[str, Any]:
        """The check failed for that file and a key that begins so."""
        assert self.tree["checks"][check]["failed"] >= 1
        keys = [found for where, found in self.failures if where == file and found.startswith(key)]
        assert keys, self.failures
        return self.caught(file, keys[0])


@dataclass(frozen=True)
class Profile:
    folder: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def layout(self) -> Layout:
        return config.load(self.folder / "params.yaml")[1]

    def command(self, *arguments: str) -> tuple[int, str, str]:
        """A command in this process: exit code, standard output and standard error."""
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["isd-repro", *arguments])
            with pytest.raises(SystemExit) as end:
                cli.main()
        code = end.value.code or 0
        assert isinstance(code, int)
        out, err = self.capsys.readouterr()
        return code, out, err

    def verify(self, *arguments: str) -> Answer:
        code, out, err = self.command("verify", "--json", *arguments)
        return Answer(code, json.loads(out), err)

    def report(self) -> None:
        assert self.command("report")[0] == 0

    def record(self, run: str, part: str) -> Path:
        return self.folder / RECORDS / run / f"{part}.json"

    def edit(self, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON file as a careful forger does: the rest stays as it was written."""
        tree = json.loads(path.read_text("utf-8"))
        change(tree)
        path.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def replace(self, path: Path, old: str, new: str) -> None:
        text = path.read_text("utf-8")
        assert text.count(old) >= 1, f"{old!r} is not in {path}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")


def swap_wrong(tree: dict[str, Any], key: str) -> int:
    """Change one wrong prediction into another wrong one, which changes no score; its position."""
    predicted, label = unpack_labels(tree["predictions"][key]), unpack_labels(tree["labels"])
    at = int(np.flatnonzero(predicted != label)[0])
    predicted[at] = next(other for other in range(10) if other not in (int(predicted[at]), int(label[at])))
    tree["predictions"][key] = pack_labels(predicted)
    return at


def write_lock(profile: Profile, *, without: str = "") -> Path:
    """A lock that names every record as it is now, and the pipeline's file beside it; `without` leaves one hash out."""
    stages = []
    for path in sorted((profile.folder / RECORDS).glob("*/*.json")):
        name = path.relative_to(profile.folder).as_posix()
        md5 = f"      md5: {hashlib.md5(path.read_bytes()).hexdigest()}\n" if name != without else ""
        out = f"    - path: {name}\n      hash: md5\n{md5}"
        stages.append(f"  {path.stem}@{path.parent.name}:\n    cmd: isd-repro {path.stem} {path.parent.name}\n    outs:\n{out}")
    (profile.folder / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    lock = profile.folder / "dvc.lock"
    lock.write_text(f"schema: '2.0'\nstages:\n{''.join(stages)}", encoding="utf-8")
    return lock


def forge(profile: Profile, run: str, part: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change one record and everything that follows from it: its fingerprint, the lock, the rendered report."""

    def whole(tree: dict[str, Any]) -> None:
        change(tree)
        if "fingerprint" in tree:
            tree["fingerprint"] = config.fingerprint(tree["config"])

    profile.edit(profile.record(run, part), whole)
    write_lock(profile)
    profile.report()
