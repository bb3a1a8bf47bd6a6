"""The comparisons of a folder as one Markdown page, with what was aimed at: numbers stand in the JSON files and here alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import knn, plot

# Times faster than the baseline, and times less extra memory, on one thread of a CPU. A number below 1 is of an arm that does
# more work than the baseline, and may take so many times its time: at most 1 / number.
TARGETS: dict[str, dict[str, tuple[float, float | None]]] = {
    "loss-d128": {"attention": (3.0, 50.0)},
    "loss-d512": {"attention": (1.6, 50.0)},
    "views-32": {"batched": (5.0, None)},
    "views-64": {"batched": (2.5, None)},
    "views-224": {},
    "step-32": {"fast": (1.9, None), "fast, bf16": (1.9, None)},
    "step-64": {"fast": (1.25, None), "fast, bf16": (1.25, None)},
    "knn": {knn.ONE: (1.6, None)},
    "linear": {"50 settings": (1 / 1.3, None)},
    "loader": dict.fromkeys(("jpeg over pipeline", "raw over pipeline", "jpeg over crops", "raw over crops"), (4.0, None)),
}
_HEAD = [
    "# Measured speed",
    "",
    "Written by `python -m benchmarks all`; [docs/performance.md](../../docs/performance.md) says what is compared. Ratios are",
    "of one turn each: median (least to greatest) of n; of an arm that does more than its baseline, how many times its time.",
    "The load is the number of the machine's runnable processes before and after.",
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
            notes.append(_growth(path.stem, found))
        elif "baseline" in found:
            rows += [_row(path.stem, arm, found) for arm in found["faster"]]
            notes.append(_KINDS.get(path.stem, _note)(path.stem, found))
    return "\n".join([*_HEAD, *rows, "", *notes, ""])


def _row(name: str, arm: str, found: dict[str, Any]) -> str:
    faster, wanted = found["faster"][arm], TARGETS.get(name, {}).get(arm, (None, None))
    speed = _spread(faster["turns"])
    if faster["median"] < 1 and (wanted[0] or 1) < 1:
        speed = f"{_spread([1 / ratio for ratio in faster['turns']])} times its time"
    less = found["less_memory"].get(arm)
    memory = "" if less is None else f"{less:.0f} times less ({found['memory_mib'][arm]:.1f} MiB)"
    load = f"{found['load'][0]} to {found['load'][1]}"
    aims = [_met(faster["median"], wanted[0]), _met(less, wanted[1])]
    if wrong := found.get("wrong"):
        aims = [f"**wrong**: {', '.join(wrong)}", ""]
    return f"| `{name}` | {arm} | {speed} | {aims[0]} | {memory} | {aims[1]} | {found['n']} | {load} | {found['machine']} |"


def _met(value: float | None, wanted: float | None) -> str:
    if value is None or wanted is None:
        return ""
    shown = f"{wanted:g}" if wanted >= 1 else f"at most {1 / wanted:g}"
    return f"{shown}, {'met' if value >= wanted else 'missed'}"


def _spread(values: list[float]) -> str:
    return f"{_median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _note(name: str, found: dict[str, Any]) -> str:
    floor = ", ".join(f"{key} {value:.4g}" for key, value in found["floor"].items())
    check = ", ".join(f"{key} {'none' if value is None else f'{value:.2g}'}" for key, value in found["check"].items())
    how = "".join(f" {arm}: {words}." for arm, words in found.get("how", {}).items())
    seconds = ", ".join(f"{arm} {_median(values):.3f}" for arm, values in found["seconds"].items())
    return f"- `{name}`: {_sizes(found)}. {found['clock'].capitalize()}: {seconds}. Floor: {floor}. Check: {check}.{how}"


def _knn(name: str, found: dict[str, Any]) -> str:
    return (
        f"- `{name}`: {_sizes(found)}. Both want the neighbours for 1 and for {found['sizes']['k']}. One search of ours takes "
        f"{found['cpu_ratio']:.2f} of the processor time of one of faiss-cpu's (below 1 is faster). Floor: s of the products "
        f"{_median(found['floor']):.4g}. Neighbours equal: {100 * found['neighbours']:.3f} %, of the others "
        f"{found['unexplained']} no near-ties."
    )


def _loader(name: str, found: dict[str, Any]) -> str:
    cpu = ", ".join(f"{arm} {1000 * _median(values):.3f}" for arm, values in found["cpu"].items())
    return (
        f"- `{name}`: {_sizes(found)}. Processor ms an image: {cpu}. Floor: ms of decoding alone "
        f"{1000 * _median(found['floor']):.3f}. Check: {found['wrong_pixels']} pixels differ from Pillow's, views within "
        f"{found['crop']:.1e} of torchvision's."
    )


def _sizes(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found["sizes"].items())


_KINDS = {"knn": _knn, "loader": _loader}


def _growth(name: str, found: list[dict[str, Any]]) -> str:
    """Seconds and extra memory by what grows, and the figure."""
    key, axis = plot.GROWS[name]
    points = []
    for each in found:
        arm = each["baseline"]
        memory = f", {each['memory_mib'][arm]:.1f} MiB extra" if arm in each["memory_mib"] else ""
        points.append(f"{each['sizes'][key]:,} {_median(each['seconds'][arm]):.3f} s{memory}")
    rest = ", ".join(f"{name} {value}" for name, value in found[0]["sizes"].items() if name != key)
    return f"- [`{name}`]({name}.svg), by {axis} ({rest}; {found[0]['clock']}): {'; '.join(points)}."


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
