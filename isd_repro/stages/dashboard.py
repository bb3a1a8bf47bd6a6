"""`wandb dashboard`: the reviewers' workspace and report, from the committed records alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.provenance import Provenance
from isd_repro.records import CurveRecord
from isd_repro.report import learning_curves, page, records, text
from isd_repro.report.records import PARTS
from isd_repro.report.tables import ENCODERS, groups_of
from isd_repro.runtime.files import write_atomic
from isd_repro.tracking import session
from isd_repro.tracking.anonymous import Scrubber, secrets
from isd_repro.tracking.dashboard import Facts, build, send
from isd_repro.tracking.publish import project_of

Trajectories = Mapping[str, CurveRecord]  # by run
_COLUMNS = (*PARTS, "transfer", "trajectory")
_PICTURE = re.compile(r"^!\[.*\]\(.*\)\n?", re.MULTILINE)  # of the page; W&B draws its own


def dashboard(params: Params, layout: Layout, dry_run: Path | None, *, anonymous: bool, console: Console) -> None:
    """Write the specification to a file, or send it.

    Raises:
        DataError: a record is damaged.
        UserError: a package is missing, or W&B cannot be used or did not take it.
    """
    tracking = project_of(params.tracking, anonymous=anonymous)
    specification = build(facts_of(params, layout), tracking)
    if anonymous:
        specification = Scrubber(secrets(layout.root)).value(specification)
    if dry_run is not None:
        content = json.dumps(specification, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(dry_run, content.encode())
        console.print(f"{dry_run}: what would be sent; nothing was", highlight=False, markup=False, soft_wrap=True)
        return
    with session.nameless(anonymous):
        identities = send(specification, tracking, layout.root)
    for part, identity in zip(specification, identities, strict=True):
        console.print(f"{part} {identity} in project {tracking.project}", highlight=False, markup=False, soft_wrap=True)


def facts_of(params: Params, layout: Layout) -> Facts:
    """What the records say, as the dashboard shows it."""
    assembled = page.assemble(params, records.load(params, layout), layout)
    loaded = assembled.records
    trajectories = learning_curves.load(params, layout, loaded)
    few = [key[1] for found in loaded.runs.values() if found.few_label for key in found.few_label.scores]
    sets = [name for found in loaded.runs.values() if found.transfer for name in found.transfer.sets]
    with_teacher = any("teacher" in found.pretrain.encoders for found in loaded.runs.values() if found.pretrain)
    groups = dict.fromkeys(group for subset in params.subsets for group in groups_of(params, loaded, subset))
    return Facts(
        profile=params.profile,
        title=params.report.title,
        results=_PICTURE.sub("", page.render(assembled)["table.md"].decode()),
        failures=_failures(params, assembled, trajectories),
        cost=_cost(params, assembled, trajectories),
        groups=[group for group in groups if group != "large"],
        encoders=ENCODERS if with_teacher else ENCODERS[:1],
        neighbours=params.evaluation.knn.k,
        trajectories=bool(trajectories),
        few_label=tuple(dict.fromkeys(metric for metric in few if metric.endswith("-last"))),
        transfer=tuple(dict.fromkeys(sets)),
    )


def _failures(params: Params, assembled: page.Report, trajectories: Trajectories) -> str:
    """Runs and parts without a record, and what the page itself remarks."""
    lines = []
    listed: dict[str, Sequence[str]] = {
        "linear": params.linear_runs,
        "few_label": params.few_label_runs,
        "transfer": params.transfer_runs,
        "trajectory": params.trajectory_runs,
    }
    for name, found in assembled.records.runs.items():
        there = {*found.parts, *(["trajectory"] if name in trajectories else [])}
        missing = [part for part in _COLUMNS if name in listed.get(part, (name,)) and part not in there]
        if missing:
            lines.append(f"- {text.markdown(params.runs[name].label)} (`{name}`): no {text.listing(missing)} record")
    lines += [f"- {text.markdown(note)}" for note in assembled.footnotes]
    head = "Runs that ended before their end have the state *failed* or *crashed*; they are below.\n\n"
    return head + ("\n".join(lines) if lines else "Every run of this profile has all its records.")


def _cost(params: Params, assembled: page.Report, trajectories: Trajectories) -> str:
    """Time of each part of each run, and where it ran."""
    every: dict[str, dict[str, Provenance]] = {}
    for name, found in assembled.records.runs.items():
        every[name] = {part: record.provenance for part, record in found.parts.items()}
        every[name] |= {"trajectory": trajectories[name].provenance} if name in trajectories else {}
    columns = [part for part in _COLUMNS if any(part in parts for parts in every.values())]
    rows = [f"| Run | {' | '.join(columns)} | Machine |", f"|:---|{'---:|' * len(columns)}:---|"]
    for name, parts in every.items():
        times = [text.duration(parts[part].seconds) if part in parts else text.NOT_RUN for part in columns]
        machines = dict.fromkeys(
            found.machine.gpu or f"{found.machine.cpu}, {found.machine.threads} threads" for found in parts.values()
        )
        where = text.markdown("; ".join(machines))
        rows.append(f"| {text.markdown(params.runs[name].label)} | {' | '.join(times)} | {where} |")
    total = text.duration(sum(found.seconds for parts in every.values() for found in parts.values()))
    return "\n".join(rows) + f"\n\nAll recorded parts together: {total}. Failed and repeated attempts are not in it."
