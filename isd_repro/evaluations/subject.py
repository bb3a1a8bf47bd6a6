"""Input and output of an evaluation, and the one function that opens and checks a run's files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout, snapshots_in
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run, fingerprint
from isd_repro.data import eval_loader, manifests
from isd_repro.data.eval_loader import Frame, Reader, StoreReader, ViewSettings
from isd_repro.data.manifests import Prepared, Split, open_prepared
from isd_repro.evaluations.arithmetic import best_device
from isd_repro.evaluations.encoders import check_manifest, check_run, load_encoders
from isd_repro.evaluations.features import features, load_features
from isd_repro.provenance import source_hash
from isd_repro.records import CurvePoint, Labels, ManifestIdentity, PretrainRecord, TargetEvaluation, read_record, write_record
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import sha256_file
from isd_repro.runtime.progress import Progress

SplitFeatures = Mapping[str, Mapping[str, Tensor]]  # by split ("search", "query") and encoder: float32, N x D, not normalised
Pictures = Mapping[str, tuple[Tensor, str]]  # by key: uint8, C x H x W, and a caption
Views = Callable[[int], Iterator[tuple[Tensor, Tensor]]]  # epoch from 0 -> (images B x C x H x W, labels B) in order
_Part = TypeVar("_Part", bound=Frozen)
_Config = TypeVar("_Config", bound=Frozen)


# --- what an evaluation gives back ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Predictions on the subject's queries, or on other images of it.

    Attributes:
        predictions: predicted class of every query, int64, Q, by "<encoder>/<metric>", in the order in which scores are shown.
        chosen: values that the evaluation chose, such as the best epoch; they become part of the record's settings.
        notes: what a reader should know about these choices.
        pictures: makes the pictures that a tracker shows.
        label: class of every query, int64, Q, if the evaluation has `OWN_QUERIES`; None means those of the subject's queries.
    """

    predictions: Mapping[str, Tensor]
    chosen: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pictures: Callable[[], Pictures] = dict
    label: Tensor | None = None

    @property
    def arrays(self) -> dict[str, Labels]:
        """The predictions as records take them."""
        return {key: rows.cpu().numpy() for key, rows in self.predictions.items()}


@dataclass(frozen=True)
class Targets:
    """Evaluations on other data sets, one for each."""

    evaluations: tuple[TargetEvaluation, ...]


@dataclass(frozen=True)
class Curve:
    """Scores by epoch of training."""

    points: tuple[CurvePoint, ...]


# --- what an evaluation is given --------------------------------------------------------------------------------------


@dataclass
class Subject:
    """Frozen encoders and the labelled images that they are evaluated on.

    Attributes:
        name: of the run, or of an evaluated checkpoint.
        profile: of the run.
        encoders: modules B x C x H x W -> B x D by name, in eval mode.
        sha256: of the encoder file.
        frame: size, crop and normalisation of images for the encoders.
        channels: number of image channels that the encoders take.
        manifest: identity of the images.
        settings: every evaluation's Config, as attributes.
        progress: prints lines and progress bars.
        open_images: opens the prepared images; called at most once.
        read_features: reads or computes the features; called at most once.
        device: where evaluations compute.
        on_row: called with the values that an evaluation logs while it runs.
        parts_root: folder of the finished parts of an interrupted evaluation; None keeps no parts.
        open_snapshots: opens the encoders saved during training; None if there are none.
    """

    name: str
    profile: str
    encoders: Mapping[str, nn.Module]
    sha256: str
    frame: Frame
    channels: int
    manifest: ManifestIdentity
    settings: Any
    progress: Progress
    open_images: Callable[[], tuple[Prepared, Reader]]
    read_features: Callable[[Subject], SplitFeatures]
    device: torch.device = field(default_factory=best_device)
    on_row: Callable[[Mapping[str, float]], None] = lambda row: None
    parts_root: Callable[[str], Path] | None = None
    open_snapshots: Callable[[], Mapping[int, Callable[[], Subject]]] | None = None
    _parts: Path | None = None

    @cached_property
    def _images(self) -> tuple[Prepared, Reader]:
        return self.open_images()

    @property
    def prepared(self) -> Prepared:
        """Manifest, splits and groups of the images."""
        return self._images[0]

    @property
    def reader(self) -> Reader:
        """The images' pixels by position in the manifest."""
        return self._images[1]

    @cached_property
    def features(self) -> SplitFeatures:
        """Features of both splits, read from a file or computed."""
        return self.read_features(self)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.manifest.classes)

    def split(self, name: Literal["search", "query"]) -> Split:
        """Positions and labels of the search set, or of the queries."""
        return self.prepared.split(name)

    def config(self, kind: type[_Config]) -> _Config:
        """The settings of another evaluation, by its Config."""
        values = (getattr(self.settings, name) for name in type(self.settings).model_fields)
        return next(value for value in values if isinstance(value, kind))

    def extract(self) -> SplitFeatures:
        """Compute the features of both splits; every image is read only once for all encoders."""
        splits, found = {name: self.prepared.split(name) for name in ("search", "query")}, {}
        with self.progress.task(f"{self.name}: features") as bar:
            bar.begin(sum(map(len, splits.values())))
            for name, split in splits.items():
                images = eval_loader.centred(self.reader, split.index, self.frame, self.device)
                found[name] = features(self.encoders, images, len(split), self.device, bar.advance)
        return found

    def augmented(self, split: Split, settings: ViewSettings) -> Views:
        """Batches of augmented images of a split, each image once per epoch; a pure function of (seed, epoch)."""
        return eval_loader.augmented(self.reader, split, self.frame, settings, self.device)

    def snapshots(self) -> Mapping[int, Callable[[], Subject]]:
        """Functions that open the encoders saved during training, by epoch, the final encoders last; features are computed again.

        Raises:
            DataError: there are no snapshots.
        """
        if self.open_snapshots is None:
            raise DataError(f"{self.name}: no snapshots of a single file", "evaluate a run of a profile")
        return self.open_snapshots()

    def part(self, identity: Mapping[str, object], name: str, model: type[_Part], make: Callable[[], _Part]) -> _Part:
        """A part that an interrupted evaluation with the same identity and code has finished; otherwise the result of `make`."""
        if self.parts_root is None:
            return make()
        self._parts = self.parts_root(fingerprint({**identity, "source": source_hash()}))
        path = self._parts / f"{name}.json"
        if path.is_file():
            return read_record(path, model)
        made = make()
        write_record(path, made)
        return made

    def finish(self) -> None:
        """Remove the finished parts, once the record contains them all."""
        if self._parts is not None:
            shutil.rmtree(self._parts, ignore_errors=True)


