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

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.evaluations import scores as shown
from isd_repro.evaluations import summary
from isd_repro.provenance import Provenance
from isd_repro.records import CurveRecord, EvaluationRecord, ManifestIdentity, PretrainRecord, TargetsRecord
from isd_repro.report import image_pages, learning_curves, page, records
from isd_repro.report.records import RunRecords
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.tracking import media, names, read_metrics, session
from isd_repro.tracking.anonymous import Scrubber, secrets
from isd_repro.tracking.publish import Publisher, project_of
from isd_repro.tracking.replay import Item, Replay, Table

REPORT_FILES = ("cells.csv", "cells.json", "index.html", "table.md", "table.tex")
Result = EvaluationRecord | TargetsRecord | CurveRecord
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
    scrubber = Scrubber(secrets(layout.root)) if wish.anonymous else None
    with session.nameless(wish.anonymous):
        counts, where = _send(replays(chosen or list(params.runs), params, layout, wish), params, layout, scrubber, console)
    if not sum(counts.values()):
        raise DataError(f"profile {params.profile!r} has nothing to publish", "run its stages first")
    console.print(f"{counts['sent']} sent, {counts['known']} already there ({where})", highlight=False, soft_wrap=True)


def _send(
    found: Iterator[Replay], params: Params, layout: Layout, scrubber: Scrubber | None, console: Console
) -> tuple[dict[str, int], str]:
    """How many were sent and were there, and where."""
    tracking = project_of(params.tracking, anonymous=scrubber is not None)
    publisher = Publisher(tracking, layout.root, anonymous=scrubber is not None)
    counts = {"sent": 0, "known": 0}
    for replay in found:
        outcome = publisher.send(scrubber.replay(replay) if scrubber else replay)
        counts[outcome] += 1
        words = {"sent": "sent", "known": "already there"}[outcome] + (" (failed run)" if replay.failed else "")
        console.print(f"{replay.title}: {words}", highlight=False, markup=False, soft_wrap=True)
    return counts, "offline, `wandb sync` sends them" if publisher.mode == "offline" else tracking.project


def replays(chosen: Sequence[str], params: Params, layout: Layout, wish: Wish) -> Iterator[Replay]:
    """Every stage of the chosen runs that left something, sources before what is made from them; the report last."""
    loaded = records.load(params, layout)
    trajectories = learning_curves.load(params, layout, loaded)
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
        others: list[Result] = [part.record for part in found.own]
        others += [found.transfer.record] if found.transfer else []
        if name in trajectories:
            others.append(trajectories[name])
            yield builder.trajectory(name, trajectories[name], found.pretrain)
        yield from builder.figures(name)
        results += [builder.result(name, record) for record in others]
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
        pictures = self._pictures(name, "pretrain")
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
        if found.transfer:
            yield self.transfer(name, found.transfer.record, found.pretrain)
        parts = [part.record for part in found.own]
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
            needs = [features] if stage == "knn" else [encoder, features]
            yield self._replay(
                name, stage, names.evaluation_identity(record.encoder_sha256, record.settings),
                {**record.settings, "protocol": record.protocol, **_provenance(record.provenance)},
                rows=self._rows(name, stage, [final]), summary={"seconds": record.provenance.seconds}, tables=_tables([record]),
                pictures=self._pictures(name, stage), needs=needs, makes=[self.result(name, record)],
            )  # fmt: skip

    def transfer(self, name: str, record: TargetsRecord, pretrain: PretrainRecord | None) -> Replay:
        """Scores on other data sets; each reads its images itself, so it needs the encoder alone."""
        scores = {key: value for one in record.evaluations for key, value in one.row().items()}
        final = {"epoch": self.params.runs[name].optim.epochs, **scores}
        return self._replay(
            name, "transfer", names.evaluation_identity(record.encoder_sha256, record.settings),
            {**record.settings, "protocol": record.protocol, **_provenance(record.provenance)},
            rows=[final], summary={"seconds": record.provenance.seconds}, tables=_tables(record.evaluations),
            needs=[self._encoder(name, record.encoder_sha256, pretrain)], makes=[self.result(name, record)],
        )  # fmt: skip

    def trajectory(self, name: str, record: CurveRecord, pretrain: PretrainRecord | None) -> Replay:
        """Scores by epoch; the snapshots behind all points but the last are named in the record."""
        last = record.points[-1].encoder_sha256
        return self._replay(
            name, "trajectory", names.evaluation_identity(last, record.settings),
            {**record.settings, "protocol": record.protocol, **_provenance(record.provenance)},
            rows=[{"epoch": point.epoch, **shown.row(point.scores)} for point in record.points],
            summary={"seconds": record.provenance.seconds},
            needs=[self._manifest(record.manifest), self._encoder(name, last, pretrain)], makes=[self.result(name, record)],
        )  # fmt: skip

    def figures(self, name: str) -> Iterator[Replay]:
        """Pictures of clusters and anchors, where `isd-repro figures` has drawn them here."""
        rows, pictures = self._log_rows(name, "figures"), self._pictures(name, "figures")
        path = self.layout.encoder(name).parent / "figures" / "figures.json"
        if rows and pictures and path.is_file():
            facts = json.loads(path.read_text("utf-8"))
            yield self._replay(
                name, "figures", names.digest(facts["files"]), image_pages.config(facts), rows=rows, pictures=pictures
            )

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

    def result(self, name: str, record: Result) -> Item:
        """Scores and predictions: the record itself."""
        path = self.layout.record(name, record.kind)
        if isinstance(record, TargetsRecord):
            scores = {key: value for one in record.evaluations for key, value in one.row().items()}
            digests = {"encoder": record.encoder_sha256}
        elif isinstance(record, CurveRecord):
            scores = shown.row(record.points[-1].scores)
            digests = {"encoder": record.points[-1].encoder_sha256}
        else:
            scores = shown.row(record.scores)
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

    def _rows(self, name: str, stage: str, stated: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the stage logged where it is here and ends as its record says, else the record's own rows."""
        rows = self._log_rows(name, stage)
        return rows if rows and stated[-1].items() <= rows[-1].items() else stated

    def _pictures(self, name: str, stage: str) -> list[media.Picture]:
        return list(media.kept(self.layout.log(name, stage) / "media"))

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


def _tables(evaluations: Sequence[EvaluationRecord]) -> dict[str, Table]:
    return {summary.class_key(one): Table(*summary.class_rows(one)) for one in evaluations if one.predictions}


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
