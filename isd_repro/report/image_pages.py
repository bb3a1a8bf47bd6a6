"""Pages with images: clusters, nearest anchors, t-SNE. Rendered from the facts that `figures.json` holds, and thumbnails.

Names of classes and files come from strangers: the templates escape all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isd_repro.report import figures, page

Facts = Mapping[str, Any]
_COLOURS = 5
_LEGEND = 24  # letters of a class name


@dataclass(frozen=True)
class Mark:
    """A point of a panel in px."""

    x: float
    y: float
    number: int  # of its class
    title: str

    @property
    def hollow(self) -> bool:
        """The second five classes have the colours of the first, and a hollow diamond for their disc."""
        return self.number // _COLOURS % 2 == 1


@dataclass(frozen=True)
class Panel:
    """One drawing: its corner in px, what stands above it, its points."""

    x: float
    y: float
    title: str
    note: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Plane:
    """All panels of one run, with a legend."""

    title: str
    width: float
    height: float
    side: float  # of a panel
    legend: tuple[Mark, ...]
    panels: tuple[Panel, ...]


def ready() -> None:
    """`UserError` where jinja2 is missing."""
    page.environment("html")


def positions(facts: Facts) -> set[int]:
    """Images that the pages show, as positions in the store."""
    return {image["position"] for image in _images(facts)}


def sheets(facts: Facts) -> list[tuple[str, list[list[int]], str]]:
    """What a tracker shows of the pages: a key, the images of each row as positions in the store, and a caption."""
    clusters = [[image["position"] for image in row["members"]] for row in facts["clusters"]["shown"]]
    anchors = [[image["position"] for image in (row["query"], *row["anchors"])] for row in facts["anchors"]["shown"]]
    who, bank = facts["clusters"]["encoder"], facts["anchors"]["bank"]
    return [
        ("clusters", clusters, f"Random members of random clusters, one a row: k-means of the search images under the {who}."),
        (
            "anchors",
            anchors,
            f"Queries (first column) and their nearest of {bank['images']} anchors under the {bank['encoder']}.",
        ),
    ]


def shown(facts: Facts) -> dict[str, float]:
    """The same in numbers, in percent."""
    found = facts["clusters"]
    return {"clusters/purity": found["purity"], "clusters/purity_of_shuffled_labels": found["purity_of_shuffled_labels"]}


def config(facts: Facts) -> dict[str, Any]:
    """What was asked for, and of which encoder."""
    asked = {"clusters": facts["clusters"]["k"], "anchors": facts["anchors"]["bank"]["images"], "seed": facts["seed"]}
    return {**asked, "encoder_sha256": facts["encoder_sha256"], "versions": facts["versions"]}


def _images(facts: Facts) -> Iterator[Mapping[str, Any]]:
    for row in facts["clusters"]["shown"]:
        yield from row["members"]
    for row in facts["anchors"]["shown"]:
        yield row["query"]
        yield from row["anchors"]


def render(facts: Facts, thumbs: Mapping[int, str]) -> dict[str, bytes]:
    """The pages and the drawing, by file name; `thumbs` are addresses of images by position."""
    environment = page.environment("html")
    environment.filters.update(percent=lambda value: f"{100 * value:.1f}", probability=probability)
    known = {
        "f": facts,
        "thumbs": thumbs,
        "style": page.template_text("style.css") + page.template_text("gallery.css"),
        "css": page.template_text("figure.css"),
        "provenance": _provenance(facts),
    }
    every = {cluster["cluster"]: cluster for cluster in facts["clusters"]["all"]}
    files = {
        "clusters.html": environment.get_template("clusters.html.jinja").render(every=every, **known),
        "anchors.html": environment.get_template("anchors.html.jinja").render(
            log_k=math.log(facts["anchors"]["bank"]["images"]), **known
        ),
        "tsne.svg": environment.get_template("tsne.svg.jinja").render(p=plane(facts), **known),
    }
    return {name: content.encode("utf-8") for name, content in files.items()}


def lines(facts: Facts) -> list[str]:
    """What a terminal is told."""
    found, near, drawn = facts["clusters"], facts["anchors"], facts["tsne"]
    shuffled = f"(labels shuffled: {found['purity_of_shuffled_labels']:.1f} %), {found['encoder']}"
    said = [f"clusters: {found['k']} of {found['images']} images, purity {found['purity']:.1f} % {shuffled}"]
    softness = [
        f"{who} entropy {mean['entropy']:.2f} nats, top-10 mass {100 * mean['top10']:.1f} %"
        for who, mean in near["mean_spread"].items()
    ]
    about = "; ".join(softness) or "no temperature, so no probabilities"
    said.append(f"anchors: bank of {near['bank']['images']}, {about}; one-hot: 0 nats")
    said += [f"t-SNE {_epoch(panel)}: nearest other point of its class {panel['neighbours']:.1f} %" for panel in drawn["panels"]]
    return said


def probability(value: float) -> str:
    """0.123, 0.004, <0.001: as the paper prints them, without a zero that is none."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "<0.001"


