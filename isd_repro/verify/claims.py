"""What records claim, checked by their parameters alone: no image, encoder or git is needed.

Each check of a run is a function that yields what is wrong or could not be proved; one that yields nothing is proved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isd_repro import evaluations, methods
from isd_repro.config.fields import Frozen
from isd_repro.config.params import Halves, ImageList, ListFile, NamedClasses, Run, Subset, Unbalanced
from isd_repro.data.lists import LIST_SHA256
from isd_repro.records import MAX_SHARED, AnyEvaluation, ManifestIdentity, PretrainRecord, TargetsRecord
from isd_repro.report import text
from isd_repro.report.problems import AGAIN
from isd_repro.report.run_records import PRETRAIN, Records, RunRecords
from isd_repro.runtime.errors import DataError
from isd_repro.tracking.metrics import read_metrics
from isd_repro.train import collapse
from isd_repro.train.schedule import lr_at
from isd_repro.verify.commits import check_commits
from isd_repro.verify.findings import Answer, State, Unproved, Verification, Wrong

if TYPE_CHECKING:
    from isd_repro.data.manifests import Manifest

_SLACK = 1.0  # seconds between two clocks read one after the other
_COLLAPSE = "embeddings collapsed in "  # how `collapse.warning` begins
DRAW_AGAIN = "these are not the images of the rule: run `prepare` and all later stages again"
_PARAMETER = "restore the value in params.yaml; or, if the change is intended, make a new record with `dvc repro`"


@dataclass(frozen=True)
class Case:
    """The records of one run, and the parameters that they were made with."""

    run: Run
    subset: Subset
    metrics: Path  # the rows that training wrote
    found: RunRecords
    manifest: ManifestIdentity

    @property
    def lost(self) -> int:
        """How many images `prepare` may have left out because they cannot be read."""
        images, share = self.manifest.train + self.manifest.search + self.manifest.query, self.subset.corrupt_share
        return math.floor(share * images / max(1 - share, 1e-9))


def check_records(state: Verification, records: Records) -> None:
    """The checks of every run that has records."""
    params = state.params
    for name, found in records.runs.items():
        if found.manifest is None:
            continue
        run = params.runs[name]
        case = Case(run, params.subsets[run.data.subset], state.layout.metrics(name), found, found.manifest)
        for title, check in {"numbers of images": image_counts, "queries of each class": queries_of_classes}.items():
            state.note(title, name, check(case), name)
        untold = [Unproved("there is no record of the training")]
        for title, of_training in TRAINING.items():
            state.note(title, name, of_training(case, found.pretrain) if found.pretrain else untold, name)
        state.note("commit and source", name, check_commits(found), name)


def image_counts(case: Case) -> Iterator[Answer]:
    """Numbers of classes and images are those of the rule."""
    subset, manifest, rule, part = case.subset, case.manifest, case.subset.rule, next(iter(case.found.of_one_encoder))
    classes, named = len(manifest.classes), getattr(rule, "classes", None)
    exact = {"classes": (classes, len(named) if isinstance(named, tuple) else named)}
    if rule.name not in ("list", "file"):
        exact["large"] = len(manifest.large), getattr(rule, "large", 0)
    for key, (found, wanted) in exact.items():
        if wanted is not None and found != wanted:
            yield Wrong(part, f"manifest.{key}", found, f"{wanted}, by the rule")
    each = {"search": subset.search_per_class, "query": subset.query_per_class}
    each["train"] = None if subset.unlabelled else getattr(rule, "per_class", None)
    for role, count in each.items():
        found = getattr(manifest, role)
        if count is not None and not classes * count - case.lost <= found <= classes * count:
            yield Wrong(part, f"manifest.{role}", found, f"{classes * count}, by the rule: {count} of each of {classes} classes")
    if isinstance(rule, Unbalanced | Halves) and rule.per_class is None:
        rare = rule.rare_images * (classes - len(manifest.large))
        if manifest.train < rare + len(manifest.large) - case.lost:
            yield Wrong(part, "manifest.train", manifest.train, f"{rare} of rare classes, by the rule, and those of large ones")
    if left := [f"{role} images" for role, count in each.items() if count is None]:
        yield Unproved(f"the rule does not fix the number of {', '.join(left)}", State.RECORDED)


def queries_of_classes(case: Case) -> Iterator[Answer]:
    """Every class has as many queries as the rule says."""
    count, classes = case.subset.query_per_class, case.manifest.classes
    if count is None:
        yield Unproved("the rule takes every validation image of the source", State.RECORDED)
        return
    for kind, one in case.found.own.items():
        sizes = () if evaluations.own_queries(kind) else np.bincount(one.label, minlength=len(classes)).tolist()
        for name, found in zip(classes, sizes, strict=False):
            if not count - case.lost <= found <= count:
                yield Wrong(kind, f"labels: {name}", f"{found} queries", f"{count}, by the rule")


# --- the training -----------------------------------------------------------------------------------------------------


def steps(case: Case, record: PretrainRecord) -> Iterator[Answer]:
    """The number of steps is that of epochs, images and batch."""
    optim = case.run.optim
    expected = optim.epochs * (record.manifest.train // optim.batch_size)
    if record.steps != expected:
        words = f"{expected}: {optim.epochs} epochs of {record.manifest.train} images in batches of {optim.batch_size}"
        yield Wrong(PRETRAIN, "steps", record.steps, words)


def learning_rates(case: Case, record: PretrainRecord) -> Iterator[Answer]:
    """The learning rate of every epoch is that of the schedule."""
    for row in record.curve:
        expected = lr_at(int(row.get("epoch", 1)), case.run.optim)
        if not math.isclose(row.get("lr", math.nan), expected, rel_tol=1e-12):
            yield Wrong(PRETRAIN, f"curve: lr of epoch {row.get('epoch', 0):g}", row.get("lr"), f"{expected}, by the schedule")


def losses(case: Case, record: PretrainRecord) -> Iterator[Answer]:
    """Every epoch has the same measures, no loss is below its method's least, and the rows that training wrote say the same."""
    negative = any(row.get("loss", 0.0) < 0 for row in record.curve)  # which few methods allow, and importing one takes torch
    least = getattr(methods.load(case.run.method.name).Method, "least_loss", 0.0) if negative else 0.0
    for row in record.curve:
        where = f"curve: epoch {row.get('epoch', 0):g}"
        if row.keys() != record.curve[0].keys() or "loss" not in row:
            yield Wrong(PRETRAIN, where, sorted(row), f"{sorted({*record.curve[0], 'loss'})}, as in every epoch")
        elif row["loss"] < least - 1e-6:  # in float32
            yield Wrong(PRETRAIN, where, f"loss {row['loss']}", f"a loss that is not below {least:g}")
    if record.curve and not case.metrics.is_file():
        yield Unproved("the loss curve is in the record alone: the rows that training wrote are not here", State.RECORDED)
        return
    try:
        rows = {row.get("epoch"): row for row in read_metrics(case.metrics)} if record.curve else {}
    except DataError as error:
        yield Wrong(case.metrics, "rows", error.message, "rows as training writes them", "restore the file with `dvc checkout`")
        return
    for row in record.curve:
        other = rows.get(row.get("epoch"), {})
        if wrong := next((key for key in row if row[key] != other.get(key)), None):
            truth = f"{other.get(wrong)}, as {case.metrics} says"
            yield Wrong(PRETRAIN, f"curve: {wrong} of epoch {row.get('epoch', 0):g}", row[wrong], truth)


