"""Evaluate runs with a linear classifier trained on few labels.

The head is that of `linear` with the same settings, but it is trained only on a share of the labelled images. Both top-1 and
top-5 accuracy are reported.  # DEV-18
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from isd_repro.config.fields import Distinct, Frozen, Natural, Words, problems
from isd_repro.data.labelled import Labelled, labelled, percent
from isd_repro.evaluations import linear
from isd_repro.evaluations.linear import among_five, probe

if TYPE_CHECKING:
    from torch import Tensor

    from isd_repro.evaluations.subject import Outcome, Subject

TITLE = "Few labels"
TRAINS = True  # `verify` repeats it only with --linear
METRICS = r"few-[0-9.]{1,9}pct-(last|best)(-top5)?"
OWN_TABLE = True
NOTE = "The best epoch is chosen on the queries that it is scored on, so it is optimistic."


class Config(Frozen):
    """Which images are labelled; the settings of the head are those of `linear`."""

    fractions: Annotated[Distinct[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = (0.01, 0.1)
    lists_env: Words = ""  # environment variable naming a folder with 1percent.txt and so on; empty or unset: drawn
    seed: Natural = 0  # of the draw


def protocol(evaluation: Any) -> str:
    """The protocol of the linear head, as tables print it."""
    return f"linear, {evaluation.linear.protocol}, on the labelled images alone"


def columns(config: Config) -> list[str]:
    """Metrics in the order of their columns."""
    ends = [f"{which}{top}" for which in ("last", "best") for top in ("", "-top5")]
    return [f"few-{percent(fraction)}pct-{end}" for fraction in config.fractions for end in ends]


def head(metric: str) -> str:
    """The column heading of a metric: `few-10pct-best` gives `10 % of labels, best epoch`."""
    found = re.fullmatch(r"few-(.+)pct-(last|best)(-top5)?", metric)
    return f"{found[1]} % of labels, {found[2]} epoch{', top-5' if found[3] else ''}" if found else metric


def settings(evaluation: Any) -> dict[str, Any]:
    """The settings of the head and of the draw of labelled images, as the record states them."""
    own: Config = evaluation.few_label
    return {**evaluation.linear.model_dump(mode="json"), "fractions": list(own.fractions), "draw_seed": own.seed}


def inputs(subject: Subject, config: Config) -> dict[str, Any]:
    """The hashes of the labelled images; only runs with the same ones are compared in one table."""
    return {"labelled": {share: part.facts() for share, part in _parts(subject, config).items()}}


def missing(config: Config, stated: Mapping[str, Any]) -> str:
    """A message that names the list of labelled images which a record used and which is not available; "" if none is missing."""
    lists = [part["source"] for part in stated["labelled"].values() if part["source"] != "drawn"]
    if not lists or (config.lists_env and os.environ.get(config.lists_env)):
        return ""
    where = f"set {config.lists_env}" if config.lists_env else "evaluation.few_label.lists_env names no variable"
    return f"list {lists[0]} is not here ({where})"


class _Labelled(Frozen):
    """What a record states about the labelled images of one share."""

    images: Annotated[int, Field(ge=1, lt=2**53)]
    source: Words
    sha256: str
    list_sha256: str | None


def problem(stated: Mapping[str, Any]) -> str:
    """A message if a record does not state for every share which images were labelled; "" if it does."""
    try:
        parts = TypeAdapter(dict[str, _Labelled]).validate_python(stated.get("labelled"))
        fractions = TypeAdapter(tuple[float, ...]).validate_python(stated.get("fractions"))
    except ValidationError as error:
        return problems(error, "labelled.")
    shares = {percent(fraction) for fraction in fractions}
    return "" if shares == parts.keys() else f"labelled images of {sorted(parts)} %, fractions {sorted(shares)} %"


def notes(stated: Mapping[str, Any]) -> list[str]:
    """Notes on a record's settings, for its table."""
    parts = [
        f"{share} %, {part['images']:,} images"
        f" {'drawn by class' if part['source'] == 'drawn' else 'of the published list ' + part['source']}"
        for share, part in stated["labelled"].items()
    ]
    return [f"Labelled images: {'; '.join(parts)}."]


def evaluate(subject: Subject, config: Config) -> Outcome:
    """Train and score a linear head on every encoder, once for each share of labelled images."""
    from isd_repro.evaluations.subject import Outcome

    head_settings, label = subject.config(linear.Config), subject.split("query").label
    predictions: dict[str, Tensor] = {}
    best: dict[str, dict[str, int]] = {}
    for share, part in _parts(subject, config).items():
        subject.progress.say(f"{subject.name} few labels: {len(part.at)} images, {share} %, {part.source}")
        results = probe(subject, head_settings, part.split, part.at, title=f"few labels, {share} %")
        best[share] = {name: result.best_epoch for name, result in results.items()}
        for name, result in results.items():
            for which, first, among in (("last", result.last, result.last5), ("best", result.best, result.best5)):
                metric = f"{name}/few-{share}pct-{which}"
                predictions |= {metric: first, f"{metric}-top5": among_five(first, among, label)}
    return Outcome(predictions, {"best_epoch": best})


def _parts(subject: Subject, config: Config) -> dict[str, Labelled]:
    """The labelled images by share in percent."""
    return {
        percent(fraction): labelled(subject.prepared, fraction, config.lists_env, config.seed) for fraction in config.fractions
    }
