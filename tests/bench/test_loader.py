"""The comparison itself: what it checks and reports. No time is asserted."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import __main__ as commands
from benchmarks import loader
from benchmarks.loader import Arm, Sizes
from isd_repro.config import params
from isd_repro.data.store import Store, StoreWriter, convert
from isd_repro.runtime.errors import ConfigError

SMALL = Sizes(images=5, batch=3, width=330, height=300, repeats=2)


def test_turns_ratios_and_checks() -> None:
    turns: list[int] = []
    found = loader.bench(SMALL, lambda turn, cpu: turns.append(turn))
    assert turns == [0, 1]
    assert found.wrong_pixels == 0
    assert found.crop < 1e-4
    assert 0 < found.loss < 10
    assert found.peak == 3 * 3 * 256 * 281
    ratios = found.ratios("jpeg", "pipeline")
    assert ratios == [theirs / ours for ours, theirs in zip(found.cpu["jpeg"], found.cpu["pipeline"], strict=True)]
    text = json.loads(json.dumps(found.as_json()))
    assert text["ratio"]["jpeg over pipeline"] == statistics.median(ratios)
    assert text["faster"]["jpeg over pipeline"] == {"median": statistics.median(ratios), "turns": ratios}
    assert (text["baseline"], text["n"]) == ("pipeline", 2)
    lines = "\n".join(loader.lines(found))
    assert "5 of 330 x 300, batches of 3, n=2 turns" in lines
    assert "0 pixels differ" in lines


def test_a_wrong_pixel_is_counted(tmp_path: Path) -> None:
    image = loader.picture(np.random.default_rng(0), 300, 280)
    image.save(tmp_path / "a.png")
    stores: dict[Arm, Store] = {}
    kinds: tuple[tuple[Arm, int | None, int], ...] = (("raw", None, 0), ("jpeg", loader.QUALITY, 1))
    for arm, quality, shift in kinds:
        settings = params.Store(resize="short-side", side=256, jpeg_quality=quality)
        pixels = convert(image, settings)
        pixels[:, 7, 9] ^= 1 - shift
        (tmp_path / arm).mkdir()
        with StoreWriter(tmp_path / arm, settings) as writer:
            writer.append(pixels)
            stores[arm] = Store(tmp_path / arm, writer.finish(), 1)
    assert loader._wrong(stores, [tmp_path / "a.png"]) == 1
    stores["jpeg"] = stores["raw"]
    assert loader._wrong(stores, [tmp_path / "a.png"]) > 1000
    assert loader._loss(stores) == 0


def test_the_baseline_gives_two_views_of_the_files(tmp_path: Path) -> None:
    for number in range(2):
        file = tmp_path / f"class_{number}" / "0.png"
        file.parent.mkdir()
        Image.new("RGB", (320, 280), (80 * number, 100, 200)).save(file)
    torch.manual_seed(0)
    views = loader._crops(tmp_path)(torch.tensor([1, 0]))
    assert views.shape == (2, 2, 3, 224, 224)
    assert views[:, :, :, 5, 5].tolist() == [[[80, 100, 200], [0, 100, 200]]] * 2
    both = loader._pipeline(tmp_path)(torch.tensor([1]))
    assert both.shape == (2, 1, 3, 224, 224)
    assert both[1, 0, :, 9, 9].tolist() == pytest.approx([(80 / 255 - 0.485) / 0.229, -0.2846, 1.682], abs=1e-3)


def test_absurd_sizes() -> None:
    for sizes in (Sizes(images=3, batch=4), Sizes(repeats=0), Sizes(width=8)):
        with pytest.raises(ConfigError, match="cannot read"):
            loader.bench(sizes)


def test_the_command_line() -> None:
    done = CliRunner().invoke(commands.app, ["loader", "--images", "2", "--batch", "2", "--n", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sizes"]["images"] == 2
