"""Which runs are repetitions of one another, and one number of several: seeds of a run, draws of a subset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from isd_repro.config.params import Params
from isd_repro.report import intervals, text
from isd_repro.report.cells import Cell, Kind
from isd_repro.report.records import RECORDED

SIGNIFICANT = 0.05


def method_name(params: Params, run: str) -> str:
    """A run's label without subset and seed: `ISD on D1`, `ISD (D1)`, `ISD, D1, seed 2` and `ISD` are all ISD."""
    subset = re.escape(params.runs[run].data.subset)
    label = params.runs[run].label
    for words in (r"seed\s+\d+", rf"(?:on\s+)?(?<![\w.]){subset}"):
        label = re.sub(rf"[\s,;:/-]*[(\[]?\s*\b{words}(?![\w.])\s*[)\]]?", "", label, flags=re.IGNORECASE).strip()
    return label or params.runs[run].label


def repetitions(params: Params, runs: Sequence[str]) -> list[list[str]]:
    """Runs of one subset that differ in their seed alone, together; a run without repetition is a list of one."""
    kinds: dict[str, list[str]] = {}
    for name in runs:
        config = params.runs[name].model_dump(mode="json", include={"backbone", "method", "optim", "data", "numerics"})
        config["numerics"].pop("seed")
        kinds.setdefault(repr((method_name(params, name), config)), []).append(name)
    found = []
    for alike in kinds.values():
        seeds = {params.runs[name].numerics.seed for name in alike}
        found += [alike] if len(seeds) == len(alike) else [[name] for name in alike]
    return found


def pool(cells: Sequence[Cell], what: str) -> Cell:
    """The mean of several cells of one kind of number with its standard deviation; cells without a number are left out and told.

    Args:
        cells: one or more cells of the same encoder, metric and group; a single one is returned as it is.
        what: the repetitions in the plural, `seeds` or `draws`.
    """
    if len(cells) == 1:
        return cells[0]
    like = cells[0]
    with_value = [cell for cell in cells if cell.value is not None]
    runs = tuple(run for cell in cells for run in cell.runs)
    if not with_value:
        return replace(like, runs=runs)
    values = [cell.value for cell in with_value if cell.value is not None]
    mean, deviation = intervals.mean_and_deviation(values)
    spread = "" if deviation is None else f"; standard deviation {deviation:.2f} points"
    missing = "" if len(values) == len(cells) else f"; {len(cells) - len(values)} more not run"
    differences = all(cell.kind == "difference" for cell in with_value)
    kind: Kind = "difference" if differences else "mean"
    detail = f"mean of {len(values)} {what}{spread}{missing}"
    level = RECORDED if any(cell.level == RECORDED for cell in with_value) else ""
    found = Cell(kind, runs, like.encoder, like.metric, like.group, mean, detail=detail, level=level)
    found = replace(found, deviation=deviation, count=len(values))
    if not differences or len(values) < 2:
        return found
    paired = intervals.paired(values)
    return replace(found, low=paired.low, high=paired.high, detail=f"{detail}; {evidence(paired)}")


def evidence(paired: intervals.Paired) -> str:
    """Interval and test of a mean difference in words, with the limit that few pairs set to p."""
    words = []
    if paired.low is not None and paired.high is not None:
        words.append(f"95 % bootstrap interval {text.signed(paired.low, 2)} to {text.signed(paired.high, 2)}")
    every = 2**paired.n <= intervals.SIGNS
    signs = f"all {2**paired.n:,} sign vectors" if every else f"{intervals.SIGNS:,} random sign vectors"
    least = 2 / 2**paired.n
    limit = f", which cannot fall below {least:.2f} with {paired.n} pairs" if least > SIGNIFICANT else ""
    return "; ".join([*words, f"sign-flip test over {signs} {text.p_value(paired.p)}{limit}"])
