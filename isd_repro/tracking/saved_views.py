"""Creates W&B's workspace and report from a plain description, or updates those that exist."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isd_repro.config.params import Tracking
from isd_repro.runtime.errors import UserError
from isd_repro.tracking import names, session
from isd_repro.tracking.publisher import mode_of, notes_folder, write_note
from isd_repro.tracking.session import brief

_COLUMNS, _HEIGHT = 24, 8  # of W&B's grid, and of a panel


def save(views: Mapping[str, Any], tracking: Tracking, root: Path) -> list[str]:
    """Create the views, or update those that an earlier call created.

    Args:
        views: `report` (title, description, blocks) and `workspace` (name, filter, sections). A block is a `heading`, a
            `markdown`, or `panels` over `runs`, each with a name and a filter; a panel has a kind, a title and keys.
        tracking: project and entity.
        root: the repository, where the URLs of the views are noted.

    Returns:
        the URLs of report and workspace.

    Raises:
        UserError: a package is missing, or W&B cannot be used or reports an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the package's own, at its import
            import wandb_workspaces.reports.v2 as reports
            import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("wandb-workspaces is not installed", "install the extra `tracking` of isd-repro") from error
    folder = session.folder_of(root)
    session.prepare(folder)
    if mode_of(tracking) == "offline":
        raise UserError(
            "WANDB_MODE=offline: a dashboard exists only on the W&B server", "use --dry-run FILE, or WANDB_MODE=online"
        )
    import wandb

    title = views["workspace"]["name"]
    note = notes_folder(folder, tracking, "online") / "views.json"
    noted = names.read_json(note)
    try:
        entity = tracking.entity or wandb.Api(timeout=int(session.INIT_TIMEOUT)).default_entity
        place = {"entity": entity, "project": tracking.project}
        report = reports.Report(
            **place,
            title=views["report"]["title"],
            description=views["report"]["description"],
            blocks=[reports.TableOfContents(), *_blocks(views["report"]["blocks"], reports)],
            width="fluid",
        )
        report.id = noted.get(f"report {title}", "")
        report.save()
        write_note(note, noted := {**noted, f"report {title}": report.id})
        known = noted.get(f"workspace {title}")
        workspace = workspaces.Workspace.from_url(known) if known else workspaces.Workspace(**place)
        workspace.name = title
        workspace.runset_settings = workspaces.RunsetSettings(filters=views["workspace"]["filter"])
        workspace.sections = [
            workspaces.Section(name=section["title"], panels=_panels(section["panels"], reports), is_open=at < 2)
            for at, section in enumerate(views["workspace"]["sections"])
        ]
        workspace.save()
        write_note(note, {**noted, f"workspace {title}": workspace.url})
    except Exception as error:
        hint = "publish the runs first, then run the same command again"
        raise UserError(f"W&B did not accept the dashboard ({brief(error)})", hint) from error
    return [report.url, workspace.url]


def _blocks(blocks: Sequence[Mapping[str, Any]], reports: Any) -> list[Any]:
    made = []
    for block in blocks:
        if "heading" in block:
            made.append(reports.H1(block["heading"]))
        elif "markdown" in block:
            made.append(reports.MarkdownBlock(text=block["markdown"]))
        else:
            sets = [reports.Runset(name=runs["name"], filters=runs["filter"]) for runs in block["runs"]]
            made.append(reports.PanelGrid(runsets=sets, panels=_panels(block["panels"], reports)))
    return made


def _panels(panels: Sequence[Mapping[str, Any]], reports: Any) -> list[Any]:
    """Arrange panels in rows of two or three; tables of images and parallel coordinates take a full row."""
    made, column, row = [], 0, 0
    across = min(3, sum(panel["kind"] in {"lines", "bars"} for panel in panels) or 1)
    for panel in panels:
        width = _COLUMNS // across if panel["kind"] in {"lines", "bars"} else _COLUMNS
        if column + width > _COLUMNS:
            column, row = 0, row + _HEIGHT
        made.append(_panel(panel, reports.Layout(column, row, width, _HEIGHT), reports))
        column += width
    return made


def _panel(panel: Mapping[str, Any], layout: Any, reports: Any) -> Any:
    title, keys = panel["title"], panel["keys"]
    grouped: dict[str, Any] = {}
    if "group_by" in panel:
        grouped = {"groupby": reports.Config(panel["group_by"]), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    if panel["kind"] == "lines":
        return reports.LinePlot(title=title, x="epoch", y=keys, layout=layout, **grouped)
    if panel["kind"] == "bars":
        return reports.BarPlot(title=title, metrics=keys, layout=layout, **grouped)
    if panel["kind"] == "media":
        return reports.MediaBrowser(title=title, media_keys=keys, layout=layout)
    metrics = [reports.Config(key[2:]) if key.startswith("c:") else reports.SummaryMetric(key) for key in keys]
    columns = [reports.ParallelCoordinatesPlotColumn(metric=metric) for metric in metrics]
    return reports.ParallelCoordinatesPlot(title=title, columns=columns, layout=layout)
