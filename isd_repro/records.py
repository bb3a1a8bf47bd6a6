"""Records, the committed results of stages: their models, packed predictions, reading and writing.

Records are small JSON files. They carry time, machine and commit, and the predicted class of every query, from which every
score can be recomputed. Records of format 1 stay readable; their keys keep their names.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from pydantic import Field, ValidationError

from isd_repro.config.fields import GROUPS, Frozen, Group, Many, Words, problems
from isd_repro.provenance import Provenance
from isd_repro.runtime.errors import DataError
from isd_repro.runtime.files import write_atomic

MAX_RECORD = 64 * 2**20  # bytes of a record that is read; one of ImageNet's 50,000 queries has under 1 MB
_LARGEST_CLASS = 65_535
MAX_QUERIES = 10_000_000  # of a manifest, so that packed predictions unpack to 20 MB at most
MAX_SHARED = 0.01  # share of queries that may be copies of training or search images, unless the user allows more
KIND = r"^[a-z][a-z0-9_]{0,60}$"  # the file in isd_repro/evaluations/ that made a record
Shot = Literal["many", "medium", "few"]  # groups of classes by their number of training images
SHOTS: tuple[Shot, ...] = get_args(Shot)
CHOSEN = ("best_epoch", "chosen", "correct_by_seed")  # keys of a record's settings that say what was chosen on the way
METRIC = r"^[A-Za-z0-9][A-Za-z0-9.-]{0,60}$"
NAME = r"^[a-z0-9][a-z0-9.-]*$"  # of a record's folder, as runs are named

Labels = np.ndarray[Any, np.dtype[np.int64]]  # class of every query, Q
Mask = np.ndarray[Any, np.dtype[np.bool_]]  # queries of a group, Q

Count = Annotated[int, Field(ge=0, lt=2**53)]  # a float holds it exactly
Measured = Annotated[float, Field(ge=-1e30, le=1e30)]  # differences and squares of such values stay finite


class ManifestIdentity(Frozen):
    """The images behind a record, described well enough to draw them again and to tell two sets apart."""

    sha256: str  # layout-independent identity of all images and roles
    dataset: Words  # public name, never a path
    subset: Words  # key in params.yaml
    rule: dict[str, Any]
    classes: Many[Words]
    large: Many[Words]  # empty where the subset is balanced
    # Classes by their number of training images, by group; not written where the subset states no thresholds.
    shots: Annotated[dict[Shot, Many[Words]], Field(exclude_if=lambda shots: not shots)] = {}  # noqa: RUF012
    train: Count  # unlabelled training images
    search: Count  # labelled search set
    query: Annotated[int, Field(ge=0, le=MAX_QUERIES)]  # validation queries
    # Queries whose bytes are also those of a training or search image; None where an older record did not count them.
    shared: Annotated[Count | None, Field(exclude_if=lambda count: count is None)] = None

    def __eq__(self, other: object) -> bool:
        """Whether both describe the same images; a count of shared ones that only one of them has makes no difference."""
        if not isinstance(other, ManifestIdentity):
            return NotImplemented
        unknown = None in (self.shared, other.shared)
        ours, theirs = ({**dict(one), **({"shared": None} if unknown else {})} for one in (self, other))
        return ours == theirs

    __hash__ = None  # type: ignore[assignment]


class Score(Frozen):
    """Top-1 accuracy in percent over the `n` queries of a group."""

    encoder: Literal["student", "teacher"]
    metric: Annotated[str, Field(pattern=METRIC)]  # as its evaluation names it: "20-NN", "linear-best", "few-10pct-last-top5"
    group: Group
    correct: Count
    n: Count

    @property
    def top1(self) -> float:
        """Percent, 0-100."""
        return 100.0 * self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval of `top1`, in percent."""
        return wilson(self.correct, self.n)


class Attempt(Frozen):
    """One process's work on a run."""

    started: str  # UTC, ISO 8601
    seconds: float  # of a killed one: up to its last checkpoint
    first_step: int  # steps that were done before it
    last_step: int  # steps that were done after it; of a killed one, in its last checkpoint
    outcome: Literal["finished", "stopped", "failed", "killed"]
    device: str