# --- opening a run ----------------------------------------------------------------------------------------------------


def open_run(
    name: str, params: Params, layout: Layout, progress: Progress, *, path: Path | None = None, anew: bool = False
) -> Subject:
    """Open a run's exported encoders with their images and features, and check that they belong together.

    Args:
        name: the run.
        params: the profile.
        layout: where its files are.
        progress: prints lines and progress bars.
        path: another encoder file of the same run, such as a snapshot; its features are computed.
        anew: compute the features instead of reading their file, and use no part of an interrupted evaluation.

    Raises:
        ConfigError: there is no such run.
        DataError: a file is missing or damaged; or the encoder belongs to another run, is not the one that the pretrain record
            names, or was trained on other images than those prepared now. Features are checked when they are first read.
    """
    run, file = find_run(params, name), path or layout.encoder(name)
    sha256 = sha256_file(file)
    encoders, identity = load_encoders(file)
    check_run(file, identity.run, name)
    folder = layout.prepared(run.data.subset)
    manifest = manifests.read(folder)
    check_manifest(file, identity.manifest, manifest.sha256, folder)
    if path is None:
        _check_record(file, sha256, layout.record(name, "pretrain"))

    def opened() -> tuple[Prepared, Reader]:
        with ranks.first_alone():
            prepared = open_prepared(folder, layout.verified, manifest=manifest)
        return prepared, StoreReader(prepared.store)

    def snapshot(one: Path) -> Subject:
        other = open_run(name, params, layout, progress, path=one)
        return replace(other, open_images=lambda: (subject.prepared, subject.reader))  # opened once for all snapshots

    def snapshots() -> dict[int, Callable[[], Subject]]:
        if not (found := snapshots_in(layout.snapshots(name))):
            hint = "set efficiency.snapshot_every and run `pretrain` again"
            raise DataError(f"{layout.snapshots(name)}: no snapshot in it", hint)
        return {epoch: partial(snapshot, one) for epoch, one in {**found, run.optim.epochs: file}.items()}

    subject = Subject(
        name=name,
        profile=params.profile,
        encoders=encoders,
        sha256=sha256,
        frame=Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std),
        channels=identity.backbone.channels,
        manifest=manifest.identity(),
        settings=params.evaluation,
        progress=progress,
        open_images=opened,
        read_features=Subject.extract if anew or path else lambda subject: stored_features(subject, layout.features(name)),
        parts_root=None if anew else layout.state,
        open_snapshots=snapshots,
    )
    return subject


def stored_features(subject: Subject, path: Path) -> SplitFeatures:
    """The features in a file; `DataError` if they belong to another run, another encoder or other images."""
    found = load_features(path, subject.sha256)
    check_run(path, str(found.identity.get("run")), subject.name)
    check_manifest(path, str(found.identity.get("manifest")), subject.manifest.sha256)
    pairs = (("search", found.search_label, subject.split("search")), ("query", found.query_label, subject.split("query")))
    for split, label, own in pairs:
        if not label.equal(own.label):
            raise DataError(f"{path}: its {split} labels are not those of the prepared images", "run `extract` again")
    return {"search": found.search, "query": found.query}


def _check_record(path: Path, sha256: str, record: Path) -> None:
    """Raise `DataError` if the run's record names another encoder file; a run without a record is not checked."""
    if record.is_file() and (said := read_record(record, PretrainRecord).encoder_sha256) != sha256:
        message = f"{path}: its sha256 is {sha256[:12]}, and {record} names {said[:12]}"
        raise DataError(message, "restore the encoder or the record, or run `pretrain` again")
