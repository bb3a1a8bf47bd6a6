"""The comparisons of a folder as one Markdown page, with their targets; numbers are kept in the JSON files."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness, knn


class Target(NamedTuple):
    """What a variant should reach: times as fast as the baseline, times less extra memory, or seconds of a call."""

    faster: float | None = None
    less_memory: float | None = None
    seconds: float | None = None


# One thread of a CPU. A number below 1 is of a variant that does more than the baseline: it may take 1 / number of its time.
CPU: dict[str, dict[str, Target]] = {
    "loss-d128": {"attention": Target(3.0, 50.0)},
    "loss-d512": {"attention": Target(1.6, 50.0)},
    "views-32": {"batched": Target(5.0)},
    "views-64": {"batched": Target(2.5)},
    "step-32": {"fast": Target(1.9), "fast, bf16": Target(1.9)},
    "step-64": {"fast": Target(1.25), "fast, bf16": Target(1.25)},
    "knn": {knn.ONE: Target(1.6)},
    "linear": {"50 settings": Target(1 / 1.3)},
    **{f"evaluate-{images}": {"evaluate": Target(1 / 1.3)} for images in ("2", "24", "300", "12mp")},
    # a file of an earlier form names each pair
    "loader": {f"{store}{end}": Target(4.0) for store in ("jpeg", "raw") for end in ("", " over pipeline", " over crops")},
}
CUDA: dict[str, dict[str, Target]] = {
    "loss-d128": {"attention, float16 bank": Target(12.0, 50.0)},
    "loss-d512": {"attention, float16 bank": Target(7.0, 50.0)},
    "views-224": {"batched, compiled": Target(seconds=0.008)},  # 512 views
    "step-224": {"+ CUDA graph": Target(seconds=10 * 256 / 8000)},  # 10 steps of 256 at 8,000 images/s
    "knn-2048": {knn.ONE: Target(seconds=1.5 * 8192 / 50_000)},  # 1.5 s for 50,000 queries
}
_HEAD = [
    "# Measured speed",
    "",
    "Written by `python -m benchmarks`; [benchmarks/README.md](../../benchmarks/README.md) says what is compared. Ratios are of",
    "one repetition each: median (minimum to maximum) of n. A variant that does more than its baseline shows how many times its",
    "time it takes. Load is the machine's load average before and after.",
    "",
    "| comparison | variant | times as fast as the baseline | target | extra memory | target | n | load | machine |",
    "|---|---|---|---|---|---|---|---|---|",
]


def page(folder: Path) -> str:
    """Markdown of every comparison that the folder has."""
    rows, notes = [], []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_bytes())
        if "baseline" in found:
            rows += [_row(path.stem, variant, found) for variant in found["faster"]]
            notes.append(_note(path.stem, found))
    return "\n".join([*_HEAD, *rows, "", *notes, ""])


def _row(name: str, variant: str, found: dict[str, Any]) -> str:
    targets = CUDA if "CUDA" in found.get("clock", "") else CPU
    target = targets.get(name, {}).get(variant, Target())
    faster, ratios = found["faster"][variant]["median"], found["faster"][variant]["turns"]
    speed = harness.spread(ratios, ".2f")
    if faster < 1 and (target.faster or 1) < 1:
        speed = f"{harness.spread([1 / ratio for ratio in ratios], '.2f')} times its time"
    less = found["less_memory"].get(variant)
    memory = "" if less is None else f"{less:.0f} times less ({found['memory_mib'][variant]:.1f} MiB)"
    aims = [_met(faster, target.faster), _met(less, target.less_memory)]
    if target.seconds:
        seconds = statistics.median(found["seconds"][variant])
        aims[0] = f"at most {1e3 * target.seconds:g} ms, {'met' if seconds <= target.seconds else 'missed'} ({1e3 * seconds:.3g})"
    if wrong := found.get("wrong"):
        aims = [f"**wrong**: {', '.join(wrong)}", ""]
    load = f"{found['load'][0]} to {found['load'][1]}"
    return f"| `{name}` | {variant} | {speed} | {aims[0]} | {memory} | {aims[1]} | {found['n']} | {load} | {found['machine']} |"


def _met(value: float | None, wanted: float | None) -> str:
    if value is None or wanted is None:
        return ""
    shown = f"{wanted:g}" if wanted >= 1 else f"at most {1 / wanted:g}"
    return f"{shown}, {'met' if value >= wanted else 'missed'}"


def _note(name: str, found: dict[str, Any]) -> str:
    """Sizes, times, floor and check. Files of an earlier form (`knn`, `loader`) have single numbers in place of the last two."""
    parts = [_pairs(found["sizes"], "{}")]
    if seconds := found.get("seconds"):
        parts.append(f"{found['clock'].capitalize()}: {_pairs({k: statistics.median(v) for k, v in seconds.items()}, '{:.4g}')}")
        parts.append(f"Floor: {_pairs(found['floor'], '{:.4g}')}")
        parts.append(f"Check: {_pairs(found['check'], '{:.2g}')}")
    else:
        parts.append(_pairs({key: value for key, value in found.items() if type(value) in (int, float)}, "{:.4g}"))
    parts += [f"{variant}: {words}" for key in ("speed", "how") for variant, words in found.get(key, {}).items() if words]
    parts += [f"**{variant} failed**: {words}" for variant, words in found.get("failed", {}).items()]
    return f"- `{name}`: {'. '.join(part for part in parts if part)}."


def _pairs(values: dict[str, Any], form: str) -> str:
    return ", ".join(f"{key} {'none' if value is None else form.format(value)}" for key, value in values.items() if value != [])