class PretrainRecord(Frozen):
    """The record of a pretraining."""

    format: Literal[1] = 1
    kind: Literal["pretrain"] = "pretrain"
    profile: Words
    run: Words
    label: Words
    notes: Many[Words]
    config: dict[str, Any]  # the groups that the fingerprint covers, defaults included
    fingerprint: str
    manifest: ManifestIdentity
    encoder_sha256: str
    encoders: Many[str]
    steps: Count
    curve: Many[dict[str, Measured]]  # one row per epoch: epoch, lr, loss and the method's metrics
    sources: Many[str]  # source hashes of every session that trained; more than one after a resume across versions
    attempts: Many[Attempt] = ()  # every process that worked on the run, in order
    warnings: Many[Words] = ()  # what a reader of the numbers should know: a collapse, a resume under other code
    provenance: Provenance


class _Evaluated(Frozen):
    """What the record of any evaluation states."""

    format: Literal[1] = 1
    kind: Annotated[str, Field(pattern=KIND)]
    profile: Words
    run: Words
    protocol: Words
    settings: dict[str, Any]
    manifest: ManifestIdentity
    provenance: Provenance


class EvaluationRecord(_Evaluated):
    """The record of an evaluation: its scores, and the predictions from which they can be recomputed."""

    encoder_sha256: str
    features_sha256: str | None
    scores: Many[Score]
    labels: str  # packed class index of every query
    predictions: dict[str, str]  # "<encoder>/<metric>" -> packed predicted class of every query

    @property
    def asked(self) -> dict[str, Any]:
        """The settings that were asked for, without what the evaluation chose."""
        return {key: value for key, value in self.settings.items() if key not in CHOSEN}


class TargetEvaluation(EvaluationRecord):
    """The evaluation of one target data set.

    `manifest` is the target's: `train` images were learnt from while the classifier's setting was chosen, `search` images, which
    are these and the validation images, for the final classifier; `query` images are classified. `mean_per_class` is by
    "<encoder>/<metric>" and stated for every set; `metric` says which of the two numbers the field reports.
    """

    metric: Literal["top1", "mean-per-class"]
    mean_per_class: dict[str, float]  # percent

    def row(self) -> dict[str, float]:
        """The number that the field reports, in percent, by `<encoder>/<set>`."""
        top1 = self.metric == "top1"
        return {
            f"{score.encoder}/{self.manifest.subset}": score.top1
            if top1
            else self.mean_per_class[f"{score.encoder}/{score.metric}"]
            for score in self.scores
        }


class TargetsRecord(_Evaluated):
    """The record of an evaluation on other data sets, one by one; `manifest` is of the images that the encoder was trained on."""

    encoder_sha256: str
    evaluations: Annotated[tuple[TargetEvaluation, ...], Field(min_length=1)]


class CurvePoint(Frozen):
    """Scores of the encoders that were kept after an epoch."""

    epoch: Annotated[int, Field(ge=1)]
    encoder_sha256: str  # of the snapshot's file
    scores: Annotated[Many[Score], Field(min_length=1)]


class CurveRecord(_Evaluated):
    """The record of an evaluation of the encoders saved during training: scores by epoch, without predictions."""

    points: Annotated[Many[CurvePoint], Field(min_length=1)]

    @property
    def encoder_sha256(self) -> str:
        """Of the run's encoder, the last point's."""
        return self.points[-1].encoder_sha256


class ExternalRecord(Frozen):
    """The record that `evaluate` writes of any checkpoint: the file and its evaluations."""

    format: Literal[1] = 1
    kind: Literal["external"] = "external"
    name: Annotated[str, Field(pattern=NAME)]  # of the record's folder
    label: Words  # the row's name in tables
    file: Words  # base name of the checkpoint
    sha256: str  # of its bytes
    layout: Words  # the rule that recognised it
    arch: Words
    teacher_bn: Literal["own", "student"]  # whose BatchNorm statistics a teacher ran with
    transform: dict[str, Any]
    command: Words  # without folders, which differ from machine to machine
    warnings: Many[Words] = ()  # what a reader of the numbers should know: a collapse
    evaluations: Annotated[Many[EvaluationRecord], Field(min_length=1)]
    provenance: Provenance


Record = TypeVar("Record", bound=Frozen)
AnyEvaluation = EvaluationRecord | TargetsRecord | CurveRecord


def pack_labels(values: Labels) -> str:
    """Class indices as text: little-endian uint16, zlib, base64; `DataError` where one is below 0 or above 65,535."""
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= _LARGEST_CLASS:
        found = f"class indices from {int(values.min())} to {int(values.max())}: a record holds 0 to {_LARGEST_CLASS}"
        raise DataError(found, "evaluate at most 65,536 classes at once")
    return base64.b64encode(zlib.compress(values.astype("<u2").tobytes(), 9)).decode()


