"""The reviewers' workspace and report in W&B, built from code: the same facts give the same bytes.

What is sent is what `--dry-run` writes. W&B's public models make it; their random ids of panels are numbered instead.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isd_repro.config.params import Tracking
from isd_repro.runtime.errors import UserError
from isd_repro.tracking import names, session
from isd_repro.tracking.publish import mode_of, remember, remembered
from isd_repro.tracking.session import brief

_COLUMNS = 24  # of W&B's grid
HEALTH = {
    "Embedding spread (0: collapsed, 1: whole sphere)": "spread",
    "Teacher-student gap (1 - cosine)": "gap",
    "Bank purity (nearest anchors of the same class)": "purity",
}
COST = {"Images per second": "images_per_second", "Peak memory, MiB": "memory_mib", "Seconds": "seconds"}
_UPSERT = """
mutation UpsertReviewView($id: ID, $entityName: String, $projectName: String, $type: String, $name: String,
    $displayName: String, $description: String, $spec: String!) {
  upsertView(input: {id: $id, entityName: $entityName, projectName: $projectName, name: $name, displayName: $displayName,
      description: $description, type: $type, spec: $spec, createdUsing: WANDB_SDK}) {
    view { id name }
    inserted
  }
}
"""


@dataclass(frozen=True)
class Facts:
    """What the dashboard says, with nothing of W&B in it.

    Attributes:
        profile: its name.
        title: of the report.
        results: the tables, with the paper's columns where the profile has them, as Markdown.
        failures: what is missing or failed, as Markdown.
        cost: time and machines, as Markdown.
        groups: query groups that bars are drawn for.
        encoders: `student`, and `teacher` where some run has one.
        neighbours: numbers of neighbours.
        trajectories: whether some run has scores over its training.
        few_label: its metrics, as `few-10pct-last`; empty where it was not run.
        transfer: target data sets; empty likewise.
    """

    profile: str
    title: str
    results: str
    failures: str
    cost: str
    groups: Sequence[str]
    encoders: Sequence[str]
    neighbours: Sequence[int]
    trajectories: bool = False
    few_label: Sequence[str] = ()
    transfer: Sequence[str] = ()


def build(facts: Facts, tracking: Tracking) -> dict[str, Any]:
    """The whole specification: `report` and `workspace`, each with the name, type and spec that W&B stores.

    Raises:
        UserError: wandb or wandb-workspaces is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the package's own, at its import
            import wandb_workspaces.reports.v2 as reports
            import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed", "install the extra `tracking` of isd-repro") from error
    entity = tracking.entity or "entity"
    report = reports.Report(
        project=tracking.project,
        entity=entity,
        title=facts.title[:128],
        description=f"Built by `isd-repro wandb dashboard` from the records of profile {facts.profile}.",
        blocks=_blocks(facts, reports),
        width="fluid",
    )
    sections = [
        workspaces.Section(name=title, panels=panels, is_open=at < 2)
        for at, (title, panels) in enumerate(_panels(facts, reports).items())
        if panels
    ]
    workspace = workspaces.Workspace(
        entity=entity,
        project=tracking.project,
        name=f"ISD review {facts.profile}",
        sections=sections,
        runset_settings=workspaces.RunsetSettings(filters=_filter(facts)),
    )
    return {
        "report": _view(f"isd-review-{facts.profile}", "runs", report.title, report.description, report._to_model().spec),  # noqa: SLF001
        "workspace": _view(_view_name(facts.profile), "project-view", workspace.name, "", workspace._to_model().spec),  # noqa: SLF001
    }


def send(specification: Mapping[str, Any], tracking: Tracking, root: Path) -> list[str]:
    """Create or renew both views; the project must exist. What was made before is renewed and not made twice.

    Returns:
        the views' ids.

    Raises:
        UserError: W&B cannot be used or did not take them.
    """
    if mode_of(tracking) == "offline":
        raise UserError("WANDB_MODE=offline: a dashboard lives on the server", "use --dry-run FILE, or WANDB_MODE=online")
    import wandb
    from wandb_workspaces._graphql import execute_graphql

    try:
        api = wandb.Api(timeout=int(session.INIT_TIMEOUT))
        entity = tracking.entity or api.default_entity
        key = names.digest({"server": os.environ.get("WANDB_BASE_URL", ""), "entity": entity, "project": tracking.project})[:16]
        ids = remembered(root, f"views-{key}")
        for part, view in specification.items():
            values = {
                **{key: value for key, value in view.items() if key != "spec"},
                "id": ids.get(f"{part}-{view['name']}"),
                "entityName": entity,
                "projectName": tracking.project,
                "spec": json.dumps(view["spec"], sort_keys=True),
            }
            made = execute_graphql(api, _UPSERT, values)["upsertView"]["view"]
            ids[f"{part}-{view['name']}"] = made["id"]
            remember(root, f"views-{key}", ids)
    except Exception as error:
        raise UserError(
            f"W&B did not take the dashboard ({brief(error)})", "publish the runs first, then run the same command again"
        ) from error
    return [ids[f"{part}-{view['name']}"] for part, view in specification.items()]


