"""The growth comparisons as SVG: seconds, and extra memory where it was measured, by size, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import TYPE_CHECKING, Any

from isd_repro.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROWS = {
    "loss-growth": ("bank", "rows of the bank"),
    "knn-growth": ("bank", "labelled vectors"),
    "epoch-growth": ("images", "images"),
}
PAGE = 4096 / 2**20  # MiB below which nothing can be measured, nor be drawn on a logarithmic axis
_SUFFIX = {2**20: "M", 2**10: "k"}


def svg(name: str, found: Sequence[dict[str, Any]]) -> bytes:
    """The figure of one growth file, which holds one comparison for each size; equal numbers give equal bytes."""
    title = f"{found[0]['baseline'].capitalize()} by {GROWS[name][1]}"
    return figures.svg(lambda: figure(name, found), title).encode()


def figure(name: str, found: Sequence[dict[str, Any]]) -> Figure:
    """One panel a quantity: medians from the least to the greatest repetition, and a dashed line in proportion to the size."""
    key, axis = GROWS[name]
    sizes = [int(each["sizes"][key]) for each in found]
    arm = found[0]["baseline"]
    panels = {found[0]["clock"]: [sorted(each["seconds"][arm]) for each in found]}
    if all(arm in each["memory_mib"] for each in found):
        panels["extra memory, MiB"] = [[max(each["memory_mib"][arm], PAGE)] for each in found]
    canvas, axes = figures.canvas(len(panels), 280, left=52, gap=60)
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        middles = [median_low(row) for row in rows]
        ax.plot(sizes, middles, color=figures.COLOURS["isd"], marker="o", markersize=4)
        ax.vlines(sizes, [row[0] for row in rows], [row[-1] for row in rows], color=figures.COLOURS["isd"], alpha=0.5, lw=2.5)
        ax.plot(sizes, [middles[-1] * size / sizes[-1] for size in sizes], color=figures.INK, lw=1, linestyle=(0, (4, 3)))
        ax.set(xscale="log", yscale="log", title=f"{title}: median, least and greatest", xlabel=axis)
        ax.set_ylim(min(row[0] for row in rows) / 2, max(row[-1] for row in rows) * 2)
        ax.set_xticks(sizes, [short(size) for size in sizes])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter("{x:g}")
    return canvas


def short(size: int) -> str:
    """1,048,576 as `1M`, 8,192 as `8k`, in powers of two; others in full."""
    for unit, suffix in _SUFFIX.items():
        if size % unit == 0:
            return f"{size // unit}{suffix}"
    return f"{size:,}"
