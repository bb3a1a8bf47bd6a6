"""`metrics.jsonl` and the pictures beside it survive kills, torn lines, odd numbers and full disks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isd_repro.runtime.errors import DataError, UserError
from isd_repro.tracking import RunTracker, media, read_metrics, truncate_metrics


def test_every_row_is_on_the_disk_before_the_next(tmp_path: Path) -> None:
    """Whatever ends the process: nothing waits in a buffer."""
    path = tmp_path / "runs" / "isd" / "metrics.jsonl"
    with RunTracker(path) as tracker:
        for epoch in (1, 2):
            tracker.log({"epoch": epoch, "loss": 1 / epoch})
            assert read_metrics(path)[-1] == {"epoch": epoch, "loss": 1 / epoch}


def test_a_torn_last_line_is_dropped_on_reading_and_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "lo', "utf-8")
    assert read_metrics(path) == [{"epoch": 1, "loss": 2.0}]
    with RunTracker(path) as tracker:
        tracker.log({"epoch": 2, "loss": 1.5})
    assert path.read_text("utf-8") == '{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": 1.5}\n'


def test_rows_are_by_epoch_and_step_the_last_wins_and_odd_numbers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunTracker(path) as tracker:
        for epoch, loss in ((1, 4.0), (2, 3.0), (3, math.nan), (2, 3.5)):
            tracker.log({"epoch": epoch, "loss": loss, "norm": -math.inf if epoch == 3 else 1.0})
        tracker.log({"epoch": 2, "step": 20, "loss": 9.0})
    assert read_metrics(path) == [
        {"epoch": 1, "loss": 4.0, "norm": 1.0},
        {"epoch": 2, "loss": 3.5, "norm": 1.0},
        {"epoch": 3, "loss": None, "norm": None, "not_finite": "loss=nan, norm=-inf"},
        {"epoch": 2, "step": 20, "loss": 9.0},
    ]


def test_truncate_keeps_what_a_checkpoint_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with RunTracker(path) as tracker:
        for epoch in range(1, 5):
            tracker.log({"epoch": epoch, "loss": math.nan if epoch == 1 else 0.5})
    path.write_text(path.read_text("utf-8") + '{"epoch": 5', "utf-8")
    truncate_metrics(path, lambda row: row["epoch"] <= 2)
    assert [(row["epoch"], row["loss"], row.get("not_finite")) for row in read_metrics(path)] == [
        (1, None, "loss=nan"),
        (2, 0.5, None),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("text", "found"), [("{\n", "not JSON"), ('{"epoch": 1}\n[3]\n', "found list")])
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=found) as caught:
        read_metrics(path)
    assert f"{path}:{text.count(chr(10))}" in caught.value.message
    with pytest.raises(DataError, match="no such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_full_disk_is_told_and_not_hidden() -> None:
    with pytest.raises(UserError, match="No space left") as caught, RunTracker(Path("/dev/full")) as tracker:
        tracker.log({"epoch": 1})
    assert "run the same command again" in caught.value.hint


def test_a_picture_lies_whole_on_the_disk_with_its_caption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
    with RunTracker(None, tmp_path / "media") as tracker:
        tracker.log_image("views", pixels, "What is seen")
        first = (tmp_path / "media" / "views.png").read_bytes()
        tracker.log_image("views", pixels, "What is seen")
    assert [path.name for path in (tmp_path / "media").iterdir()] == ["views.png"]
    assert (tmp_path / "media" / "views.png").read_bytes() == first
    (found,) = media.kept(tmp_path / "media")
    assert (found.key, found.caption) == ("views", "What is seen")
    with Image.open(found.path) as image:
        assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), pixels)
    (tmp_path / "file").write_text("in the way", "utf-8")
    with RunTracker(None, tmp_path / "file") as tracker:
        tracker.log_image("views", pixels)
    assert "the picture views was not saved" in caplog.text