def seconds(_: Case, record: PretrainRecord) -> Iterator[Answer]:
    """Attempts follow each other from the first step to the last, and took the seconds that the record states."""
    attempts, stated = record.attempts, record.provenance.seconds
    if record.steps and stated <= 0:
        yield Wrong(PRETRAIN, "provenance.seconds", stated, f"the time of {record.steps} steps")
    if not attempts:
        yield Unproved("the record lists no attempts", State.RECORDED)
        return
    for before, after in pairwise(attempts):
        if after.first_step > before.last_step or after.last_step < after.first_step:
            found = f"steps {after.first_step} to {after.last_step} after one that ended at {before.last_step}"
            yield Wrong(PRETRAIN, "attempts", found, "an attempt that begins where a checkpoint was left")
    if any(remark.startswith("attempts before step") for remark in record.warnings):
        return  # the first ones are not listed
    ends = attempts[0].first_step, attempts[-1].last_step, attempts[-1].outcome
    if ends != (0, record.steps, "finished"):
        yield Wrong(PRETRAIN, "attempts", f"steps {ends[0]} to {ends[1]}, {ends[2]}", f"steps 0 to {record.steps}, finished")
    total = sum(one.seconds for one in attempts)
    if stated > total + _SLACK * len(attempts):
        yield Wrong(PRETRAIN, "provenance.seconds", stated, f"at most {total:.1f}, the sum of the attempts")


