"""The provenance of a run's numbers: configuration, images, code, machine, time, and the commands that produce them."""

from __future__ import annotations

import math
import re
from typing import Any

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params, Run
from isd_repro.records import AnyEvaluation, EvaluationRecord, PretrainRecord
from isd_repro.report import text
from isd_repro.report.cells import Cell
from isd_repro.report.run_records import Records, RunRecords
from isd_repro.report.scores import score_cell

DEVIATION = re.compile(r"\b(DEV-\d+)\b")


def command(run: str, part: str, folder: str = ".") -> str:
    """The command that produces one part of a run's record, in the profile's folder or with its path."""
    where = "" if folder == "." else f" -p {folder}/params.yaml"
    return f"isd-repro {part.replace('_', '-')} {run}{where}"


def working_folder(layout: Layout) -> str:
    """The folder in which the commands are run, relative to the repository; `.` is its root."""
    return layout.folder.relative_to(layout.root).as_posix() if layout.folder.is_relative_to(layout.root) else layout.folder.name


def record_link(run: str, part: str) -> str:
    """A record's path relative to the report's folder."""
    return f"../records/{run}/{part}.json"


def run_facts(params: Params, found: RunRecords) -> dict[str, Any]:
    """A run's complete provenance, JSON-serialisable; parts that do not exist are absent."""
    run = params.runs[found.run]
    config = found.pretrain.config if found.pretrain else run.model_dump(mode="json", exclude={"label", "notes"})
    manifest = found.manifest
    return {
        "label": run.label,
        "method": run.method.name,
        "subset": run.data.subset,
        "notes": list(run.notes),
        "config": config,
        "config_from": "record" if found.pretrain else "params.yaml",
        "manifest": manifest.model_dump(mode="json") if manifest else None,
        "seconds": math.fsum(record.provenance.seconds for record in found.records.values()),
        "parts": {part: _part_facts(found.run, part, record) for part, record in found.records.items()},
    }


def _part_facts(run: str, part: str, record: PretrainRecord | AnyEvaluation) -> dict[str, Any]:
    keys = {"fingerprint", "encoders", "steps", "sources"} if isinstance(record, PretrainRecord) else {"protocol", "settings"}
    keys |= {"features_sha256"} if isinstance(record, EvaluationRecord) else set()
    return {
        "record": record_link(run, part),
        "command": command(run, part),
        **record.model_dump(mode="json", include=keys),
        "encoder_sha256": record.encoder_sha256,
        "manifest_sha256": record.manifest.sha256,
        **record.provenance.model_dump(mode="json"),
    }


