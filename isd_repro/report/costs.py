"""What the runs cost: CPU- and GPU-hours of every attempt, those that failed or were killed included.

A stage's CPU-hours are its seconds times its threads, so they are what it kept from others and an upper bound of what it
used. A run without a list of attempts shows the seconds of its record: work that a kill threw away is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from isd_repro.config.params import Params
from isd_repro.provenance import Provenance
from isd_repro.records import CurveRecord, EvaluationRecord, PretrainRecord, TargetsRecord
from isd_repro.report import text
from isd_repro.report.records import Records, RunRecords

FINISHED = "finished"


@dataclass(frozen=True)
class Cost:
    """One attempt at one stage of one run."""

    run: str
    label: str
    stage: str
    attempt: int  # from 1
    outcome: str
    device: str
    threads: int
    seconds: float
    on_gpu: bool

    @property
    def cpu_hours(self) -> float:
        """Wall time times threads."""
        return self.seconds * self.threads / 3600

    @property
    def gpu_hours(self) -> float:
        """Wall time on one GPU; 0 without one."""
        return self.seconds / 3600 if self.on_gpu else 0.0


@dataclass(frozen=True)
class Plain:
    """A table of words, in no format yet; the first columns are text, the last `numbers` are numbers."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """As a Markdown table under no heading."""
        marks = [":---"] * (len(self.heads) - self.numbers) + ["---:"] * self.numbers
        lines = [self.heads, tuple(marks), *(tuple(text.markdown(cell) for cell in row) for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_run(found: RunRecords, label: str) -> list[Cost]:
    """Every attempt at every stage of a run, in order."""
    return [cost for part, record in found.every.items() for cost in _of_part(found.run, label, part, record)]


def _of_part(
    run: str, label: str, part: str, record: PretrainRecord | EvaluationRecord | TargetsRecord | CurveRecord
) -> Iterator[Cost]:
    machine = record.provenance.machine
    attempts = record.attempts if isinstance(record, PretrainRecord) else ()
    if not attempts:
        yield Cost(
            run,
            label,
            part,
            1,
            FINISHED,
            _device(record.provenance),
            machine.threads,
            record.provenance.seconds,
            bool(machine.gpu),
        )
    for at, one in enumerate(attempts, start=1):
        on_gpu = not one.device.lower().startswith("cpu")
        device = (machine.gpu or one.device) if on_gpu else machine.cpu
        yield Cost(run, label, part, at, one.outcome, device, machine.threads, one.seconds, on_gpu)


def _device(origin: Provenance) -> str:
    return origin.machine.gpu or origin.machine.cpu


def of_profile(params: Params, records: Records) -> list[Cost]:
    """Every attempt of every run of a profile, and of every evaluated checkpoint, in order."""
    costs = [cost for run, found in records.runs.items() for cost in of_run(found, params.runs[run].label)]
    for external in records.externals:
        record, machine = external.record, external.record.provenance.machine
        device, seconds = _device(record.provenance), record.provenance.seconds
        costs.append(
            Cost(record.name, external.label, "evaluate", 1, FINISHED, device, machine.threads, seconds, bool(machine.gpu))
        )
    return costs


def table(costs: Sequence[Cost]) -> Plain:
    """A row for each run, stage and outcome, and the sum of all."""
    grouped: dict[tuple[str, str, str, str], list[Cost]] = {}
    for cost in costs:
        grouped.setdefault((cost.label, cost.stage, cost.outcome, cost.device), []).append(cost)
    rows = [(*key[:3], str(len(members)), key[3], *_hours(members)) for key, members in grouped.items()]
    sums = [("All", "", "", str(len(costs)), "", *_hours(costs))] if costs else []
    lost = [cost for cost in costs if cost.outcome in ("failed", "killed")]
    notes = ["CPU-hours are wall time times threads, an upper bound of what was used."]
    if lost:
        notes.append(f"{len(lost)} attempts failed or were killed: {text.duration(sum(cost.seconds for cost in lost))}.")
    heads = ("Run", "Stage", "Outcome", "Attempts", "Device", "Wall time", "CPU-hours", "GPU-hours")
    return Plain("Cost", heads, (*rows, *sums), 3, tuple(notes))


def _hours(members: Sequence[Cost]) -> tuple[str, str, str]:
    total = sum(cost.seconds for cost in members)
    cpu, gpu = sum(cost.cpu_hours for cost in members), sum(cost.gpu_hours for cost in members)
    return text.duration(total), f"{cpu:.3f}", f"{gpu:.3f}" if gpu else "0"


def as_json(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """One flat mapping for each attempt."""
    return [
        {
            "run": cost.run,
            "stage": cost.stage,
            "attempt": cost.attempt,
            "outcome": cost.outcome,
            "device": cost.device,
            "threads": cost.threads,
            "seconds": cost.seconds,
            "cpu_hours": round(cost.cpu_hours, 6),
            "gpu_hours": round(cost.gpu_hours, 6),
        }
        for cost in costs
    ]
