"""Pages with images (clusters, nearest anchors, t-SNE), rendered from the facts in `figures.json` and from thumbnails.

Names of classes and files are untrusted, so the templates escape all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from isd_repro.report import figures
from isd_repro.report.templating import environment, template_text

Facts = Mapping[str, Any]


def sheets(facts: Facts) -> list[tuple[str, list[list[int]], str]]:
    """The pictures that a tracker shows: a key, the images of each row as positions in the store, and a caption."""
    clusters = [[image["position"] for image in row["members"]] for row in facts["clusters"]["shown"]]
    anchors = [[image["position"] for image in (row["query"], *row["anchors"])] for row in facts["anchors"]["shown"]]
    who, bank = facts["clusters"]["encoder"], facts["anchors"]["bank"]
    members = f"Random members of random clusters, one cluster per row: k-means of the search images under the {who}."
    near = f"Queries (first column) and their nearest of {bank['images']} anchors under the {bank['encoder']}."
    return [("clusters", clusters, members), ("anchors", anchors, near)]


def config(facts: Facts) -> dict[str, Any]:
    """The options of the command, and the encoder."""
    asked = {"clusters": facts["clusters"]["k"], "anchors": facts["anchors"]["bank"]["images"], "seed": facts["seed"]}
    return {**asked, "encoder_sha256": facts["encoder_sha256"], "versions": facts["versions"]}


def positions(facts: Facts) -> set[int]:
    """The positions in the store of all images that the pages show."""
    return {position for _, rows, _ in sheets(facts) for row in rows for position in row}


def render(facts: Facts, thumbs: Mapping[int, str]) -> dict[str, bytes]:
    """The pages and the drawing, by file name; `thumbs` are `data:` URIs of images by position."""
    templates = environment("html")
    templates.filters.update(percent=lambda value: f"{100 * value:.1f}", probability=probability)
    keys = ("profile", "run", "dataset", "subset", "manifest", "encoder_sha256", "features_sha256", "seed", "source")
    provenance = [(key.replace("_", " "), str(facts[key])) for key in keys]
    provenance += [(part, ", ".join(f"{key} {value}" for key, value in facts[part].items())) for part in ("method", "versions")]
    about = {"f": facts, "thumbs": thumbs, "provenance": provenance}
    about |= {"style": template_text("style.css") + template_text("gallery.css")}
    about |= {"every": {cluster["cluster"]: cluster for cluster in facts["clusters"]["all"]}}
    about |= {"log_k": math.log(facts["anchors"]["bank"]["images"])}
    pages = ("clusters.html", "anchors.html")
    files = {name: templates.get_template(f"{name}.jinja").render(about) for name in pages}
    files["tsne.svg"] = figures.embedding(facts["tsne"]).svg()
    return {name: content.encode("utf-8") for name, content in files.items()}


def probability(value: float) -> str:
    """A probability as text, such as 0.123, 0.004 or <0.001, so that a positive value is never printed as zero."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "<0.001"
