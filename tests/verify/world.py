"""A profile of three runs of seconds, whole from images to page, and ways to tamper with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from isd_repro import cli
from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.records import pack_labels, unpack_labels

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
        return self.folder / "reports" / "tiny" / "records" / run / f"{part}.json"

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
    at = int((predicted != label).nonzero()[0])
    predicted[at] = next(other for other in range(10) if other not in (int(predicted[at]), int(label[at])))
    tree["predictions"][key] = pack_labels(predicted)
    return at