def warnings(_: Case, record: PretrainRecord) -> Iterator[Answer]:
    """The warning of collapsed embeddings is that of the curve."""
    expected = [words for words in [collapse.warning(record.curve)] if words]
    found = [words for words in record.warnings if words.startswith(_COLLAPSE)]
    if found != expected:
        yield Wrong(PRETRAIN, "warnings", found or "none", f"{expected or 'none'}, from the curve")


TRAINING = {
    "steps": steps,
    "learning rates": learning_rates,
    "losses": losses,
    "attempts and seconds": seconds,
    "warnings": warnings,
}


# --- the images -------------------------------------------------------------------------------------------------------


def check_images(state: Verification, records: Records) -> None:
    """The checks of every subset that has a record; only the draw needs images, and nothing with `--quick`."""
    for name, subset in state.params.subsets.items():
        runs = [run for run, one in state.params.runs.items() if one.data.subset == name and records.runs[run].manifest]
        stated = {run: records.runs[run] for run in runs}
        if not runs:
            continue
        first = stated[runs[0]]
        identity, record = first.manifest, state.layout.record(runs[0], next(iter(first.of_one_encoder)))
        assert identity
        if isinstance(subset.rule, ListFile | ImageList | NamedClasses) and subset.rule.listed:
            state.note("list of the images", name, _list(subset.rule, identity, record), *runs)
        seen: list[Manifest] = []
        drawn: Iterable[Answer] = [Unproved("--quick reads no images")]
        if not state.options.quick:
            from isd_repro.verify.images import draw_again

            drawn = draw_again(subset, identity, record, state.layout.prepared(name), seen)
        state.note("draw of the images", name, drawn, *runs)
        state.note("copies among the queries", name, _copies(subset, identity, record, seen), *runs)


def _list(rule: ListFile | ImageList | NamedClasses, identity: ManifestIdentity, record: Path) -> Iterator[Answer]:
    """The list that was read is the published one of its name, or the one whose sha256 the rule states."""
    digest = identity.rule.get("sha256")
    wanted = LIST_SHA256[rule.list] if isinstance(rule, ListFile) else rule.sha256
    if digest is None:
        yield Unproved(f"the record does not state the sha256 of its list {rule.listed}")
    elif wanted is None:
        yield Unproved(f"the rule states no sha256 of its list {rule.listed}: any list of this name passes", State.RECORDED)
    elif digest != wanted:
        truth = f"{wanted}, of the list {rule.listed} that the rule names"
        yield Wrong(record, "manifest.rule.sha256", digest, truth, DRAW_AGAIN)


def _copies(subset: Subset, identity: ManifestIdentity, record: Path, seen: Sequence[Manifest]) -> Iterator[Answer]:
    """Few queries are copies of training or search images; `seen` has the manifest if the images are available."""
    count = identity.shared
    for one in seen:
        if count not in (None, one.shared):
            yield Wrong(record, "manifest.shared", count, f"{one.shared}, counted by the hashes of the images")
        count = one.shared
    said = f"{count} of {identity.query} queries are copies of training or search images"
    if count is None:
        yield Unproved("they were not counted when the record was made")
    elif count > MAX_SHARED * identity.query and not subset.allow_shared_images:
        words = f"at most {MAX_SHARED:.0%} of the queries, unless allow_shared_images is set"
        yield Wrong(record, "manifest.shared", said, words)
    elif count:
        yield Unproved(said, State.RECORDED)


# --- the parameters ---------------------------------------------------------------------------------------------------


