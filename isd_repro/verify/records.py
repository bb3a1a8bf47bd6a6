"""Checks of one run's records by its parameters: one function each, which yields what is wrong or could not be proved.

None of them needs an image or an encoder. A check that yields nothing is proved.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from isd_repro import evaluations, provenance
from isd_repro.config.layout import Layout
from isd_repro.config.params import Halves, Run, Subset, Unbalanced
from isd_repro.records import ManifestIdentity, PretrainRecord
from isd_repro.report.run_records import PRETRAIN, RunRecords
from isd_repro.runtime.errors import DataError
from isd_repro.tracking.metrics import read_metrics
from isd_repro.train.monitor import collapse
from isd_repro.train.schedule import lr_at
from isd_repro.verify.findings import Answer, State, Unproved, Wrong

_SLACK = 1.0  # seconds between two clocks read one after the other
_COLLAPSE = "embeddings collapsed in "  # how `monitor.collapse` begins
_RECORDED = State.RECORDED


@dataclass(frozen=True)
class Case:
    """The records of one run, and the parameters that they were made with."""

    name: str
    run: Run
    subset: Subset
    layout: Layout
    found: RunRecords
    manifest: ManifestIdentity

    @property
    def pretrain(self) -> PretrainRecord | None:
        """The record of its training."""
        return self.found.pretrain

    @property
    def part(self) -> str:
        """A record that states the manifest."""
        return next(iter(self.found.of_one_encoder))


def image_counts(case: Case) -> Iterator[Answer]:
    """Numbers of classes and images are those of the rule."""
    subset, manifest, rule, part = case.subset, case.manifest, case.subset.rule, case.part
    classes, lost = len(manifest.classes), _lost(case)
    wanted = getattr(rule, "classes", None)
    wanted = len(wanted) if isinstance(wanted, tuple) else wanted
    if wanted is not None and classes != wanted:
        yield Wrong(part, "manifest.classes", classes, f"{wanted}, by the rule")
    if rule.name not in ("list", "file") and len(manifest.large) != getattr(rule, "large", 0):
        yield Wrong(part, "manifest.large", len(manifest.large), f"{getattr(rule, 'large', 0)}, by the rule")
    each = {"search": subset.search_per_class, "query": subset.query_per_class, "train": None}
    if not subset.unlabelled:
        each["train"] = getattr(rule, "per_class", None)
    for role, count in each.items():
        found = getattr(manifest, role)
        if count is not None and not classes * count - lost <= found <= classes * count:
            yield Wrong(part, f"manifest.{role}", found, f"{classes * count}, by the rule: {count} of each of {classes} classes")
    if isinstance(rule, Unbalanced | Halves) and rule.per_class is None:
        rare = rule.rare_images * (classes - len(manifest.large))
        if manifest.train < rare + len(manifest.large) - lost:
            yield Wrong(part, "manifest.train", manifest.train, f"{rare} of rare classes, by the rule, and those of large ones")
    open_counts = [f"{role} images" for role, count in each.items() if count is None]
    if open_counts:
        yield Unproved(f"the rule does not fix the number of {', '.join(open_counts)}", _RECORDED)


def queries_of_classes(case: Case) -> Iterator[Answer]:
    """Every class has as many queries as the rule says."""
    count, classes = case.subset.query_per_class, case.manifest.classes
    if count is None:
        yield Unproved("the rule takes every validation image of the source", _RECORDED)
        return
    for kind, one in case.found.own.items():
        sizes = () if evaluations.own_queries(kind) else one.label.bincount(minlength=len(classes)).tolist()
        for name, found in zip(classes, sizes, strict=False):
            if not count - _lost(case) <= found <= count:
                yield Wrong(kind, f"labels: {name}", f"{found} queries", f"{count}, by the rule")


def _lost(case: Case) -> int:
    """How many images `prepare` may have left out because they cannot be read."""
    images, share = case.manifest.train + case.manifest.search + case.manifest.query, case.subset.corrupt_share
    return math.floor(share * images / max(1 - share, 1e-9))


def steps(case: Case) -> Iterator[Answer]:
    """The number of steps is that of epochs, images and batch."""
    if (record := case.pretrain) is None:
        yield _untold()
    else:
        optim = case.run.optim
        expected = optim.epochs * (record.manifest.train // optim.batch_size)
        if record.steps != expected:
            words = f"{expected}: {optim.epochs} epochs of {record.manifest.train} images in batches of {optim.batch_size}"
            yield Wrong(PRETRAIN, "steps", record.steps, words)


def learning_rates(case: Case) -> Iterator[Answer]:
    """The learning rate of every epoch is that of the schedule."""
    if (record := case.pretrain) is None:
        yield _untold()
    for row in record.curve if record else ():
        expected = lr_at(int(row.get("epoch", 1)), case.run.optim)
        if not math.isclose(row.get("lr", math.nan), expected, rel_tol=1e-12):
            yield Wrong(PRETRAIN, f"curve: lr of epoch {row.get('epoch', 0):g}", row.get("lr"), f"{expected}, by the schedule")


def losses(case: Case) -> Iterator[Answer]:
    """Every epoch has the same measures, no loss is negative, and the rows that training wrote say the same."""
    if (record := case.pretrain) is None:
        yield _untold()
        return
    for row in record.curve:
        where = f"curve: epoch {row.get('epoch', 0):g}"
        if row.keys() != record.curve[0].keys() or "loss" not in row:
            yield Wrong(PRETRAIN, where, sorted(row), f"{sorted({*record.curve[0], 'loss'})}, as in every epoch")
        elif row["loss"] < 0:
            yield Wrong(PRETRAIN, where, f"loss {row['loss']}", "a loss that is not negative")
    path = case.layout.metrics(case.name)
    if not record.curve:
        return
    if not path.is_file():
        yield Unproved("the loss curve is in the record alone: the rows that training wrote are not here", _RECORDED)
        return
    try:
        rows = {row.get("epoch"): row for row in read_metrics(path)}
    except DataError as error:
        yield Wrong(path, "rows", error.message, "rows as training writes them", "restore the file with `dvc checkout`")
        return
    for row in record.curve:
        other = rows.get(row.get("epoch"), {})
        if wrong := next((key for key in row if row[key] != other.get(key)), None):
            truth = f"{other.get(wrong)}, as {path} says"
            yield Wrong(PRETRAIN, f"curve: {wrong} of epoch {row.get('epoch', 0):g}", row[wrong], truth)


def seconds(case: Case) -> Iterator[Answer]:
    """Attempts follow each other from the first step to the last, and took the seconds that the record states."""
    if (record := case.pretrain) is None:
        yield _untold()
        return
    attempts, stated = record.attempts, record.provenance.seconds
    if record.steps and stated <= 0:
        yield Wrong(PRETRAIN, "provenance.seconds", stated, f"the time of {record.steps} steps")
    if not attempts:
        yield Unproved("the record lists no attempts", _RECORDED)
        return
    listed = not any(remark.startswith("attempts before step") for remark in record.warnings)
    ends = (attempts[0].first_step, attempts[-1].last_step, attempts[-1].outcome)
    if listed and ends != (0, record.steps, "finished"):
        found = f"steps {ends[0]} to {ends[1]}, {ends[2]}"
        yield Wrong(PRETRAIN, "attempts", found, f"steps 0 to {record.steps}, finished")
    for before, after in pairwise(attempts):
        if after.first_step > before.last_step or after.last_step < after.first_step:
            found = f"steps {after.first_step} to {after.last_step} after one that ended at {before.last_step}"
            yield Wrong(PRETRAIN, "attempts", found, "an attempt that begins where a checkpoint was left")
    total = sum(one.seconds for one in attempts)
    if listed and stated > total + _SLACK * len(attempts):
        yield Wrong(PRETRAIN, "provenance.seconds", stated, f"at most {total:.1f}, the sum of the attempts")


def warnings(case: Case) -> Iterator[Answer]:
    """The warning of collapsed embeddings is that of the curve."""
    if (record := case.pretrain) is None:
        yield _untold()
        return
    expected = [words for words in [collapse(record.curve)] if words]
    found = [words for words in record.warnings if words.startswith(_COLLAPSE)]
    if found != expected:
        yield Wrong(PRETRAIN, "warnings", found or "none", f"{expected or 'none'}, from the curve")


def commits(case: Case) -> Iterator[Answer]:
    """Every record's commit exists, and its package has the source hash that the record states."""
    for part, record in case.found.records.items():
        origin = record.provenance
        if origin.commit is None:
            yield Unproved("made outside git, so that no commit names the code", _RECORDED)
        elif not re.fullmatch(r"[0-9a-f]{40}", origin.commit):
            yield Wrong(part, "provenance.commit", repr(origin.commit), "a commit: 40 hexadecimal digits")
        elif not _has_git():
            yield Unproved("git cannot tell here which commits exist: the package is not in a checkout of git")
        elif (source := source_of(origin.commit)) is None:
            if _is_shallow():
                yield Unproved(f"commit {origin.commit[:12]} is not in this shallow clone; `git fetch --unshallow` brings it")
            else:
                hint = "fetch the branch that it is on; or run the stage again at a commit that stays"
                yield Wrong(part, "provenance.commit", origin.commit, "a commit of this repository", hint)
        elif origin.dirty is False and source != origin.source:
            truth = f"{source}, the hash of the package at commit {origin.commit[:12]}"
            yield Wrong(part, "provenance.source", origin.source, truth)
        elif origin.dirty is not False and source != origin.source:
            yield Unproved("made with uncommitted changes, so that the code is known by its hash alone", _RECORDED)


