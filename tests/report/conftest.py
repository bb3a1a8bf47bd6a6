"""A profile in the demo's shape: an unbalanced subset, two references, three methods of which one has not been run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.report import page, run_records
from tests.report import synthetic

ODD = "BYOL | 50 % & <b>_x_</b>"
ACCURACY = {"untrained": 0.46, "pixels": 0.76, "moco": 0.81, "isd": 0.70}


@dataclass(frozen=True)
class Profile:
    params: Params
    layout: Layout

    def records(self) -> run_records.Records:
        return run_records.load(self.params, self.layout)

    def report(self) -> page.Report:
        return page.assemble(self.params, self.records(), self.layout)

    def files(self) -> dict[str, str]:
        return {name: content.decode() for name, content in page.render(self.report()).items()}


def make(root: Path) -> Profile:
    labels = {
        "untrained": "Untrained",
        "pixels": "Raw pixels",
        "moco": "MoCo v2",
        "isd": "ISD",
        "byol": ODD,
    }
    params = synthetic.profile(
        {run: (label, "small") for run, label in labels.items()},
        {"small": {"name": "unbalanced", "large": 2, "rare_images": 30}},
        {"moco": "moco", "byol": "byol"},
        reference="untrained",
        pixels="pixels",
        notes=["No number here is comparable with the paper."],
    )
    layout = synthetic.layout(root, params)
    for at, (run, accuracy) in enumerate(ACCURACY.items()):
        encoders: tuple[synthetic.Encoder, ...] = ("student", "teacher") if run in ("moco", "isd") else ("student",)
        synthetic.write_run(layout, params, run, accuracy, encoders=encoders, seed=100 * at)
    return Profile(params, layout)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return make(tmp_path)