def _view(name: str, kind: str, title: str, description: str, spec: Any) -> dict[str, Any]:
    plain = json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))
    _number(plain, [0])
    return {"name": name, "type": kind, "displayName": title, "description": description, "spec": plain}


def _view_name(profile: str) -> str:
    """A workspace's name as W&B's own client writes it."""
    return f"nw-{names.digest({'profile': profile})[:11]}-v"


def _number(node: Any, count: list[int]) -> None:
    """Number what W&B's models give random ids to: panels and run sets."""
    if isinstance(node, list):
        for each in node:
            _number(each, count)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "__id__" or (key == "id" and "runFeed" in node):
                count[0] += 1
                node[key] = f"isd{count[0]:08d}"
            else:
                _number(value, count)


def _filter(facts: Facts, job_type: str = "") -> str:
    tag = f"Tags in ['profile:{facts.profile}']"
    return f"{tag} and JobType = '{job_type}'" if job_type else tag


def _blocks(facts: Facts, reports: Any) -> list[Any]:
    """The report, in the order in which a reviewer asks."""
    panels = _panels(facts, reports)

    def grid(title: str, job_types: Sequence[str], *sections: str) -> list[Any]:
        sets = [reports.Runset(name=job_type, filters=_filter(facts, job_type)) for job_type in job_types]
        return [reports.H1(title), reports.PanelGrid(runsets=sets, panels=[panel for name in sections for panel in panels[name]])]

    return [
        reports.TableOfContents(),
        reports.MarkdownBlock(text=facts.results),
        *grid("All and rare queries", ["knn"], "Scores"),
        *(grid("Student and teacher over training", ["trajectory"], "Trajectory") if facts.trajectories else []),
        *grid("Student and teacher by epoch of the linear head", ["linear"], "Linear"),
        *(grid("Few labels", ["few_label"], "Few labels") if facts.few_label else []),
        *(grid("Transfer", ["transfer"], "Transfer") if facts.transfer else []),
        *grid("Learning and health", ["pretrain"], "Learning", "Health"),
        *grid("What a network sees and finds", ["pretrain", "knn", "figures"], "Pictures"),
        reports.H1("Failures"),
        reports.MarkdownBlock(text=facts.failures),
        reports.PanelGrid(
            runsets=[reports.Runset(name="failed", filters="State in ['failed', 'crashed'] and " + _filter(facts))],
            panels=[
                reports.LinePlot(title="Loss of failed runs", x="epoch", y=["loss"], layout=reports.Layout(0, 0, _COLUMNS, 8))
            ],
        ),
        reports.H1("Cost"),
        reports.MarkdownBlock(text=facts.cost),
        *grid("Speed and memory", ["pretrain"], "Cost")[1:],
    ]


def _panels(facts: Facts, reports: Any) -> dict[str, list[Any]]:
    """Panels by section; two or three in a row."""

    def lines(charts: Mapping[str, Sequence[str]]) -> list[Any]:
        width = _COLUMNS // min(3, len(charts))
        return [
            reports.LinePlot(title=title, x="epoch", y=list(keys), layout=reports.Layout(at % 3 * width, at // 3 * 8, width, 8))
            for at, (title, keys) in enumerate(charts.items())
        ]

    def bars(charts: Mapping[str, Sequence[str]]) -> list[Any]:
        """One chart for each title and encoder; keys are those behind the encoder's name."""
        half = _COLUMNS // 2
        return [
            reports.BarPlot(
                title=title.format(encoder),
                metrics=[f"{encoder}/{key}" for key in keys],
                layout=reports.Layout(column * half, row * 8, half, 8),
            )
            for row, (title, keys) in enumerate(charts.items())
            for column, encoder in enumerate(facts.encoders)
        ]

    groups = " and ".join(facts.groups)
    by_epoch = {
        f"{k}-NN, {group}": [f"{encoder}/{k}-NN/{group}" for encoder in facts.encoders]
        for k in facts.neighbours
        for group in facts.groups
    }
    keys = ["views", *(f"nearest-{encoder}" for encoder in facts.encoders), "anchors", "clusters"]
    return {
        "Scores": bars({f"{k}-NN, {{}}: {groups}": [f"{k}-NN/{group}" for group in facts.groups] for k in facts.neighbours}),
        "Trajectory": lines(by_epoch) if facts.trajectories else [],
        "Linear": lines(
            {"Top-1 of the linear head": [f"{e}/top1" for e in facts.encoders], "Its loss": [f"{e}/loss" for e in facts.encoders]}
        ),
        "Few labels": bars(
            {f"{metric}, {{}}: {groups}": [f"{metric}/{group}" for group in facts.groups] for metric in facts.few_label}
        ),
        "Transfer": bars({"Transfer, {}": facts.transfer} if facts.transfer else {}),
        "Learning": lines({"Loss": ["loss"], "Learning rate": ["lr"]}),
        "Health": lines({title: [key] for title, key in HEALTH.items()}),
        "Pictures": [
            reports.MediaBrowser(
                title="Views, neighbours, anchors and clusters",
                media_keys=[names.image(key) for key in keys],
                layout=reports.Layout(0, 0, _COLUMNS, 12),
            )
        ],
        "Cost": lines({title: [key] for title, key in COST.items()}),
    }