def part_rows(run: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """A run's provenance as (term, value) rows, by part; rows that all parts share come first, under "All parts"."""
    of_part = {part: _part_rows(facts) for part, facts in run["parts"].items()}
    shared = [row for row in next(iter(of_part.values()), []) if all(row in rows for rows in of_part.values())]
    if len(of_part) < 2:
        return of_part
    return {"All parts": shared, **{part: [row for row in rows if row not in shared] for part, rows in of_part.items()}}


def _part_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    machine = facts["machine"]
    state = {True: " with uncommitted changes", False: "", None: " (unknown whether clean)"}[facts["dirty"]]
    rows = [("Command", facts["command"])]
    rows += [(title, facts[key]) for title, key in (("Protocol", "protocol"), ("Fingerprint", "fingerprint")) if facts.get(key)]
    settings = ", ".join(f"{key} {value}" for key, value in text.flatten(facts.get("settings") or {}) if key)
    rows += [("Settings", settings)] if settings else []
    rows += [("Steps", text.count(facts["steps"]))] if "steps" in facts else []
    rows += [("Encoder", f"sha256 {facts['encoder_sha256']}"), ("Manifest", f"sha256 {facts['manifest_sha256']}")]
    rows += [("Features", f"sha256 {facts['features_sha256']}")] if facts.get("features_sha256") else []
    threads = f"{machine['threads']} of {machine['cores']} threads"
    return [
        *rows,
        ("Commit", f"{facts['commit']}{state}" if facts["commit"] else "none: not a git checkout"),
        ("Source", f"sha256 {facts['source']}"),
        ("Machine", f"{machine['cpu']}, {threads}, {machine['gpu'] or 'no GPU'}, {machine['system']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))),
        ("Time", f"{text.duration(facts['seconds'])}, written {facts['written']}"),
    ]


def image_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """A run's images as (term, value) rows."""
    manifest = facts["manifest"]
    if manifest is None:
        return []
    large = f", large: {', '.join(map(text.class_name, manifest['large']))}" if manifest["large"] else ""
    copies = "queries that are copies of training or search images were not counted when this record was made"
    if (shared := manifest.get("shared")) is not None:
        copies = f"{text.count(shared)} of {text.count(manifest['query'])} queries have the bytes of a training or search image"
    return [
        ("Data set", f"{manifest['dataset']}, subset {manifest['subset']}"),
        ("Rule", ", ".join(f"{key} {value}" for key, value in text.flatten(manifest["rule"]) if value != "null")),
        ("Sizes", ", ".join(f"{text.count(manifest[role])} {role}" for role in ("train", "search", "query"))),
        ("Classes", f"{len(manifest['classes'])}{large}"),
        ("Copies", copies),
        ("Manifest", f"sha256 {manifest['sha256']}"),
    ]


def cell_facts(records: Records, cell: Cell, folder: str) -> list[tuple[str, str]]:
    """The facts of one cell, shown before the provenance of its runs."""
    rows: list[tuple[str, str]] = []
    if cell.kind in ("score", "snapshot") and cell.low is not None and cell.high is not None:
        rows.append(("Score", f"{cell.value:.2f} %: {text.count(cell.correct or 0)} of {text.count(cell.n or 0)} queries"))
        rows.append(("95 % interval", f"{cell.low:.2f} to {cell.high:.2f} % (Wilson)"))
        rows.append(("Verification", cell.level))
    elif cell.value is not None and cell.kind != "paper":
        signed = cell.kind in ("difference", "against") or cell.words.startswith(("+", text.MINUS))
        rows.append(("Value", text.signed(cell.value, 2) if signed else text.decimal(cell.value, 2)))
    if cell.deviation is not None:
        rows.append(("s.d.", f"standard deviation {cell.deviation:.2f} points, n = {cell.count} seeds or draws"))
    if cell.kind == "difference" and cell.low is not None and cell.high is not None:
        rows.append(("95 % interval", f"{text.span((cell.low, cell.high))} points (bootstrap of the mean)"))
    rows += [("Verdict", cell.verdict)] if cell.verdict else []
    rows += [("Why" if cell.value is None else "How", cell.detail)] if cell.detail else []
    if paper := cell.paper:
        rows.append(("The paper prints", f"{paper.printed}"))
        rows += [("Corrected value", f"{paper.corrected}: {paper.why}")] if paper.corrected is not None else []
        rows.append(("Where", f"{paper.where}{'; printed in another paper of the group' if paper.borrowed else ''}"))
        rows.append(("Read from", f"{paper.source}; confidence {paper.confidence}"))
    runs = list(dict.fromkeys(cell.runs))
    if len(runs) > 1 and cell.kind != "statistic":
        values = {run: score_cell(records.runs[run], cell.encoder, cell.metric, cell.group).value for run in runs}
        known = [f"{run} {text.decimal(value, 2)}" for run, value in values.items() if value is not None]
        rows += [("Values", ", ".join(known))] if known else []
    if runs and cell.kind not in ("none", "statistic"):
        each = command(runs[0] if len(runs) == 1 else "RUN", cell.part, folder)
        rows.append(("Made by", f"{each}{'' if len(runs) == 1 else ' for each of these runs'}"))
    return rows


def linked(note: str) -> list[tuple[str, bool]]:
    """A note split into pieces (text, whether it is the id of a deviation)."""
    return [(piece, at % 2 == 1) for at, piece in enumerate(DEVIATION.split(note)) if piece]


def changes(run: Run, recorded: dict[str, object]) -> list[str]:
    """Keys that the parameters and a record's config both contain, but with different values."""
    planned = run.model_dump(mode="json", include={"backbone", "method", "optim", "data", "numerics"})
    then = dict(text.flatten(recorded))
    return [f"{key} was {then[key]}, is {now}" for key, now in text.flatten(planned) if key in then and then[key] != now]
