"""Everything that has to be seen on a GPU, in one call of a few minutes: `python -m benchmarks.gpu_day --out FOLDER`.

The steps of PLAN are checks (`gpu_checks`) and comparisons (`cases`). Each is a process of its own, killed at its time limit with
what it wrote kept; none stops another. The folder gets one JSON file for each comparison and their table (`README.md`), one line
for each finding of a check (`results.jsonl`), `log.txt`, `tests.txt`, `profile.txt` and `summary.txt`, which is printed last.
`--archive FILE.tar.gz` holds them all and is written anew after every step, for machines that give few files back. `--toy` runs
the same at small sizes, without a CUDA device on the CPU: the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Steps of a group run at the same time, groups one after the other; the most important first. Seconds that each may take.
PLAN: tuple[dict[str, float], ...] = (
    {"environment": 45},
    {"tests": 140, "compile": 140, "smoke": 90, "commands": 150},  # nobody needs the speed of these
    {"loss-d128": 25},
    {"loss-d512": 25},
    {"step-224": 120},
    {"views-224": 50},
    {"profile": 45},
    {"knn-2048": 70},
    {"step-64": 45},
    {"step-64-moco": 45},
    {"loss-moco": 20},
    {"resume": 45},
    {"step-224-resnet50": 70},
    {"loader": 50},
    {"linear": 40},
    {"knn": 30},
    {"claim": 400},  # longer and longer runs with what time is left
)
LEAST = 8.0  # seconds; a step with less time left is not started
_MOST = 11_000  # characters of the summary: who runs this remotely may see the end of the output only


@dataclass
class Running:
    """A step's process."""

    name: str
    process: BaseProcess
    log: Path
    began: float
    limit: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; 0 if nothing failed."""
    names = [name for group in PLAN for name in group]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="folder for the results")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of the folder, written anew after every step")
    parser.add_argument("--only", nargs="*", choices=names, metavar="STEP", help=f"steps to run: {', '.join(names)}")
    parser.add_argument("--skip", nargs="*", choices=names, metavar="STEP", default=[], help="steps to leave out")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for everything")
    parser.add_argument("--toy", action="store_true", help="small sizes, as a rehearsal")
    parser.add_argument(
        "--without-triton", action="store_true", help="leave the Triton kernel out, should it break the device's context"
    )
    given = parser.parse_args(arguments)
    if given.without_triton:
        from isd_repro.nn import bank_attention

        bank_attention._trial = lambda features, device: "left out by --without-triton"  # type: ignore[assignment]  # noqa: SLF001
    chosen = [name for name in given.only or names if name not in given.skip]
    plan = [{name: limit for name, limit in group.items() if name in chosen} for group in PLAN]
    return Day(given.out, given.budget, toy=given.toy, archive=given.archive).run(plan)


class Day:
    """One run of the plan."""

    def __init__(self, out: Path, budget: float, *, toy: bool, archive: Path | None = None) -> None:
        self.out, self.toy, self.archive, self.began = out, toy, archive, time.monotonic()
        self.patience = 4 if toy else 1  # a rehearsal may have to share a small machine
        self.end = self.began + self.patience * budget
        out.mkdir(parents=True, exist_ok=True)
        self.ends: list[tuple[str, str, float]] = []

    def run(self, plan: list[dict[str, float]]) -> int:
        """Run group by group, then print the summary."""
        from benchmarks import gpu_checks  # noqa: F401 - imported once: steps are forks of this process, which uses no device itself

        for group in plan:
            started = []
            for name, most in group.items():
                limit = min(self.patience * most, self.end - time.monotonic() - 3)
                if limit < LEAST:
                    self._ended(name, "left out: no time", 0.0)
                else:
                    started.append(self._start(name, limit))
            self._wait(started)
        lines = summary(self.out, self.ends, time.monotonic() - self.began)
        (self.out / "summary.txt").write_text("\n".join([*lines, ""]), "utf-8")
        self._pack()
        _print("\n".join(lines))
        return int(lines[-1].startswith("failed"))

    def _start(self, name: str, limit: float) -> Running:
        log = self.out / f".{name}.log"
        process = get_context("fork").Process(target=child, args=(name, self.out, log, limit, self.toy))
        _print(f"[{time.monotonic() - self.began:6.1f} s] {name}, at most {limit:.0f} s")
        process.start()
        return Running(name, process, log, time.monotonic(), limit)

    def _wait(self, running: list[Running]) -> None:
        """Until all have ended or were killed; their output goes to the one log."""
        while running:
            for each in list(running):
                taken = time.monotonic() - each.began
                each.process.join(0.05)
                code = each.process.exitcode
                if code is None and taken <= each.limit:
                    continue
                how = "killed at its limit" if code is None else "ok" if code == 0 else f"failed with {code}"
                _kill(each.process.pid)  # and whatever it left running
                each.process.join(5)
                running.remove(each)
                text = each.log.read_text("utf-8", "replace") if each.log.is_file() else ""
                with (self.out / "log.txt").open("a", encoding="utf-8") as stream:
                    stream.write(f"=== {each.name}\n{text[:200_000]}\n{text[200_000:][-200_000:]}\n")
                each.log.unlink(missing_ok=True)
                self._ended(each.name, how, taken)

    def _ended(self, name: str, how: str, seconds: float) -> None:
        self.ends.append((name, how, seconds))
        append(self.out, {"step": name, "name": "end", "how": how, "seconds": round(seconds, 1)})
        self._pack()
        _print(f"[{time.monotonic() - self.began:6.1f} s] {name}: {how} after {seconds:.1f} s")

    def _pack(self) -> None:
        """Write the archive anew; whoever stops this process finds the one before."""
        if self.archive is None:
            return
        self.archive.parent.mkdir(parents=True, exist_ok=True)
        partial = self.archive.with_name(f".{self.archive.name}")
        with tarfile.open(partial, "w:gz") as packed:
            for path in sorted(self.out.glob("[!.]*")):
                packed.add(path, f"{self.out.name}/{path.name}")
        partial.replace(self.archive)


def child(name: str, out: Path, log: Path, limit: float, toy: bool) -> None:
    """A step in its own process group, with its output in its own file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace")
    import torch

    from benchmarks import cases, gpu_checks, harness

    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001 - several methods of one class are compiled in one process
    harness.Clock.end = time.monotonic() + max(0.6 * limit, limit - 20)

    def say(what: str, **values: Any) -> None:
        append(out, {"step": name, "name": what, **values})
        _print(f"{what}: {values}")

    code = 0
    try:
        if name in gpu_checks.CHECKS:
            gpu_checks.CHECKS[name](gpu_checks.Context(say, out, toy))
        else:
            case = cases.cases(toy=toy)[name]
            found = cases.measure(case, _print)
            cases.keep(out, name, found)
            _print("\n".join(found.lines()))
    except BaseException as error:  # noqa: BLE001 - whatever ends this step ends no other
        traceback.print_exc()
        say("failed", failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        code = 1
    sys.stdout.flush()
    os._exit(code)  # without waiting for a compiler's or a loader's workers


def append(out: Path, row: dict[str, Any]) -> None:
    """Add a line to the results in one write, so that processes do not cut into each other's."""
    descriptor = os.open(out / "results.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(row, default=str) + "\n").encode())
    finally:
        os.close(descriptor)


def summary(out: Path, ends: list[tuple[str, str, float]], seconds: float) -> list[str]:
    """The results in short, failures first; all of them are in the files."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    lines = [f"=== {seconds:.0f} s: " + ", ".join(f"{name} {how} ({taken:.0f} s)" for name, how, taken in ends)]
    lines += [f"FAILED {row['step']}: {row['name'][:50]}: {row['failed'][:140]}" for row in rows if "failed" in row]
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_bytes())
        lines += [f"FAILED {path.stem}: {words}" for words in found["wrong"]]
        for variant, taken in found["seconds"].items():
            faster = f", x{found['faster'][variant]['median']:.2f}" if variant in found["faster"] else ""
            memory = f", {found['memory_mib'][variant]:.0f} MiB" if variant in found["memory_mib"] else ""
            how = f" ({found['how'][variant][:60]})" if variant in found["how"] else ""
            speed = f", {found['speed'][variant]}" if found["speed"][variant] else ""
            lines.append(f"{path.stem}: {variant} {1e3 * statistics.median(taken):.4g} ms{faster}{speed}{memory}{how}")
        lines.append(f"{path.stem}: floor " + ", ".join(f"{name} {value:.3g}" for name, value in found["floor"].items()))
    for row in rows:
        if row["name"] != "end" and "failed" not in row:
            told = " ".join(f"{key}={_short(value)}" for key, value in row.items() if key not in ("step", "name"))
            lines.append(f"{row['step']}: {row['name']}: {told}"[:210])
    while len("\n".join(lines)) > _MOST:
        lines.pop(max(range(1, len(lines)), key=lambda at: len(lines[at])))
    wrong = [line.removeprefix("FAILED ").partition(":")[0] for line in lines if line.startswith("FAILED")]
    wrong += [name for name, how, _ in ends if how != "ok"]
    return [*lines, f"failed: {', '.join(dict.fromkeys(wrong))}" if wrong else "every step passed"]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:90]


def _kill(pid: int | None) -> None:
    """End a step's process group; one that is gone is gone."""
    try:
        if pid:
            os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


_print: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731, T201 - the console is this module's page

if __name__ == "__main__":
    sys.exit(main())
