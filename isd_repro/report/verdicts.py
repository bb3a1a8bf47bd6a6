"""One verdict for every number of a report, never better than what was done for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from isd_repro.report.faults import Fault, Key
from isd_repro.report.learning_curves import LAST
from isd_repro.report.records import RECOMPUTED, RECORDED, Records, RunRecords, part_of
from isd_repro.report.rendered import Place


class Verdict(StrEnum):
    """How far a number was verified."""

    RE_EVALUATED = "re-evaluated"  # the encoder is here and gives the stored prediction for every query
    RECOMPUTED = "recomputed"  # from the stored predictions
    RECORDED = "recorded only"  # nothing checks it
    FAILED = "failed"


TRANSFER = "transfer"
QUOTED = ("paper", "computed")  # kinds of cells that show the paper's numbers and none of ours
_WORST = (Verdict.FAILED, Verdict.RECORDED, Verdict.RECOMPUTED, Verdict.RE_EVALUATED)


@dataclass(frozen=True)
class Number:
    """One number of a rendered report.

    Attributes:
        kind: of the cell.
        runs: the runs, or the evaluated checkpoint, that it comes from.
        reason: of a failure: the file and key.
    """

    place: Place
    kind: str
    runs: tuple[str, ...]
    encoder: str
    metric: str
    group: str
    value: float
    verdict: Verdict
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """A flat mapping."""
        table, row, span, column = self.place
        return {
            "table": table,
            "row": row,
            "span": span,
            "column": column,
            "kind": self.kind,
            "runs": list(self.runs),
            "encoder": self.encoder,
            "metric": self.metric,
            "group": self.group,
            "value": self.value,
            "verdict": str(self.verdict),
            "reason": self.reason or None,
        }


@dataclass(frozen=True)
class Evidence:
    """What was found out about the records.

    Attributes:
        records: as loaded, faults included.
        faults: everything that is wrong with records, parameters, images, encoders and features.
        replayed: (run, encoder, metric) whose every stored prediction was given again by the encoder.
        cells: faults of single cells of the rendered report.
        snapshots: (run, epoch) whose every score was given again by the encoder kept then.
    """

    records: Records
    faults: Sequence[Fault]
    replayed: frozenset[tuple[str, str, str]]
    cells: Mapping[Place, Fault]
    snapshots: frozenset[tuple[str, int]] = frozenset()

    def of(self, run: str, key: Key) -> tuple[Verdict, str]:
        """Verdict of one score of a run or an evaluated checkpoint, and why it failed."""
        for fault in self.faults:
            if run in fault.runs and self._concerns(fault, run, key):
                return Verdict.FAILED, f"{fault.file}: {fault.key}"
        level = self._level(run, key)
        if level is None:
            return Verdict.FAILED, f"no record of {run} has {' '.join(key)}"
        if all((run, key[0], metric) in self.replayed for metric in self._metrics(run, key[1])):
            return Verdict.RE_EVALUATED, ""
        return (Verdict.RECORDED if level == RECORDED else Verdict.RECOMPUTED), ""

    def _metrics(self, run: str, metric: str) -> list[str]:
        """The metric itself, or that of every data set which the mean over all of them comes from."""
        found = self._records(run)
        sets = found.transfer.sets if found and found.transfer and metric == TRANSFER else ()
        return [f"{TRANSFER}-{key}" for key in sets] or [metric]

    def _concerns(self, fault: Fault, run: str, key: Key) -> bool:
        """A fault of one evaluation's record says nothing of another's numbers; one of a data set's is the mean's over all."""
        encoder, metric, _ = key
        mean = (
            metric == TRANSFER and fault.score is not None and fault.score[0] == encoder and part_of(fault.score[1]) == TRANSFER
        )
        if fault.score not in (None, key) and not mean:
            return False
        part, found = fault.file.stem, self._records(run)
        if part == "trajectory":  # its last point and the nearest neighbours are one encoder's: which of the two is right?
            return fault.key == LAST and part_of(metric) == "knn"
        here = {other.kind for other in found.of_one_encoder.values() if other.kind != "pretrain"} if found else set()
        return part not in here or part_of(metric) not in here or part_of(metric) == part

    def _level(self, run: str, key: Key) -> str | None:
        found, (encoder, metric, group) = self._records(run), key
        if found is None:
            return None
        if part_of(metric) != TRANSFER:
            evaluation = found.evaluation(metric)
            return evaluation.levels.get(key) if evaluation else None
        sets = found.transfer.sets if found.transfer else {}
        chosen = [sets.get(metric.removeprefix(f"{TRANSFER}-"))] if metric != TRANSFER else list(sets.values())
        levels = {one.levels.get((encoder, TRANSFER, group)) if one else None for one in chosen}
        return None if None in levels or not levels else RECORDED if RECORDED in levels else RECOMPUTED

    def states(self, run: str, key: Key) -> bool:
        """Whether a record of the run has this score."""
        return self._level(run, key) is not None

    def _records(self, run: str) -> RunRecords | None:
        return self.records.runs.get(run) or next(
            (external.found for external in self.records.externals if external.found.run == run), None
        )


def judge(cells: Mapping[Place, Mapping[str, Any]], evidence: Evidence, only: Iterable[str]) -> list[Number]:
    """A verdict for every cell that has a number of ours; `only` names the runs that are asked for, none for all."""
    wanted = set(only)
    externals = {external.label: external.found.run for external in evidence.records.externals}
    numbers = []
    for place, cell in cells.items():
        runs = tuple(cell["runs"])
        if cell["kind"] == "external":
            runs = (externals.get(cell["row"], cell["row"]),)
        if cell["value"] is None or not runs or cell["kind"] in (*QUOTED, "snapshot") or (wanted and not wanted & set(runs)):
            continue
        key = (cell["encoder"], cell["metric"], cell["group"])
        of_all = [evidence.of(run, key) for run in dict.fromkeys(runs)]
        verdict, reason = min(of_all, key=lambda found: _WORST.index(found[0]))
        if place in evidence.cells:
            fault = evidence.cells[place]
            verdict, reason = Verdict.FAILED, f"{fault.file}: {fault.key}"
        numbers.append(Number(place, cell["kind"], runs, *key, cell["value"], verdict, reason))
    return numbers


def judge_snapshots(evidence: Evidence, only: Iterable[str], place: Callable[[str], tuple[str, str, str]]) -> list[Number]:
    """A verdict for every score of every snapshot: no predictions are stored, so without the file it is recorded only.

    A run's last snapshot is its encoder, and its scores are what the run's own record makes of them.

    Args:
        evidence: as for `judge`.
        only: runs that are asked for; none for all.
        place: table, label and first metric of a run; that metric's numbers are cells of the table.
    """
    wanted, numbers = set(only), []
    for run, found in evidence.records.runs.items():
        record = found.trajectory
        if record is None or (wanted and run not in wanted):
            continue
        own = [fault for fault in evidence.faults if run in fault.runs and fault.file.stem == "trajectory"]
        for point in record.points:
            for score in point.scores:
                key = (score.encoder, score.metric, score.group)
                verdict, reason = Verdict.RECORDED, ""
                if own:
                    verdict, reason = Verdict.FAILED, f"{own[0].file}: {own[0].key}"
                elif point is record.points[-1] and evidence.states(run, key):
                    verdict, reason = evidence.of(run, key)
                elif (run, point.epoch) in evidence.snapshots:
                    verdict = Verdict.RE_EVALUATED
                table, label, first = place(run)
                beside = "" if score.metric == first else f", {score.metric}"
                where = (table, f"{label}, {score.encoder}, {score.group}{beside}", "Epoch", str(point.epoch))
                if where in evidence.cells:
                    verdict, reason = Verdict.FAILED, f"{evidence.cells[where].file}: {evidence.cells[where].key}"
                numbers.append(Number(where, "snapshot", (run,), *key, score.top1, verdict, reason))
    return numbers


def counts(numbers: Iterable[Number]) -> dict[str, Counter[Verdict]]:
    """How many numbers have each verdict, by run; those of several runs under one name of their own."""
    found: dict[str, Counter[Verdict]] = {}
    for number in numbers:
        name = number.runs[0] if len(number.runs) == 1 else "differences and means"
        found.setdefault(name, Counter())[number.verdict] += 1
    return found
