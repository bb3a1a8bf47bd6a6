"""Command `wandb dashboard`: the reviewers' workspace and report in W&B, described from the committed records only.

The description is plain data: `--dry-run` writes it to a file, and `tracking.saved_views` turns it into W&B's objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.records import AnyEvaluation, CurveRecord
from isd_repro.report import page, run_records
from isd_repro.report.publish import evaluations_of, rows_of
from isd_repro.report.run_records import Records
from isd_repro.runtime.files import write_atomic
from isd_repro.tracking import names, saved_views, session
from isd_repro.tracking.anonymous import Scrubber, secrets
from isd_repro.tracking.publisher import project_of

HEALTH = {
    "Embedding std (0: collapsed, 1: uniform on the sphere)": ["spread"],
    "Cosine distance between student and teacher": ["gap"],
    "Bank purity (nearest bank images of the same class)": ["purity"],
}
COST = {"Images per second": ["images_per_second"], "Peak memory, MiB": ["memory_mib"]}
_PICTURE = re.compile(r"^!\[.*\]\(.*\)\n?", re.MULTILINE)  # of the page; W&B draws its own
_METHOD = "method.name"


def dashboard(params: Params, layout: Layout, dry_run: Path | None, *, anonymous: bool, console: Console) -> None:
    """Write the description to a file, or build the views in W&B.

    Raises:
        DataError: a record is damaged.
        UserError: a package is missing, or W&B cannot be used or reports an error.
    """
    tracking = project_of(params.tracking, anonymous=anonymous)
    views = describe(params, layout)
    if anonymous:
        views = Scrubber(secrets(layout.root)).value(views)
    if dry_run is not None:
        content = json.dumps(views, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(dry_run, content.encode())
        console.print(f"{dry_run}: description of the views; nothing was sent", highlight=False, markup=False, soft_wrap=True)
        return
    with session.hide_identity(anonymous):
        addresses = saved_views.save(views, tracking, layout.root)
    for address in addresses:
        console.print(address, highlight=False, markup=False, soft_wrap=True)


def describe(params: Params, layout: Layout) -> dict[str, Any]:
    """Both views: `report` with its blocks, and `workspace` with its sections of panels."""
    assembled = page.assemble(params, run_records.load(params, layout), layout)
    sections = _sections(params, assembled.records)
    tag = f"Tags in ['profile:{params.profile}']"
    tables = _PICTURE.sub("", page.render(assembled)["table.md"].decode())
    blocks: list[dict[str, Any]] = [{"markdown": tables}]
    for title, (job_types, panels) in sections.items():
        sets = [{"name": job_type, "filter": f"{tag} and JobType = '{job_type}'"} for job_type in job_types]
        blocks += [{"heading": title}, {"runs": sets, "panels": panels}]
    failed = {"name": "failed", "filter": f"State in ['failed', 'crashed'] and {tag}"}
    blocks += [{"heading": "Failed runs"}, {"runs": [failed], "panels": [_panel("lines", "Loss of failed runs", ["loss"])]}]
    return {
        "report": {
            "title": params.report.title[:128],
            "description": f"Built by `isd-repro wandb dashboard` from the records of profile {params.profile}.",
            "blocks": blocks,
        },
        "workspace": {
            "name": f"ISD review {params.profile}",
            "filter": tag,
            "sections": [{"title": title, "panels": panels} for title, (_, panels) in sections.items()],
        },
    }


def _panel(kind: str, title: str, keys: Sequence[str], group_by: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "title": title, "keys": list(keys), **({"group_by": group_by} if group_by else {})}


def _sections(params: Params, found: Records) -> dict[str, tuple[list[str], list[dict[str, Any]]]]:
    """Job types and panels by title, in the order in which a reviewer would look at them."""
    evaluations = [record for run in found.runs.values() for record in evaluations_of(run)]
    encoders = list(dict.fromkeys(key.partition("/")[0] for one in evaluations for key in rows_of(one)[-1] if "/" in key))
    scores: dict[str, list[dict[str, Any]]] = {}
    finals: list[str] = []
    for kind in dict.fromkeys(one.kind for one in evaluations):
        records_of_kind = [one for one in evaluations if one.kind == kind]
        scores[kind], keys = _score_panels(records_of_kind)
        finals += [] if isinstance(records_of_kind[0], CurveRecord) else [key for key in keys if key.endswith(("/all", "/rare"))]
    health = {"Loss": ["loss"], "Learning rate": ["lr"], **HEALTH}
    pictures = [names.image(key) for key in ("views", *(f"nearest-{encoder}" for encoder in encoders), "anchors", "clusters")]
    heads = [_panel("lines", "Top-1 of the head by epoch", [f"{each}/top1" for each in encoders])]
    heads += [_panel("lines", "Loss of the head by epoch", [f"{each}/loss" for each in encoders])]
    columns = ["c:method.name", "c:optim.lr", "c:optim.epochs", "c:numerics.seed", *_varied(params), *finals[:4]]
    compared = [_panel("parallel", "Parameters and scores of every run", list(dict.fromkeys(columns)))] if finals else []
    compared += [_panel("bars", f"{key}: mean and s.d. by method", [key], _METHOD) for key in finals[:4]]
    return {
        **{f"Scores: {kind}": ([kind], panels) for kind, panels in scores.items()},
        **({"Comparison of runs": (["summary"], compared)} if compared else {}),
        **({"Heads": (list(scores), heads)} if scores else {}),
        "Training": (["pretrain"], [_panel("lines", title, keys) for title, keys in health.items()]),
        "Mean and s.d. by method": (["pretrain"], [_panel("lines", title, keys, _METHOD) for title, keys in health.items()]),
        "Images: views, neighbours and clusters": (
            ["pretrain", *scores, "figures"],
            [_panel("media", "Views, neighbours, anchors and clusters", pictures)],
        ),
        "Speed and memory": (["pretrain"], [_panel("lines", title, keys) for title, keys in COST.items()]),
    }


def _score_panels(evaluations: Sequence[AnyEvaluation]) -> tuple[list[dict[str, Any]], list[str]]:
    """One panel per metric (bars of the groups under one encoder, or curves of all encoders), and the keys that are drawn."""
    every = dict.fromkeys(key for one in evaluations for row in rows_of(one) for key in row if "/" in key)
    keys = [key for key in every if not key.endswith("/large")]
    panels: dict[str, list[str]] = {}
    curves = isinstance(evaluations[0], CurveRecord)
    for key in keys:
        encoder, _, rest = key.partition("/")
        metric = rest.partition("/")[0] if "/" in rest else ""
        title = rest.replace("/", ", ") if curves else ", ".join(filter(None, [metric, encoder]))
        panels.setdefault(title, []).append(key)
    return [_panel("lines" if curves else "bars", title, drawn) for title, drawn in panels.items()], keys


def _varied(params: Params) -> list[str]:
    """Parameters of methods that differ between the profile's runs."""
    values: dict[str, set[str]] = {}
    for run in params.runs.values():
        for key, value in run.method.model_dump(mode="json").items():
            values.setdefault(f"c:method.{key}", set()).add(repr(value))
    return [key for key, found in values.items() if len(found) > 1]
