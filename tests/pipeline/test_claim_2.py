"""The profiles of the claim's second protocol are those that its script writes, and its runs differ as the protocol says."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from isd_repro.config import params, reader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "reports" / "claim-2" / "make_profiles.py"
    spec = importlib.util.spec_from_file_location("make_profiles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_profiles_are_those_of_the_script(script: ModuleType) -> None:
    for path, text in script.texts().items():
        assert path.read_text("utf-8") == text, f"{path}: run python reports/claim-2/make_profiles.py"


def test_the_design_pairs_settings_evenly(script: ModuleType) -> None:
    points = script.points()
    pairs = [("view_teacher", "bank_over_images"), ("view_teacher", "dim"), ("weight_decay", "bank_over_images")]
    for one, other in pairs:
        assert set(Counter((point[one], point[other]) for point in points).values()) == {2}
    assert len({point["momentum"] for point in points}) == 5


def runs_of(profile: str) -> dict[str, params.Run]:
    return reader.load(ROOT / "pipelines" / profile / "params.yaml")[0].runs


def test_cells_of_a_point_differ_in_loss_and_heads_alone() -> None:
    runs = runs_of("claim-2-tuning")
    for point in range(1, 13):
        isd, soft, hard, moco = (runs[f"{cell}-{point:02d}"] for cell in ("isd", "soft", "hard", "moco"))
        for one, other in itertools.combinations((isd, soft, hard, moco), 2):
            assert (one.backbone, one.optim, one.data, one.numerics) == (other.backbone, other.optim, other.data, other.numerics)
        assert isd.method.options | {"heads": "moco"} == soft.method.options
        assert hard.method.options | {"heads": "moco"} == moco.method.options
        assert isd.method.options["tau_student"] == moco.method.options["tau"]
        for key in ("dim", "momentum", "bank_size"):
            assert isd.method.options[key] == moco.method.options[key]


def test_runs_of_a_pair_differ_in_what_is_compared_alone() -> None:
    runs = runs_of("claim-2-gate")

    def fields(name: str) -> dict[str, object]:
        return runs[name].model_dump(exclude={"label"})

    for name in ("moco-unbalanced-9", "isd-unbalanced-9", "moco-balanced-10"):
        half, full = fields(name), fields(f"{name}-float32")
        assert half["numerics"] | {"precision": "float32"} == full["numerics"]  # type: ignore[operator]
        assert {**half, "numerics": None} == {**full, "numerics": None}
    for number, again in itertools.product((9, 10), ("", "-again")):
        cut, even = fields(f"moco-unbalanced-{number}{again}"), fields(f"moco-balanced-{number}{again}")
        assert cut["data"] | {"subset": f"s{number}-balanced"} == even["data"]  # type: ignore[operator]
        assert {**cut, "data": None} == {**even, "data": None}