def _provenance(facts: Facts) -> list[tuple[str, str]]:
    keys = ("profile", "run", "dataset", "subset", "manifest", "encoder_sha256", "features_sha256", "seed", "source")
    rows = [(key.replace("_", " "), str(facts[key])) for key in keys]
    return [*rows, ("method", ", ".join(f"{key} {value}" for key, value in facts["method"].items())), ("versions", _pairs(facts))]


def _pairs(facts: Facts) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def plane(facts: Facts) -> Plane:
    """Geometry of the t-SNE drawing: three panels a row, each scaled to its own extent with equal axes."""
    drawn = facts["tsne"]
    names = drawn["classes"]
    across = min(3, len(drawn["panels"]))
    width = figures.WIDTH if across > 1 else 620.0
    gap, head = 24.0, 46.0
    side = (width - gap * (across - 1)) / across
    columns = 5 if across > 1 else 3
    shown = [name if len(name) <= _LEGEND else f"{name[: _LEGEND - 1]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    legend = [Mark(6 + at % columns * width / columns, 46 + 22 * (at // columns), at, name) for at, name in enumerate(shown)]
    top = 46 + 22 * math.ceil(len(names) / columns)
    panels = []
    for at, panel in enumerate(drawn["panels"]):
        x, y = at % across * (side + gap), top + at // across * (side + head + 12) + head
        spots = _scaled(panel["points"], x, y, side)
        marks = [Mark(*spot, cls, names[cls]) for spot, cls in zip(spots, drawn["class_of_point"], strict=True)]
        title = _epoch(panel)
        panels.append(Panel(x, y, title[0].upper() + title[1:], f"1-NN here {panel['neighbours']:.1f} %", tuple(marks)))
    height = top + math.ceil(len(panels) / across) * (side + head + 12)
    title = f"{facts['label']}: t-SNE of {len(drawn['class_of_point'])} validation images, {drawn['encoder']}"
    return Plane(title, width, height, side, tuple(legend), tuple(panels))


def _epoch(panel: Mapping[str, Any]) -> str:
    return "final encoder" if panel["epoch"] is None else f"epoch {panel['epoch']}"


def _scaled(points: Sequence[Sequence[float]], x: float, y: float, side: float) -> list[tuple[float, float]]:
    """Points in a square with a margin, the same scale along both axes; one place for all is the middle."""
    low = [min(point[axis] for point in points) for axis in (0, 1)]
    high = [max(point[axis] for point in points) for axis in (0, 1)]
    scale = (side - 20) / (max(high[axis] - low[axis] for axis in (0, 1)) or 1.0)
    middle = [(low[axis] + high[axis]) / 2 for axis in (0, 1)]
    return [(x + side / 2 + (a - middle[0]) * scale, y + side / 2 - (b - middle[1]) * scale) for a, b in points]
