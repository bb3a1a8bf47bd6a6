"""What a terminal shows while a run is trained; test_interruptions and others read what is said where there is none."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from isd_repro.config import reader
from isd_repro.train.display import Display
from isd_repro.train.pretrain import pretrain


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system="standard", _environ={})


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def frame(console: Console, std: float) -> list[str]:
    display = Display(console, "isd-2, run 3 of 8", epochs=25, steps_per_epoch=16, batch_size=64)
    display.begin(160)
    display.tick(168, 3.0)
    time.sleep(0.2)
    display.tick(176, 2.3456)
    display.epoch({"epoch": 11.0, "spread": std})
    console.print(display._lines())
    return said(console).splitlines()


@pytest.mark.parametrize("width", [60, 80])
def test_two_lines_say_how_a_run_goes(width: int) -> None:
    first, second = frame(Console(file=io.StringIO(), width=width, _environ={}), 0.274)
    assert first.startswith("isd-2, run 3 of 8 ")
    assert " 44% " in first
    assert first.rstrip().endswith(" left")
    assert second.startswith("epoch 12/25  loss 2.346  ")
    assert second.rstrip().endswith(" images/s  embedding std 0.274")
    assert len(first) <= width
    assert len(second) <= width


@pytest.mark.parametrize(
    ("std", "shown"), [(0.274, "\x1b[32membedding std 0.274"), (0.003, "\x1b[1;31mcollapsed, embedding std 0.003")]
)
def test_bad_health_is_red(std: float, shown: str) -> None:
    assert shown in frame(terminal(80), std)[1]


def test_a_finished_run_leaves_one_line(folder: Path) -> None:
    params, layout = reader.load(folder / "params.yaml")
    console = terminal(80)
    pretrain("isd", params, layout, console)
    text = said(console)
    assert re.search(r"epoch \d+/", text)  # the first may be over before the display is drawn
    last = text.rpartition("\x1b")[2]  # after the two moving lines were removed
    epochs = params.runs["isd"].optim.epochs
    assert f"isd, run 1 of {len(params.runs)}: {epochs} epochs in 0:00:" in last, text[-300:]
    assert last.rstrip().endswith(" images/s")
    assert last.count("\n") == 1
