"""`wandb dashboard`: the reviewers' workspace and report, from the committed records alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console

from isd_repro.artifacts import write_atomic
from isd_repro.config import Layout
from isd_repro.params import Params
from isd_repro.report import page, records, runs, text
from isd_repro.report.records import PARTS
from isd_repro.report.tables import ENCODERS, groups_of
from isd_repro.tracking.anonymous import Scrubber, secrets
from isd_repro.tracking.dashboard import Facts, build, send
from isd_repro.tracking.publish import project_of

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
    for part, identity in zip(specification, send(specification, tracking, layout.root), strict=True):
        console.print(f"{part} {identity} in project {tracking.project}", highlight=False, markup=False, soft_wrap=True)


def facts_of(params: Params, layout: Layout) -> Facts:
    """What the records say, as the dashboard shows it."""
    assembled = page.assemble(params, records.load(params, layout), layout)
    loaded = assembled.records
    with_teacher = any("teacher" in found.pretrain.encoders for found in loaded.runs.values() if found.pretrain)
    groups = dict.fromkeys(group for subset in params.subsets for group in groups_of(params, loaded, subset))
    return Facts(
        profile=params.profile,
        title=params.report.title,
        results=_PICTURE.sub("", page.render(assembled)["table.md"].decode()),
        failures=_failures(params, assembled),
        cost=_cost(params, assembled),
        groups=[group for group in groups if group != "large"],
        encoders=ENCODERS if with_teacher else ENCODERS[:1],
        neighbours=params.evaluation.knn.k,
    )


def _failures(params: Params, assembled: page.Report) -> str:
    """Runs and parts without a record, and what the page itself remarks."""
    lines = []
    for name, found in assembled.records.runs.items():
        listed = {"linear": params.linear_runs, "few_label": params.few_label_runs, "transfer": params.transfer_runs}
        wanted = [part for part in (*PARTS, "transfer") if name in listed.get(part, (name,))]
        missing: list[str] = [part for part in wanted if part not in found.parts]
        if missing:
            lines.append(f"- {text.markdown(params.runs[name].label)} (`{name}`): no {text.listing(missing)} record")
    lines += [f"- {text.markdown(note)}" for note in assembled.footnotes]
    head = "Runs that ended before their end carry the tag `failed` and the state *failed*; they are below.\n\n"
    return head + ("\n".join(lines) if lines else "Every run of this profile has all its records.")


def _cost(params: Params, assembled: page.Report) -> str:
    """Time of each part of each run, and where it ran."""
    rows = [f"| Run | {' | '.join(PARTS)} | Machine |", f"|:---|{'---:|' * len(PARTS)}:---|"]
    for name, found in assembled.records.runs.items():
        times = [text.duration(found.parts[part].provenance.seconds) if part in found.parts else text.NOT_RUN for part in PARTS]
        machines = dict.fromkeys(
            record.provenance.machine.gpu or f"{record.provenance.machine.cpu}, {record.provenance.machine.threads} threads"
            for record in found.parts.values()
        )
        where = text.markdown("; ".join(machines))
        rows.append(f"| {text.markdown(params.runs[name].label)} | {' | '.join(times)} | {where} |")
    total = text.duration(runs.total_seconds(assembled.records))
    return "\n".join(rows) + f"\n\nAll recorded parts together: {total}. Failed and repeated attempts are not in it."
