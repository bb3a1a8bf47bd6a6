"""Commands `data audit` and `data lists`: what lists of unbalanced subsets hold, and whether they are the published ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from isd_repro.data import audit as auditing
from isd_repro.data.audit import Audit, Overlap, Report
from isd_repro.data.subsets import LISTS_ORIGIN
from isd_repro.runtime.errors import DataError


def audit(paths: Sequence[Path], words: Path | None, *, as_json: bool) -> None:
    """Print what the lists hold, what each two share, and what "large" and "rare" are confounded with.

    Raises:
        DataError: a file is missing or no list.
    """
    report = auditing.audit(auditing.find_lists(paths), auditing.read_words(words) if words else None)
    if as_json:
        sys.stdout.write(json.dumps(report.as_json(), indent=1, sort_keys=True, allow_nan=False) + "\n")
        return
    out = Console(file=sys.stdout, highlight=False)
    _show(out, _lists_table(report.lists))
    if report.overlaps:
        _show(out, _overlap_table(report.overlaps))
    for line in sentences(report):
        out.print(line, markup=False, soft_wrap=not out.is_terminal)


def lists(folder: Path) -> None:
    """Print the state of each of the ten published lists.

    Raises:
        DataError: one is missing, or has other bytes than the published one.
    """
    rows = auditing.check_published(folder)
    out = Console(file=sys.stdout, highlight=False)
    for row in rows:
        found = f", sha256 {row.sha256}" if row.state == "different" else ""
        out.print(f"{row.name}.txt: {row.state}{found}", markup=False, soft_wrap=True)
    bad = [row for row in rows if row.state != "published"]
    if bad:
        shown = ", ".join(f"{row.name}.txt {row.state}" for row in bad)
        where = f"the published lists are in {LISTS_ORIGIN} on GitHub; copy them as they are"
        raise DataError(f"{folder}: {len(bad)} of {len(rows)} lists are not the published ones: {shown}", where)


def sentences(report: Report) -> list[str]:
    """What the numbers mean, list by list and together."""
    lines = []
    for one in report.lists:
        large = len(one.large)
        chance = f"a random choice does so with probability {one.chance:.2g}"
        lines.append(
            f"{one.name}: the {large} large classes are among the first {one.last_large} of {one.classes} class names; {chance}."
        )
        if one.animals:
            lines.append(
                f"{one.name}: {one.animals.large} of {large} large classes are animals, {one.animals.rare} of"
                f" {one.rare_classes} rare ones; a random choice takes so many or more with probability {one.animals.chance:.2g}."
            )
        lines += [f"{one.name}: {cls} {name}" for cls, name in one.names.items()]
    confounded = [one.name for one in report.lists if one.last_large == len(one.large)]
    if confounded:
        lines.append(
            f"{len(confounded)} of {len(report.lists)} lists have the first class names as their large classes: what is said"
            " of rare classes there is said of later names, too."
        )
    if len(report.lists) > 1:
        together = f"{report.distinct_classes} different classes, {report.distinct_large} of them large somewhere"
        lines.append(f"All lists together: {together}.")
    return lines


def _lists_table(rows: Sequence[Audit]) -> Table:
    heads = (
        "list",
        "published as",
        "images",
        "classes",
        "large",
        "images of each",
        "rare",
        "images of each",
        "last large",
        "chance",
    )
    table = _table(heads)
    for row in rows:
        sizes = sorted(set(row.large.values()))
        large = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        rare = f"{row.rare[0]}" if row.rare[0] == row.rare[1] else f"{row.rare[0]} to {row.rare[1]}"
        counts = (f"{row.images}", f"{row.classes}", f"{len(row.large)}", large, f"{row.rare_classes}", rare)
        table.add_row(row.name, row.published or "not published", *counts, f"{row.last_large}", f"{row.chance:.2g}")
    return table


def _overlap_table(rows: Sequence[Overlap]) -> Table:
    heads = ("lists", "classes in both", "large", "rare", "images in both", "of rare classes", "expected of these")
    table = _table(heads)
    for row in rows:
        counts = (row.classes, row.large, row.rare, row.images, row.rare_images)
        table.add_row(f"{row.first} {row.second}", *map(str, counts), f"{row.expected:.1f}")
    return table


def _table(heads: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, head in enumerate(heads):
        table.add_column(head, justify="left" if at == 0 else "right", no_wrap=True)
    return table


def _show(out: Console, table: Table) -> None:
    """In a pipe nothing is cut."""
    if not out.is_terminal:
        wide = out.options.update(width=10_000, max_width=10_000)
        out.width = max(out.width, Measurement.get(out, wide, table).maximum)
    out.print(table)