def unpack_labels(text: str, most: int = MAX_QUERIES) -> Labels:
    """Inverse of `pack_labels`, as int64; `ValueError` where the text is damaged or more than `most`, which are not unpacked."""
    packed = zlib.decompressobj()
    raw = packed.decompress(base64.b64decode(text), 2 * most + 1)
    if len(raw) > 2 * most:
        raise ValueError(f"more than {most} entries")
    if not packed.eof:
        raise ValueError("cut short")
    return np.frombuffer(raw, dtype="<u2").astype(np.int64)


def query_groups(label: Labels, manifest: ManifestIdentity) -> dict[str, Mask]:
    """Masks over queries: `all`; `rare` and `large` where some class is large; `many`, `medium` and `few` where it has these.

    Args:
        label: class of every query, a position in the manifest's classes, int64, Q.
        manifest: says which class belongs where.

    Returns:
        boolean masks, Q each; groups without a query have none.
    """

    def of(classes: Iterable[str]) -> Mask:
        return np.isin(label, [manifest.classes.index(name) for name in classes])

    masks = {"all": np.ones(len(label), dtype=np.bool_)}
    if manifest.large:
        large = of(manifest.large)
        masks |= {"rare": ~large, "large": large}
    masks |= {group: of(manifest.shots[group]) for group in GROUPS if group in manifest.shots}
    return {group: mask for group, mask in masks.items() if bool(mask.any())}


def score_groups(key: str, predicted: Labels, label: Labels, groups: Mapping[str, Mask]) -> list[Score]:
    """Scores of `<encoder>/<metric>` in every group that has queries; `groups` maps a name to a boolean mask over the queries."""
    encoder, metric = key.split("/")
    hit, named = predicted == label, {"encoder": encoder, "metric": metric}
    return [
        Score.model_validate({**named, "group": group, "correct": int(hit[mask].sum()), "n": int(mask.sum())})
        for group, mask in groups.items()
        if mask.any()
    ]


def mean_per_class(predicted: Labels, label: Labels) -> float:
    """Mean over the classes that have queries of the share classified correctly, in percent; both int64, Q."""
    return 100.0 * float(_class_accuracies(predicted, label).mean())


def balancedness(predicted: Labels, label: Labels) -> float:
    """Standard deviation over classes of the accuracy, in points; both int64, Q. Source: SDCLR, Jiang et al., ICML 2021."""
    return 100.0 * float(_class_accuracies(predicted, label).std())


def _class_accuracies(predicted: Labels, label: Labels) -> np.ndarray:
    """Share of its queries that is classified correctly, of each class that has any; float64."""
    size = np.bincount(label)
    right = np.bincount(label[predicted == label], minlength=len(size))
    return right[size > 0] / size[size > 0]


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion, in percent: the formula, as `import scipy.stats` takes a second."""
    share, z = correct / n, 1.959963984540054  # the 97.5 % quantile of the normal distribution
    centre, whole = 2 * n * share + z**2, 2 * (n + z**2)
    half = z / whole * math.sqrt(4 * n * share * (1 - share) + z**2)
    return 100 * (centre / whole - half if correct else 0.0), 100 * (centre / whole + half if correct < n else 1.0)


def write_record(path: Path, record: Frozen) -> None:
    """Write a record or one part of a run's, with stable key order."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def read_record(path: Path, model: type[Record]) -> Record:
    """Read a record of a known model; `DataError` names the file and every problem."""
    return _parsed(path, _content(path), model)


def read_evaluation(path: Path) -> AnyEvaluation:
    """Read what any evaluation has written; its keys say which of the three models it is. Raises as `read_record`."""
    content = _content(path)
    try:
        keys = {*json.loads(content)}
    except (ValueError, TypeError, RecursionError):
        keys = set()
    model: type[AnyEvaluation] = EvaluationRecord
    if keys & {"points", "evaluations"}:
        model = CurveRecord if "points" in keys else TargetsRecord
    return _parsed(path, content, model)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: no such record, or no file", "run the stage that writes it")
    if path.stat().st_size > MAX_RECORD:
        found = f"{path.stat().st_size:,} bytes, at most {MAX_RECORD:,} are read"
        raise DataError(f"{path}: {found}", "this is not a record; restore the file or run its stage again")
    return path.read_bytes()


def _parsed(path: Path, content: bytes, model: type[Record]) -> Record:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise DataError(f"{path}: not a {model.__name__}: {problems(error)}", "delete it and run its stage again") from error
