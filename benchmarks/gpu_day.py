"""Everything that has to be seen on a GPU, in one call of a few minutes: `python -m benchmarks.gpu_day --out FOLDER`.

Steps are processes of their own, each killed at its limit with what it wrote kept, and none stops another. What they find is
appended to `results.jsonl` as they find it; `log.txt`, `tests.txt`, `profile.txt` and traces stand beside it, and a table is
printed last. `--rehearse` runs the same with toy sizes, where there is no CUDA device on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# A group of steps runs at once, a step after the other group; seconds that each may take at most.
PLAN: tuple[dict[str, float], ...] = (
    {"env": 50},
    {"tests": 140, "warm": 140, "smoke": 90, "command": 150},  # no speed of these is of any interest
    {"loss": 30},
    {"ladder": 150},
    {"views": 45},
    {"knn": 55},
    {"small": 60},
    {"resnet50": 70},
    {"resume": 45},
    {"loader": 45},
    {"tune": 45},
)
LEAST = 8.0  # seconds with which a step is worth a start


@dataclass
class Running:
    """A step's process."""

    name: str
    process: BaseProcess
    log: Path
    began: float
    limit: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; 0 unless no step came to its end."""
    names = [name for group in PLAN for name in group]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="folder for what is found")
    parser.add_argument("--only", default="", help=f"steps, with commas between them: of {', '.join(names)}")
    parser.add_argument("--skip", default="", help="steps to leave out, likewise")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for all of it")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes")
    chosen = parser.parse_args(arguments)
    only, skip = ({word.strip() for word in text.split(",") if word.strip()} for text in (chosen.only, chosen.skip))
    if unknown := (only | skip) - set(names):
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return Day(chosen.out, chosen.budget, rehearse=chosen.rehearse).run(
        [{name: limit for name, limit in group.items() if (not only or name in only) and name not in skip} for group in PLAN]
    )


class Day:
    """One run of the plan."""

    def __init__(self, out: Path, budget: float, *, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.began = time.monotonic()
        self.end = self.began + budget
        out.mkdir(parents=True, exist_ok=True)
        self.results = out / "results.jsonl"
        self.ends: list[tuple[str, str, float]] = []

    def run(self, plan: list[dict[str, float]]) -> int:
        """Group by group, and the table."""
        import torch  # noqa: F401 - once for all steps: they are forks of this process, which itself asks nothing of the device
        import torchvision  # noqa: F401

        from benchmarks import gpu_steps

        self.note({"step": "day", "name": "imports", "seconds": time.monotonic() - self.began})
        for group in plan:
            started = []
            for name, limit in group.items():
                limit = min(limit, self.end - time.monotonic() - 3)  # noqa: PLW2901
                if limit < LEAST:
                    self.ended(name, "left out: no time", 0.0)
                else:
                    started.append(self.start(name, gpu_steps.STEPS[name], limit))
            self.wait(started)
        for line in table(self.results, self.ends, time.monotonic() - self.began):
            print(line, flush=True)
        return 0 if not self.ends or any(end == "ok" for _, end, _ in self.ends) else 1

    def start(self, name: str, work: Callable[[Any], None], limit: float) -> Running:
        """Fork a step."""
        log = self.out / f".{name}.log"
        process = get_context("fork").Process(target=child, args=(name, work, self.out, log, limit, self.rehearse))
        print(f"[{time.monotonic() - self.began:6.1f} s] {name}, at most {limit:.0f} s", flush=True)
        began = time.monotonic()
        process.start()
        return Running(name, process, log, began, limit)

    def wait(self, running: list[Running]) -> None:
        """Until all have ended or were killed."""
        while running:
            for each in list(running):
                taken = time.monotonic() - each.began
                each.process.join(0.05)
                if each.process.exitcode is not None:
                    code = each.process.exitcode
                    self.ended(each.name, "ok" if code == 0 else f"failed with {code}", taken)
                elif taken > each.limit:
                    self.ended(each.name, "killed at its limit", taken)
                else:
                    continue
                kill(each.process.pid)  # whatever it left running, too
                each.process.join(5)
                running.remove(each)
                self.keep(each)

    def keep(self, each: Running) -> None:
        """Put a step's output into the one log."""
        text = each.log.read_text("utf-8", "replace") if each.log.is_file() else ""
        most = 400_000
        text = text if len(text) < most else f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"
        with (self.out / "log.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"=== {each.name}\n{text}\n")
        each.log.unlink(missing_ok=True)

    def ended(self, name: str, how: str, seconds: float) -> None:
        """Say how a step ended."""
        self.ends.append((name, how, seconds))
        self.note({"step": name, "name": "end", "how": how, "seconds": seconds})
        print(f"[{time.monotonic() - self.began:6.1f} s] {name}: {how} after {seconds:.1f} s", flush=True)

    def note(self, row: dict[str, Any]) -> None:
        """Append a line of results."""
        append(self.results, row)


def append(path: Path, row: dict[str, Any]) -> None:
    """One line at once, so that processes do not cut into each other's."""
    line = json.dumps(row, default=str) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def kill(pid: int | None) -> None:
    """End a step's process group, which is its own; what is gone is gone."""
    try:
        if pid:
            os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def child(name: str, work: Callable[[Any], None], out: Path, log: Path, limit: float, rehearse: bool) -> None:
    """A step in its own process group, its output in its own file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace")
    import torch

    from benchmarks.gpu_steps import Bench, bank_attention

    def say(what: str, **values: Any) -> None:
        row = {"step": name, "name": what, **values}
        append(out / "results.jsonl", row)
        print(json.dumps(row, default=str), flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if os.environ.get("GPU_DAY_TRITON") == "off":  # should it break the device's context
            bank_attention._trial = lambda features, device: "told to leave it out"  # type: ignore[assignment]  # noqa: SLF001
        torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 - several methods of one class are compiled here
        work(Bench(device, say, out, limit, time.monotonic(), rehearse))
    except BaseException as error:
        traceback.print_exc()
        say("failed", failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # no waiting for a compiler's or a loader's workers


# --- the table ----------------------------------------------------------------------------------------------------------------

_FIRST = ("images_per_second", "ms", "host_ms", "faster", "tflop_s", "seconds", "gradient_error")
_HIDDEN = {
    "step",
    "name",
    "ms_low",
    "ms_high",
    "calls",
    "steps",
    "n",
    "losses",
    "where",
    "of",
    "queries",
    "images",
    "ok",
    "first",
    "last",
    "kernels",
}
_SHORT = {
    "images_per_second": "img/s",
    "gradient_error": "err",
    "bytes_floor_tb_s": "TB/s",
    "loss_apart_by_step": "apart",
    "peak_mib": "MiB",
}
_MOST = 11_000  # characters: who runs this from afar sees the end of the output alone


def table(results: Path, ends: list[tuple[str, str, float]], seconds: float) -> list[str]:
    """What was found, short; all of it is in the file."""
    rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    lines = [f"=== {seconds:.0f} s: " + ", ".join(f"{name} {how} ({taken:.0f} s)" for name, how, taken in ends)]
    failed = [row for row in rows if "failed" in row or row.get("ok") is False]
    lines += [f"FAILED {row['step']}: {row['name'][:50]}: {row.get('failed', 'not finite')[:140]}" for row in failed[:25]]
    given = {row["name"].removesuffix(", views given"): row for row in rows if row["name"].endswith(", views given")}
    for row in rows:
        quiet = row["step"] == "day" or row["name"].endswith(("end", ": built", ", views given")) or row["step"] == "smoke"
        if quiet or row in failed:
            continue
        told = [f"{_SHORT.get(key, key)} {number(row[key])}" for key in _FIRST if row.get(key) is not None]
        told += [
            f"{_SHORT.get(key, key)}={number(value)}"
            for key, value in row.items()
            if key not in _HIDDEN | set(_FIRST) and value not in (None, "", [], {})
        ]
        if row["name"] in given:
            told.append(f"views given {number(given[row['name']]['ms'])} ms")
        lines.append(f"{row['name'][:52]}: {' '.join(told)}"[:210])
    while len("\n".join(lines)) > _MOST:
        lines.pop(max(range(1, len(lines)), key=lambda at: len(lines[at])))
    return lines


def number(value: Any) -> str:
    """Short."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        values = [each for each in value if isinstance(each, int | float)]
        return f"{statistics.median(values):.2g}" if values and len(values) == len(value) else str(value)[:80]
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}:{number(each)}" for key, each in value.items()) + "}"
    return str(value)[:100]


if __name__ == "__main__":
    sys.exit(main())
