"""Command `run import`: checks a run that was trained elsewhere and adds it to a profile and its lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from isd_repro import provenance
from isd_repro.config import reader
from isd_repro.config.layout import Layout
from isd_repro.data.manifests import open_prepared
from isd_repro.evaluations.encoders import check_manifest, check_run, load_encoders
from isd_repro.records import PretrainRecord, read_record
from isd_repro.report import text
from isd_repro.runtime import files
from isd_repro.runtime.dvc_lock import commit
from isd_repro.runtime.errors import DataError
from isd_repro.tracking import read_metrics
from isd_repro.train.pretrain import copy_snapshots, make_plan

FILES = ("pretrain.json", "encoder.safetensors", "metrics.jsonl")


def import_run(folder: Path, file: Path, say: Callable[[str], object], *, force: bool) -> None:
    """Check a run, copy it to where `pretrain` writes, and record it in dvc.lock, so that `dvc repro` does not train it.

    Args:
        folder: a folder with `pretrain.json`, `encoder.safetensors`, `metrics.jsonl` and possibly `snapshots/`; or a checkout
            that has trained exactly one run of this profile.
        file: the profile's parameters.
        say: called with lines for the user.
        force: replace an existing result of this run.

    Raises:
        ConfigError: the profile has no such run.
        DataError: a file is missing or damaged; the run's parameters or images differ from the profile's; encoder or metrics do
            not belong to the record; or the profile has another result of this run.
        UserError: DVC is not installed or reports an error.
    """
    params, layout = reader.load(file)
    found = _found(folder, layout)
    record = read_record(found["pretrain.json"], PretrainRecord)
    run = reader.find_run(params, record.run)
    prepared = open_prepared(layout.prepared(run.data.subset), layout.verified, params.efficiency.workers)
    plan = make_plan(record.run, run, prepared, layout)
    if problems := "; ".join(_differences(params.profile, plan.config, record)):
        raise DataError(f"{found['pretrain.json']}: {problems}", "give the profile the parameters that the run was trained with")
    check_manifest(found["pretrain.json"], record.manifest.sha256, prepared.identity.sha256, layout.prepared(run.data.subset))
    _check_files(found, record)
    here = layout.record(record.run, "pretrain")
    if here.exists() and here.read_bytes() != found["pretrain.json"].read_bytes() and not force:
        raise DataError(f"{here}: the profile has another result of run {record.run!r}", "add --force to replace it")
    _copy(found["encoder.safetensors"], layout.encoder(record.run))
    _copy(found["metrics.jsonl"], layout.metrics(record.run))
    copy_snapshots(found["encoder.safetensors"].parent / "snapshots", layout.snapshots(record.run))
    _copy(found["pretrain.json"], here)  # the record last, as `pretrain` writes it
    commit(f"pretrain@{record.run}", layout.folder)
    if record.provenance.commit is None:
        say("warning: the record names no commit, because the run was made outside a git checkout")
    if record.provenance.source != provenance.source_hash():
        say("warning: the run was made by other code than this; dvc.lock takes it as if it were made by this")
    say(f"{record.run}: {record.steps} steps, {len(record.encoders)} encoders, imported; `dvc repro` continues with extract")


def _found(folder: Path, layout: Layout) -> dict[str, Path]:
    """The files of the run."""
    places = sorted(folder.glob(f"reports/{layout.profile}/records/*/pretrain.json"))
    if (folder / "pretrain.json").is_file():
        found = {name: folder / name for name in FILES}
    elif len(places) == 1:
        inside = layout.folder.relative_to(layout.root)
        kept = folder / inside / "runs" / places[0].parent.name
        found = {"pretrain.json": places[0], **{name: kept / name for name in FILES[1:]}}
    else:
        trained = text.listing([place.parent.name for place in places]) or "no run"
        message = f"{folder}: contains no pretrain.json, and is not a checkout with one trained run (found: {trained})"
        raise DataError(message, f"put {', '.join(FILES)} of one run into a folder")
    for path in found.values():
        if not path.is_file():
            raise DataError(f"{path}: no such file", f"an import needs {', '.join(FILES)}")
    return found


def _differences(profile: str, config: dict[str, object], record: PretrainRecord) -> Iterator[str]:
    """Parameters that differ between the profile and the run's record; images are compared separately."""
    if record.profile != profile:
        yield f"is of profile {record.profile!r}, not {profile!r}"
    ours, theirs = (dict(text.flatten({**one, "manifest": None})) for one in (config, record.config))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"{key} is {theirs.get(key, 'absent')}, the profile has {ours.get(key, 'none')}"
    if record.fingerprint != reader.fingerprint(record.config):
        yield f"the fingerprint {record.fingerprint} is not that of its parameters"


def _check_files(found: dict[str, Path], record: PretrainRecord) -> None:
    """Check that encoder and metrics are those of the record."""
    path = found["encoder.safetensors"]
    if (sha256 := files.sha256_file(path)) != record.encoder_sha256:
        said = f"has sha256 {sha256}, its record says {record.encoder_sha256}"
        raise DataError(f"{path}: {said}", "copy the files of the run again")
    encoders, identity = load_encoders(path)
    check_run(path, identity.run, record.run)
    if sorted(encoders) != sorted(record.encoders):
        raise DataError(
            f"{path}: has {', '.join(encoders)}, its record says {', '.join(record.encoders)}", "copy the files again"
        )
    if not all(value.isfinite().all() for encoder in encoders.values() for value in encoder.state_dict().values()):
        raise DataError(f"{path}: contains values that are not finite", "the run has diverged and cannot be evaluated")
    given = read_metrics(found["metrics.jsonl"]), record.curve
    rows, curve = ([(row.get("epoch"), row.get("loss")) for row in one] for one in given)
    if rows != curve:
        message = f"{found['metrics.jsonl']}: its {len(rows)} epochs are not the {len(curve)} of the record"
        raise DataError(message, "copy the files of the run again")


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        files.write_atomic(target, source.read_bytes())
