"""What the pages of the protocols share: scores of a profile's finished runs, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isd_repro.config import reader
from isd_repro.report.hypothesis import by_class
from isd_repro.report.run_records import load
from isd_repro.train.collapse import EMBEDDING_STD


@dataclass(frozen=True)
class Run:
    """Scores of a finished run.

    Attributes:
        all, rare, large: percent by class, of the classes of the group.
        embedding_std: in the last epoch; None for a network that was not trained.
    """

    all: Mapping[str, float]
    rare: Mapping[str, float]
    large: Mapping[str, float]
    embedding_std: float | None = None


Runs = Mapping[str, Run]


def read(profile: Path, metric: str, encoder: Literal["student", "teacher"] = "student") -> dict[str, Run]:
    """The scores of every run of a profile that is trained and has this metric."""
    params, layout = reader.load(profile)
    records = load(params, layout)
    runs = {}
    for name, found in records.runs.items():
        if found.pretrain is not None and found.evaluation(metric) is not None:
            groups = [by_class(records, [name], (encoder, metric, group)) for group in ("all", "rare", "large")]
            curve = found.pretrain.curve
            runs[name] = Run(*groups, embedding_std=curve[-1].get(EMBEDDING_STD) if curve else None)
    return runs


def number(value: float | None) -> str:
    """Two decimals; nothing for nothing."""
    return "" if value is None else f"{value:.2f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
