"""Cost of the runs: CPU- and GPU-hours of every attempt, including those that failed or were killed.

A stage's CPU-hours are its seconds times its threads, which is the time for which it occupied them and an upper bound of the time
that it used. For a run without a list of attempts they are the seconds of its record, which exclude work that was lost by a kill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from isd_repro.config.params import Params
from isd_repro.provenance import Provenance
from isd_repro.records import PretrainRecord
from isd_repro.report import text
from isd_repro.report.run_records import Records, RunRecords


class Cost(NamedTuple):
    """One attempt at one stage of one run."""

    label: str
    stage: str
    outcome: str
    device: str
    threads: int
    seconds: float
    on_gpu: bool


class CostTable(NamedTuple):
    """A format-independent table of text, whose last three columns are numbers."""

    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]
    heads: tuple[str, ...] = ("Run", "Stage", "Outcome", "Attempts", "Device", "Wall time", "CPU-hours", "GPU-hours")

    def markdown(self) -> str:
        """As a Markdown table under no heading."""
        marks = (*[":---"] * (len(self.heads) - 3), *["---:"] * 3)
        lines = [self.heads, marks, *(tuple(text.markdown(cell) for cell in row) for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_run(found: RunRecords, label: str) -> list[Cost]:
    """Every attempt at every stage of a run, in order."""
    costs = []
    for part, record in found.records.items():
        machine, attempts = record.provenance.machine, record.attempts if isinstance(record, PretrainRecord) else ()
        for one in attempts:
            on_gpu = not one.device.lower().startswith("cpu")
            device = (machine.gpu or one.device) if on_gpu else machine.cpu
            costs.append(Cost(label, part, one.outcome, device, machine.threads, one.seconds, on_gpu))
        costs += [] if attempts else [_finished(label, part, record.provenance)]
    return costs


def _finished(label: str, stage: str, origin: Provenance) -> Cost:
    machine = origin.machine
    return Cost(label, stage, "finished", machine.gpu or machine.cpu, machine.threads, origin.seconds, bool(machine.gpu))


def of_profile(params: Params, records: Records) -> list[Cost]:
    """Every attempt of every run of a profile, and of every evaluated checkpoint, in order."""
    costs = [cost for run, found in records.runs.items() for cost in of_run(found, params.runs[run].label)]
    return costs + [_finished(external.label, "evaluate", external.record.provenance) for external in records.externals]


def table(costs: Sequence[Cost]) -> CostTable:
    """A table with one row for each run, stage, outcome and device, and the sum of all."""
    grouped: dict[tuple[str, str, str, str], list[Cost]] = {}
    for cost in costs:
        grouped.setdefault((cost.label, cost.stage, cost.outcome, cost.device), []).append(cost)
    rows = [(*key[:3], str(len(members)), key[3], *_hours(members)) for key, members in grouped.items()]
    rows += [("All", "", "", str(len(costs)), "", *_hours(costs))] if costs else []
    lost = [cost.seconds for cost in costs if cost.outcome in ("failed", "killed")]
    notes = ["CPU-hours are wall-clock time times threads, an upper bound of the CPU time used."]
    notes += [f"{len(lost)} attempts failed or were killed: {text.duration(math.fsum(lost))}."] if lost else []
    return CostTable(rows, notes)


def _hours(members: Sequence[Cost]) -> tuple[str, str, str]:
    """Wall time, CPU-hours and GPU-hours of attempts that used one GPU or none."""
    cpu = math.fsum(cost.seconds * cost.threads for cost in members) / 3600
    gpu = math.fsum(cost.seconds for cost in members if cost.on_gpu) / 3600
    return text.duration(math.fsum(cost.seconds for cost in members)), f"{cpu:.3f}", f"{gpu:.3f}" if gpu else "0"
