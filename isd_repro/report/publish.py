"""Command `wandb publish`: sends a profile's runs, as they are on disk, to W&B with their lineage.

Everything comes from committed records, from `runs/<run>/metrics.jsonl` and from the rows and pictures that stages keep under
`runs/.log/`. The records are sufficient: without the other files, curves come from the record. A run that ended before its record
was written is found in `.state/` and published as failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run, fingerprint
from isd_repro.evaluations import summary
from isd_repro.records import AnyEvaluation, CurveRecord, EvaluationRecord, ManifestIdentity, PretrainRecord, TargetsRecord
from isd_repro.report import image_pages, page, run_records
from isd_repro.report.run_records import RunRecords
from isd_repro.runtime import files
from isd_repro.runtime.errors import DataError, UserError
from isd_repro.tracking import media, names, read_metrics, session
from isd_repro.tracking.anonymous import Scrubber, secrets
from isd_repro.tracking.metrics import Row
from isd_repro.tracking.publisher import Publisher, project_of
from isd_repro.tracking.replay import Artifact, Replay

REPORT_FILES = ("cells.csv", "cells.json", "index.html", "table.md", "table.tex")
ANONYMOUS_FILES = ("cells.csv", "table.md", "table.tex")  # the others show commits and commands


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    anonymous: bool = False
    upload: bool = False


def publish(chosen: Sequence[str], params: Params, layout: Layout, options: Options, console: Console) -> None:
    """Send the named runs, or all runs of the profile, and then the report.

    Raises:
        ConfigError: there is no such run.
        DataError: a record is damaged.
        UserError: W&B cannot be used or reports an error; what was sent before is kept and not sent again.
    """
    for name in chosen:
        find_run(params, name)
    scrubber = Scrubber(secrets(layout.root)) if options.anonymous else None
    counts = {"sent": 0, "known": 0}
    with session.hide_identity(options.anonymous):
        tracking = project_of(params.tracking, anonymous=options.anonymous)
        publisher = Publisher(tracking, layout.root, anonymous=options.anonymous)
        for replay in replays(chosen or list(params.runs), params, layout, options):
            outcome = publisher.send(scrubber.replay(replay) if scrubber else replay)
            counts[outcome] += 1
            words = ("sent" if outcome == "sent" else "already there") + (" (failed run)" if replay.failed else "")
            console.print(f"{replay.run.title}: {words}", highlight=False, markup=False, soft_wrap=True)
    if not sum(counts.values()):
        raise DataError(f"profile {params.profile!r} has nothing to publish", "run its stages first")
    where = "offline; `wandb sync` uploads them" if publisher.mode == "offline" else tracking.project
    console.print(f"{counts['sent']} sent, {counts['known']} already there ({where})", highlight=False, soft_wrap=True)


def replays(chosen: Sequence[str], params: Params, layout: Layout, options: Options) -> Iterator[Replay]:
    """All stages of the chosen runs that left results, inputs before the stages that use them; the report is last."""
    assembled = page.assemble(params, run_records.load(params, layout), layout)
    builder = _Builder(params, layout, options)
    manifests: set[str] = set()
    results: list[Artifact] = []
    for name in chosen:
        found = assembled.records.runs[name]
        if found.manifest and found.manifest.sha256 not in manifests:
            manifests.add(found.manifest.sha256)
            yield builder.prepare(found.manifest)
        yield from builder.pretrain(name, found.pretrain)
        evaluations = evaluations_of(found)
        yield from builder.evaluations(name, evaluations)
        yield from builder.figures(name)
        results += (own := [builder.result(name, record) for record in evaluations])
        if found.pretrain is not None:
            yield builder.summary(name, found.pretrain, evaluations, own)
    if results:
        yield builder.report(assembled, results)


def evaluations_of(found: RunRecords) -> list[AnyEvaluation]:
    """The records of all evaluations of a run, in the order of the evaluations."""
    return [record for record in found.records.values() if not isinstance(record, PretrainRecord)]


def rows_of(record: AnyEvaluation) -> list[Row]:
    """Scores of an evaluation in percent: one row per epoch if there are several, otherwise one row without an epoch."""
    if isinstance(record, CurveRecord):
        return [{"epoch": point.epoch, **summary.row(point.scores)} for point in record.points]
    if isinstance(record, TargetsRecord):
        return [{key: value for one in record.evaluations for key, value in one.row().items()}]
    return [dict(summary.row(record.scores))]


class _Builder:
    """Makes replays and artifacts of one profile."""

    def __init__(self, params: Params, layout: Layout, options: Options) -> None:
        self.params, self.layout, self.options = params, layout, options

    def prepare(self, manifest: ManifestIdentity) -> Replay:
        """The images of a subset."""
        config = {"manifest": manifest.model_dump(mode="json", exclude={"classes"})}
        rows = self._log_rows(manifest.subset, "prepare")
        return self._replay(manifest.subset, "prepare", manifest.sha256, config, rows=rows, makes=[self._manifest(manifest)])

    def pretrain(self, name: str, record: PretrainRecord | None) -> Iterator[Replay]:
        """A finished pretraining, or the state that a stopped one has left."""
        pictures = self._pictures(name, "pretrain")
        if record is not None:
            rows, stated = _rows_in(self.layout.metrics(name)), [(row["epoch"], row["loss"]) for row in record.curve]
            yield self._replay(
                name,
                "pretrain",
                record.fingerprint,
                {**record.config, **_provenance(record)},
                rows=rows if [(row.get("epoch"), row.get("loss")) for row in rows] == stated else list(record.curve),
                summary={"steps": record.steps, "seconds": record.provenance.seconds},
                pictures=pictures,
                needs=[self._manifest(record.manifest)],
                makes=[self._encoder(name, record.encoder_sha256)],
            )
        state = _state_of(name, self.params.profile, self.layout)
        if state is not None and (record is None or state[0].name != record.fingerprint):
            folder, config = state
            rows = read_metrics(folder / "metrics.jsonl")
            yield self._replay(name, "pretrain", folder.name, config, rows=rows, pictures=pictures, failed=True)

    def evaluations(self, name: str, found: Sequence[AnyEvaluation]) -> Iterator[Replay]:
        """Stages `extract` and all evaluations, with features and scores."""
        own = [record for record in found if isinstance(record, EvaluationRecord) and record.features_sha256]
        features = [self._file(name, "features", self.layout.features(name), one.features_sha256 or "") for one in own[:1]]
        if own:
            sha256, manifest = own[0].encoder_sha256, own[0].manifest
            config = {"encoder_sha256": sha256, "manifest": manifest.sha256}
            needs = [self._manifest(manifest), self._encoder(name, sha256)]
            rows = self._log_rows(name, "extract")
            yield self._replay(name, "extract", sha256, config, rows=rows, needs=needs, makes=features)
        for record in found:
            logged, stated = self._log_rows(name, record.kind), rows_of(record)
            single = (record,) if isinstance(record, EvaluationRecord) else ()
            scored = record.evaluations if isinstance(record, TargetsRecord) else single
            needs = [self._encoder(name, record.encoder_sha256), *(features if record in own else [])]
            yield self._replay(
                name,
                record.kind,
                names.evaluation_identity(record.encoder_sha256, record.settings),
                {**record.settings, "protocol": record.protocol, **_provenance(record)},
                rows=logged if logged and stated[-1].items() <= logged[-1].items() else stated,
                summary={"seconds": record.provenance.seconds},
                tables={summary.class_key(one): summary.class_rows(one) for one in scored},
                pictures=self._pictures(name, record.kind),
                needs=needs,
                makes=[self.result(name, record)],
            )

    def summary(self, name: str, record: PretrainRecord, found: Sequence[AnyEvaluation], results: list[Artifact]) -> Replay:
        """The run in one row, with all of its parameters and final scores, for comparing runs."""
        config = {**record.config, **{one.kind: {**one.settings, "protocol": one.protocol} for one in found}}
        final: Row = dict(record.curve[-1]) if record.curve else {}
        for one in found:
            if not isinstance(one, CurveRecord):
                final |= rows_of(one)[-1]
        seconds = record.provenance.seconds + sum(one.provenance.seconds for one in found)
        final |= {"steps": record.steps, "seconds": seconds}
        return self._replay(name, "summary", record.fingerprint, config, summary=final, needs=results)

    def figures(self, name: str) -> Iterator[Replay]:
        """Pictures of clusters and anchors, if `isd-repro figures` has drawn them."""
        rows, pictures = self._log_rows(name, "figures"), self._pictures(name, "figures")
        path = self.layout.encoder(name).parent / "figures" / "figures.json"
        if rows and pictures and path.is_file():
            facts = json.loads(path.read_text("utf-8"))
            identity = fingerprint(facts["files"])
            yield self._replay(name, "figures", identity, image_pages.config(facts), rows=rows, pictures=pictures)

    def report(self, assembled: page.Report, results: list[Artifact]) -> Replay:
        """The tables of the report."""
        kept = ANONYMOUS_FILES if self.options.anonymous else REPORT_FILES
        texts = {name: content for name, content in page.render(assembled).items() if name in kept}
        made = Artifact(self._artifact_name("report"), "report", texts=texts)
        identity = fingerprint({one.name: sorted(one.digests.items()) for one in results})
        return self._replay(self.params.profile, "report", identity, {}, needs=results, makes=[made])

    def _replay(self, name: str, stage: str, identity: str, config: dict[str, Any], **rest: Any) -> Replay:
        run = names.describe(self.params, self.layout, name, stage, identity=identity, config=config)
        return Replay(replace(run, tags=(*run.tags, "failed")) if rest.get("failed") else run, **rest)

    def result(self, name: str, record: AnyEvaluation) -> Artifact:
        """The artifact with scores and predictions, which is the record itself."""
        path = self.layout.record(name, record.kind)
        digests = {"encoder": record.encoder_sha256}
        if isinstance(record, EvaluationRecord) and record.features_sha256:
            digests["features"] = record.features_sha256
        texts, metadata = {path.name: path.read_bytes()}, {"scores": rows_of(record)[-1]}
        return Artifact(self._artifact_name(name, record.kind), "result", texts=texts, digests=digests, metadata=metadata)

    def _manifest(self, manifest: ManifestIdentity) -> Artifact:
        facts = manifest.model_dump(mode="json", exclude={"classes"})
        return Artifact(self._artifact_name(manifest.subset), "manifest", digests={"manifest": manifest.sha256}, metadata=facts)

    def _encoder(self, name: str, sha256: str) -> Artifact:
        return self._file(name, "encoder", self.layout.encoder(name), sha256)

    def _file(self, name: str, kind: str, path: Path, sha256: str) -> Artifact:
        uploads = {path.name: path} if self.options.upload and path.is_file() else {}
        named = self._artifact_name(name, kind)
        return Artifact(named, kind, digests={path.name: sha256}, uploads=uploads, metadata={"sha256": sha256})

    def _artifact_name(self, *parts: str) -> str:
        return "-".join((self.params.profile, *parts))

    def _log_rows(self, name: str, stage: str) -> list[Row]:
        return _rows_in(self.layout.log(name, stage) / "metrics.jsonl")

    def _pictures(self, name: str, stage: str) -> list[media.Picture]:
        return list(media.kept(self.layout.log(name, stage) / "media"))


def _rows_in(path: Path) -> list[Row]:
    return read_metrics(path) if path.is_file() else []


def _provenance(record: PretrainRecord | AnyEvaluation) -> dict[str, Any]:
    return {"provenance": record.provenance.model_dump(mode="json", exclude={"seconds"})}


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