CHECKS = {
    "numbers of images": image_counts,
    "queries of each class": queries_of_classes,
    "steps": steps,
    "learning rates": learning_rates,
    "losses": losses,
    "attempts and seconds": seconds,
    "warnings": warnings,
    "commit and source": commits,
}


def _untold() -> Answer:
    return Unproved("there is no record of the training")


# --- git --------------------------------------------------------------------------------------------------------------


def git(*arguments: str, given: bytes = b"", folder: Path | None = None) -> bytes | None:
    """What git prints in the checkout of this package (or another folder); None where it fails or is not there."""
    place = folder or Path(provenance.__file__).parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=place, input=given, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


@cache
def _has_git() -> bool:
    return git("ls-files", "--error-unmatch", "isd_repro/__init__.py") is not None


@cache
def _is_shallow() -> bool:
    return (git("rev-parse", "--is-shallow-repository") or b"").strip() == b"true"


@cache
def source_of(commit: str) -> str | None:
    """`provenance.source_hash` of the package at a commit; None where git does not know the commit."""
    listed = git("ls-tree", "-r", "-z", "--name-only", f"{commit}^{{commit}}", "--", "isd_repro")
    if listed is None:
        return None
    paths = sorted(Path(name) for name in listed.decode().split("\0") if name.endswith(".py"))
    found = git("cat-file", "--batch", given="".join(f"{commit}:{path}\n" for path in paths).encode())
    return provenance.hash_of(zip((path.relative_to("isd_repro") for path in paths), _blobs(found or b""), strict=False))


def _blobs(batch: bytes) -> Iterator[bytes]:
    """The contents that `git cat-file --batch` prints: a line that ends in the size, the bytes, a newline."""
    at = 0
    while at < len(batch):
        start = batch.index(b"\n", at) + 1
        size = int(batch[at:start].split()[-1])
        yield batch[start : start + size]
        at = start + size + 1