def check_parameters(state: Verification, records: Records) -> None:
    """The parameters still say what the records were made with."""
    params, layout, encoders = state.params, state.layout, dict[str, str]()
    for run, found in records.runs.items():
        now, subset = params.runs[run], params.subsets[params.runs[run].data.subset]
        if (made := found.pretrain) is not None:
            blocks: dict[str, Frozen] = {name: getattr(now, name) for name in ("backbone", "optim", "data", "numerics")}
            blocks["store"] = subset.store
            if not methods.agree(now.method, made.config.get("method", {})):
                blocks["method"] = methods.config_of(run, now.method, layout.file)
            for key, block in blocks.items():
                own = methods.identity(now.method.name) if key == "method" else {}
                prefix = f"runs.{run}.{key}" if key != "store" else f"subsets.{now.data.subset}.store"
                stated = made.config.get(key, {}) | ({"subset": now.data.subset} if key == "data" else {})
                whole, chosen = (own | block.model_dump(mode="json", exclude_defaults=left) for left in (False, True))
                _changed(state, run, prefix, whole, chosen, stated)
            _changed(state, run, f"runs.{run}.label", now.label, now.label, made.label)
            if (manifest := made.config.get("manifest")) != made.manifest.sha256:
                truth = f"{made.manifest.sha256}, its manifest.sha256"
                state.problem(layout.record(run, PRETRAIN), "config.manifest", manifest, truth, AGAIN, run)
        for kind, record in found.records.items():
            if not isinstance(record, PretrainRecord):
                _settings(state, run, kind, record)
        if found.manifest is not None:
            rules = [_drawn(subset.stated(), subset.source.dataset), _drawn(found.manifest.rule, found.manifest.dataset)]
            _changed(state, run, f"subsets.{now.data.subset}", rules[0], *rules)
        for kind, one in list(found.of_one_encoder.items())[:1]:  # an encoder's header holds its run's name
            if (other := encoders.setdefault(one.encoder_sha256, run)) != run:
                truth = f"a file of its own, but the records of {other} name the same"
                hint = "one of the two is a copy; restore it from git, or run its stages again"
                state.problem(layout.record(run, kind), "encoder_sha256", one.encoder_sha256, truth, hint, run)


def _settings(state: Verification, run: str, kind: str, record: AnyEvaluation) -> None:
    """The settings of an evaluation, and the protocol that they come to."""
    module, path = evaluations.load(kind), state.layout.record(run, kind)
    changed = evaluations.changes(kind, state.params.evaluation, record.settings)
    for key, (now, then) in changed.items():
        state.problem(state.layout.file, f"evaluation.{kind}.{key}", now, f"{then}, as the record says", _PARAMETER, run)
    expected = module.protocol(state.params.evaluation)
    if record.protocol != expected and not changed:
        state.problem(path, "protocol", repr(record.protocol), f"{expected!r}, from its settings", AGAIN, run)
    for one in record.evaluations if isinstance(record, TargetsRecord) else ():
        for key, found, truth in module.facts(one, getattr(state.params.evaluation, kind)):
            if found != truth:
                where = f"{one.manifest.subset}: {key}"
                state.problem(path, where, found, f"{truth}, as the list of data sets says", AGAIN, run)


def _drawn(rule: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """A manifest's rule in the form of the parameters; how it was stored and its list's hash are compared elsewhere."""
    counts = ("search_per_class", "query_per_class")
    own = {key: value for key, value in rule.items() if key not in ("source", "store", "sha256", *counts)}
    source = {"name": rule.get("source"), "dataset": dataset}
    return {"rule": own, "source": source, **{key: rule.get(key) for key in counts}}


def _changed(state: Verification, run: str, prefix: str, now: Any, chosen: Any, then: Any) -> None:
    """Keys whose values differ; a key that came later than the record counts where its value is no default (`chosen`)."""
    ours, theirs, own = dict(text.flatten(now)), dict(text.flatten(then)), dict(text.flatten(chosen))
    for key in sorted(key for key in ours.keys() | theirs.keys() if key in theirs or key in own):
        if ours.get(key) != theirs.get(key):
            where, truth = f"{prefix}.{key}" if key else prefix, f"{theirs.get(key, 'nothing')}, as the record says"
            state.problem(state.layout.file, where, ours.get(key, "nothing"), truth, _PARAMETER, run)
