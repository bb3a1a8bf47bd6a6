"""`wandb publish`: what the disk knows of a profile's runs, sent to W&B with its lineage.

Everything comes from committed records, from `runs/<run>/metrics.jsonl` and from the rows and pictures that stages keep under
`runs/.log/`. Records alone are enough: where the rest is not here, curves come from the record. A run that never reached its
record is found in `.state/` and published as failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from isd_repro import files
from isd_repro.artifacts import EvaluationRecord, ManifestIdentity, PretrainRecord, Provenance
from isd_repro.config import Layout, find_run
from isd_repro.errors import DataError, UserError
from isd_repro.evals import scores as shown
from isd_repro.evals import summary
from isd_repro.params import Params
from isd_repro.report import page, records
from isd_repro.report.records import RunRecords
from isd_repro.tracking import media, names, read_metrics
from isd_repro.tracking.anonymous import Scrubber, secrets
from isd_repro.tracking.publish import Publisher, project_of
from isd_repro.tracking.replay import Item, Replay, Table

REPORT_FILES = ("cells.csv", "cells.json", "index.html", "table.md", "table.tex")
ANONYMOUS_FILES = ("cells.csv", "table.md", "table.tex")  # the others show commits and commands


@dataclass(frozen=True)
class Wish:
    """How to publish."""

    anonymous: bool = False
    upload: bool = False


def publish(chosen: Sequence[str], params: Params, layout: Layout, wish: Wish, console: Console) -> None:
    """Send runs, all of the profile's where none is named, and then the report.

    Raises:
        ConfigError: no such run.
        DataError: a record is damaged.
        UserError: W&B cannot be used, or did not take a run; what was sent before stays and is not sent again.
    """
    for name in chosen:
        find_run(params, name)
    tracking = project_of(params.tracking, anonymous=wish.anonymous)
    publisher = Publisher(tracking, layout.root, anonymous=wish.anonymous)
    scrubber = Scrubber(secrets(layout.root)) if wish.anonymous else None
    counts = {"sent": 0, "known": 0}
    for replay in replays(chosen or list(params.runs), params, layout, wish):
        outcome = publisher.send(scrubber.replay(replay) if scrubber else replay)
        counts[outcome] += 1
        words = {"sent": "sent", "known": "already there"}[outcome] + (" (failed run)" if replay.failed else "")
        console.print(f"{replay.title}: {words}", highlight=False, markup=False, soft_wrap=True)
    if not sum(counts.values()):
        raise DataError(f"profile {params.profile!r} has nothing to publish", "run its stages first")
    where = "offline, `wandb sync` sends them" if publisher.mode == "offline" else tracking.project
    console.print(f"{counts['sent']} sent, {counts['known']} already there ({where})", highlight=False, soft_wrap=True)


def replays(chosen: Sequence[str], params: Params, layout: Layout, wish: Wish) -> Iterator[Replay]:
    """Every stage of the chosen runs that left something, sources before what is made from them; the report last."""
    loaded = records.load(params, layout)
    builder = _Builder(params, layout, wish)
    manifests: set[str] = set()
    results: list[Item] = []
    for name in chosen:
        found = loaded.runs[name]
        if found.manifest and found.manifest.sha256 not in manifests:
            manifests.add(found.manifest.sha256)
            yield builder.prepare(found.manifest)
        yield from builder.pretrain(name, found.pretrain)
        yield from builder.evaluations(name, found)
        results += [builder.result(name, part.record) for part in (found.knn, found.linear) if part]
    if results:
        yield builder.report(page.assemble(params, loaded, layout), results)


class _Builder:
    """Makes replays and artifacts of one profile."""

    def __init__(self, params: Params, layout: Layout, wish: Wish) -> None:
        self.params, self.layout, self.wish = params, layout, wish

    # --- stages -------------------------------------------------------------------------------------------------------

    def prepare(self, manifest: ManifestIdentity) -> Replay:
        """The images of a subset."""
        config = {"manifest": manifest.model_dump(mode="json", exclude={"classes"})}
        return self._replay(
            manifest.subset, "prepare", manifest.sha256, config, rows=self._log_rows(manifest.subset, "prepare"),
            makes=[self._manifest(manifest)],
        )  # fmt: skip

    def pretrain(self, name: str, record: PretrainRecord | None) -> Iterator[Replay]:
        """A finished pretraining, or what a dead one left."""
        pictures = list(media.kept(self.layout.log(name, "pretrain") / "media"))
        if record is not None:
            rows = _rows_of(self.layout.metrics(name), record)
            yield self._replay(
                name, "pretrain", record.fingerprint, {**record.config, **_provenance(record.provenance)}, rows=rows,
                summary={"steps": record.steps, "seconds": record.provenance.seconds}, pictures=pictures,
                needs=[self._manifest(record.manifest)], makes=[self._encoder(name, record.encoder_sha256, record)],
            )  # fmt: skip
        state = _state_of(name, self.params.profile, self.layout)
        if state is not None and (record is None or state[0].name != record.fingerprint):
            folder, config = state
            rows = read_metrics(folder / "metrics.jsonl")
            yield self._replay(name, "pretrain", folder.name, config, rows=rows, pictures=pictures, failed=True)

    def evaluations(self, name: str, found: RunRecords) -> Iterator[Replay]:
        """Features and scores."""
        parts = [part.record for part in (found.knn, found.linear) if part]
        if not parts:
            return
        encoder = self._encoder(name, parts[0].encoder_sha256, found.pretrain)
        features = self._features(name, parts[0])
        config = {"encoder_sha256": parts[0].encoder_sha256, "manifest": parts[0].manifest.sha256}
        yield self._replay(
            name, "extract", parts[0].encoder_sha256, config, rows=self._log_rows(name, "extract"),
            needs=[self._manifest(parts[0].manifest), encoder], makes=[features],
        )  # fmt: skip
        for record in parts:
            stage = record.kind
            final = {"epoch": self._epoch(name, record), **shown.row(record.scores)}
            rows = self._log_rows(name, stage)
            fresh = rows and all(rows[-1].get(key) == value for key, value in final.items())
            needs = [features] if stage == "knn" else [encoder, features]
            yield self._replay(
                name, stage, names.evaluation_identity(record.encoder_sha256, record.settings),
                {**record.settings, "protocol": record.protocol, **_provenance(record.provenance)},
                rows=rows if fresh else [final], summary={"seconds": record.provenance.seconds},
                tables={"per-class": Table(*summary.class_rows(record))} if record.predictions else {},
                pictures=list(media.kept(self.layout.log(name, stage) / "media")),
                needs=needs, makes=[self.result(name, record)],
            )  # fmt: skip

    def report(self, assembled: page.Report, results: list[Item]) -> Replay:
        """The tables that the results make."""
        kept = ANONYMOUS_FILES if self.wish.anonymous else REPORT_FILES
        texts = {name: content for name, content in page.render(assembled).items() if name in kept}
        item = Item(self._artifact_name("report"), "report", texts=texts)
        identity = names.digest({item.name: sorted(item.digests.items()) for item in results})
        return self._replay(self.params.profile, "report", identity, {}, needs=results, makes=[item])

    def _replay(self, name: str, stage: str, identity: str, config: dict[str, Any], **rest: Any) -> Replay:
        profile = self.params.profile
        return Replay(
            id=names.run_id(profile, name, stage, identity),
            title=names.title(profile, name, stage),
            group=names.group(profile, name),
            job_type=stage,
            tags=[*names.tags(self.params, name, stage), *(["failed"] if rest.get("failed") else [])],
            config=config,
            **rest,
        )

    # --- artifacts ----------------------------------------------------------------------------------------------------

    def result(self, name: str, record: EvaluationRecord) -> Item:
        """Scores and predictions: the record itself."""
        path = self.layout.record(name, record.kind)
        scores = {f"{score.encoder}/{score.metric}/{score.group}": score.top1 for score in record.scores}
        digests = {"encoder": record.encoder_sha256, "features": record.features_sha256 or ""}
        return Item(
            self._artifact_name(name, record.kind), "result", texts={path.name: path.read_bytes()},
            digests={key: value for key, value in digests.items() if value}, metadata={"scores": scores},
        )  # fmt: skip

    def _manifest(self, manifest: ManifestIdentity) -> Item:
        facts = manifest.model_dump(mode="json", exclude={"classes"})
        return Item(self._artifact_name(manifest.subset), "manifest", digests={"manifest": manifest.sha256}, metadata=facts)

    def _encoder(self, name: str, sha256: str, record: PretrainRecord | None) -> Item:
        facts = {"fingerprint": record.fingerprint, "encoders": list(record.encoders), "steps": record.steps} if record else {}
        return self._file(self._artifact_name(name, "encoder"), "encoder", self.layout.encoder(name), sha256, facts)

    def _features(self, name: str, record: EvaluationRecord) -> Item:
        sha256 = record.features_sha256 or ""
        return self._file(self._artifact_name(name, "features"), "features", self.layout.features(name), sha256, {})

    def _file(self, name: str, kind: str, path: Path, sha256: str, facts: dict[str, Any]) -> Item:
        uploads = {path.name: path} if self.wish.upload and path.is_file() else {}
        return Item(name, kind, digests={path.name: sha256}, uploads=uploads, metadata={"sha256": sha256, **facts})

    def _artifact_name(self, *parts: str) -> str:
        return "-".join((self.params.profile, *parts))

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _log_rows(self, name: str, stage: str) -> list[dict[str, Any]]:
        path = self.layout.log(name, stage) / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else []

    def _epoch(self, name: str, record: EvaluationRecord) -> int:
        return int(record.settings["epochs"]) if record.kind == "linear" else self.params.runs[name].optim.epochs


def _rows_of(path: Path, record: PretrainRecord) -> list[dict[str, Any]]:
    """Rows of the run's own `metrics.jsonl` where it is here and belongs to the record, else the record's curve."""
    curve = [dict(row) for row in record.curve]
    if not path.is_file():
        return curve
    rows = read_metrics(path)
    same = [(row["epoch"], row["loss"]) for row in curve] == [(row.get("epoch"), row.get("loss")) for row in rows]
    return rows if same else curve


def _provenance(found: Provenance) -> dict[str, Any]:
    return {"provenance": found.model_dump(mode="json", exclude={"seconds"})}


def _state_of(name: str, profile: str, layout: Layout) -> tuple[Path, dict[str, Any]] | None:
    """The latest unfinished state of a run that no process is working on, and its config."""
    found: list[tuple[float, Path, dict[str, Any]]] = []
    for path in layout.state("x").parent.glob("*/run.json"):
        rows = path.with_name("metrics.jsonl")
        try:
            owner = json.loads(path.read_text("utf-8"))
        except ValueError:  # cut off by a kill: it is written once more when the run resumes
            continue
        if (owner.get("profile"), owner.get("run")) == (profile, name) and rows.is_file():
            found.append((rows.stat().st_mtime, path.parent, owner["config"]))
    for _, folder, config in sorted(found, key=lambda entry: entry[0], reverse=True):
        try:
            with files.exclusive(folder / "lock", f"{folder}: this run is being trained"):
                return folder, config
        except UserError:
            continue  # it is being trained, and its live view shows it
    return None
