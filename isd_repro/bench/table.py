"""The comparisons of a folder as one Markdown page, with what was aimed at: numbers stand in the JSON files and here alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Times faster than the baseline, and times less extra memory, on one thread of a CPU.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    "loss-d128": {"attention": (3.0, 50.0)},
    "loss-d512": {"attention": (1.6, 50.0)},
    "views-32": {"batched": (5.0, None)},
    "views-64": {"batched": (2.5, None)},
    "step-32": {"fast": (1.9, None)},
    "step-64": {"fast": (1.25, None)},
}
_HEAD = [
    "# Measured speed",
    "",
    "Written by `isd-repro bench all`; [docs/performance.md](../../docs/performance.md) says what is compared. Ratios are of one",
    "turn each: median (least to greatest) of n. The load is the number of the machine's runnable processes before and after.",
    "",
    "| comparison | arm | faster than the baseline | target | extra memory | target | n | load | machine |",
    "|---|---|---|---|---|---|---|---|---|",
]


def page(folder: Path) -> str:
    """Markdown of every file that is there; files of other kinds are passed over."""
    rows, notes = [], []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_bytes())
        if isinstance(found, list):
            notes += _growth(path.stem, found)
        elif "baseline" in found:
            rows += [_row(path.stem, arm, found) for arm in found["faster"]]
            notes.append(_note(path.stem, found))
        elif "cpu_ratio" in found:
            notes.append(
                f"- `{path.stem}`: {found['cpu_ratio']:.2f} of faiss-cpu's processor time for one search (median of "
                f"{found['sizes']['repeats']}; below 1 is faster), neighbours equal: {100 * found['neighbours']:.3f} %."
            )
    return "\n".join([*_HEAD, *rows, "", *notes, ""])


def _row(name: str, arm: str, found: dict[str, Any]) -> str:
    faster, wanted = found["faster"][arm], TARGETS.get(name, {}).get(arm, (None, None))
    speed = f"{faster['median']:.2f} ({min(faster['turns']):.2f} to {max(faster['turns']):.2f})"
    less = found["less_memory"].get(arm)
    memory = "" if less is None else f"{less:.0f} times less ({found['memory_mib'][arm]:.1f} MiB)"
    load = f"{found['load'][0]} to {found['load'][1]}"
    aims = [_met(faster["median"], wanted[0]), _met(less, wanted[1])]
    return f"| `{name}` | {arm} | {speed} | {aims[0]} | {memory} | {aims[1]} | {found['n']} | {load} | {found['machine']} |"


def _met(value: float | None, wanted: float | None) -> str:
    if value is None or wanted is None:
        return ""
    return f"{wanted:g}, {'met' if value >= wanted else 'missed'}"


def _note(name: str, found: dict[str, Any]) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in found["sizes"].items())
    floor = ", ".join(f"{key} {value:.4g}" for key, value in found["floor"].items())
    check = ", ".join(f"{key} {value:.2g}" for key, value in found["check"].items())
    seconds = ", ".join(f"{arm} {_median(values):.3f}" for arm, values in found["seconds"].items())
    return f"- `{name}`: {sizes}. {found['clock'].capitalize()}: {seconds}. Floor: {floor}. Check: {check}."


def _growth(name: str, found: list[dict[str, Any]]) -> list[str]:
    """Seconds and extra memory by size of the bank."""
    points = [
        f"{each['sizes']['bank']:,} rows {_median(each['seconds']['attention']):.3f} s, {each['memory_mib']['attention']:.1f} MiB"
        for each in found
    ]
    return [f"- `{name}` (D {each['sizes']['dim']}, {each['clock']}): {'; '.join(points)}." for each in found[:1]]


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
