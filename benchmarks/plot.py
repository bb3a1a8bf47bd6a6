"""The growth comparisons as SVG: seconds, and extra memory where it was measured, by size, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isd_repro.report import page
from isd_repro.report.figures import WIDTH, Tick

TEMPLATE = Path(__file__).parent / "templates" / "growth.svg.jinja"
GROWS = {
    "loss-growth": ("bank", "rows of the bank"),
    "knn-growth": ("bank", "labelled vectors"),
    "epoch-growth": ("images", "images"),
}
_LEFT, _TOP, _GAP, _RIGHT, _BOTTOM, _HEIGHT = 60.0, 66.0, 70.0, 14.0, 30.0, 200.0
PAGE = 4096 / 2**20  # MiB below which nothing can be measured, nor be drawn on a logarithmic axis
_SUFFIX = {2**20: "M", 2**10: "k"}


@dataclass(frozen=True)
class Point:
    """One size: where it stands in px, from the least to the greatest turn, and what a reader is told on pointing at it."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Panel:
    """One quantity; the dashed line through the last point is what grows in proportion to the size."""

    x: float
    title: str
    points: tuple[Point, ...]
    guide: tuple[tuple[float, float], tuple[float, float]]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Growth:
    """All panels of one file."""

    title: str
    axis: str
    width: float
    height: float
    top: float
    plot_width: float
    plot_height: float
    panels: tuple[Panel, ...]


def svg(name: str, found: Sequence[dict[str, Any]]) -> bytes:
    """The figure of one growth file, which holds one comparison for each size; equal numbers give equal bytes."""
    markup = page.environment("html").from_string(TEMPLATE.read_text("utf-8"))
    return markup.render(f=figure(name, found), css=page.template_text("figure.css")).encode()


def figure(name: str, found: Sequence[dict[str, Any]]) -> Growth:
    """Geometry alone."""
    key, axis = GROWS[name]
    sizes = [int(each["sizes"][key]) for each in found]
    arm = found[0]["baseline"]
    seconds = [(each["seconds"][arm], f"{size:,} {axis}") for each, size in zip(found, sizes, strict=True)]
    values = {found[0]["clock"]: [(sorted(turns), f"{what}: {_median(turns):.3g} s") for turns, what in seconds]}
    if all(arm in each["memory_mib"] for each in found):
        held = [max(each["memory_mib"][arm], PAGE) for each in found]
        values["extra memory, MiB"] = [([mib], f"{size:,} {axis}: {mib:.1f} MiB") for mib, size in zip(held, sizes, strict=True)]
    across = (WIDTH - _LEFT - _RIGHT - _GAP) / 2
    panels = tuple(
        _panel(title, sizes, rows, _LEFT + at * (across + _GAP), across) for at, (title, rows) in enumerate(values.items())
    )
    width = _LEFT + len(panels) * across + (len(panels) - 1) * _GAP + _RIGHT
    title = f"{arm.capitalize()} by {axis}"
    return Growth(title, axis, width, _TOP + _HEIGHT + _BOTTOM, _TOP, across, _HEIGHT, panels)


def _panel(title: str, sizes: Sequence[int], rows: Sequence[tuple[list[float], str]], left: float, width: float) -> Panel:
    first, last = math.log2(min(sizes)), math.log2(max(sizes))
    every = [value for turns, _ in rows for value in turns]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    high = max(high, low + 1)

    def across(size: float) -> float:
        return left + width * (math.log2(size) - first) / max(last - first, 1e-9)

    def down(value: float) -> float:
        return _TOP + _HEIGHT * (high - math.log10(value)) / (high - low)

    points = tuple(
        Point(across(size), down(_median(turns)), down(min(turns)), down(max(turns)), what)
        for size, (turns, what) in zip(sizes, rows, strict=True)
    )
    top, until = _median(rows[-1][0]), max(sizes)
    start = max(min(sizes), until * 10.0**low / top)  # where the line leaves the panel, if it does
    guide = ((across(start), down(top * start / until)), (across(until), down(top)))
    x_ticks = tuple(Tick(across(size), short(size)) for size in sizes)
    y_ticks = tuple(Tick(down(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1))
    return Panel(left, title, points, guide, x_ticks, y_ticks)


def short(size: int) -> str:
    """1,048,576 as `1M`, 8,192 as `8k`, in powers of two; others in full."""
    for unit, suffix in _SUFFIX.items():
        if size % unit == 0:
            return f"{size // unit}{suffix}"
    return f"{size:,}"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
