"""Scores as a person and a tracker read them."""

from __future__ import annotations

from collections.abc import Iterable

from isd_repro.records import Score


def line(run: str, score: Score) -> str:
    """One plain line: `isd student 1-NN all 78.3 % (n=1000)`."""
    return f"{run} {score.encoder} {score.metric} {score.group} {score.top1:.1f} % (n={score.n})"


def row(scores: Iterable[Score]) -> dict[str, float]:
    """top1 in percent under `<encoder>/<metric>/<group>`."""
    return {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in scores}
