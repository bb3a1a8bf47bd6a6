"""Typed parameters of a profile: every key that a `params.yaml` may have, with its range.

The groups `backbone`, `method`, `optim`, `data` and `numerics` of a run change its results: they are DVC parameters and part of
the fingerprint. `efficiency` and `tracking` change no number and are part of neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from isd_repro.config.fields import Count, Distinct, Frozen, Group, Many, Name, Natural, Pixels, Positive, Unit, Words

_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "stl10": 10, "tiny-imagenet": 200}  # at most


def _unwritten(default: object) -> Any:
    """A key that the first records lack; it is written only if its value is not the default, so that older hashes stay valid."""
    return Field(exclude_if=lambda value: value == default)


# --- what `prepare` draws -----------------------------------------------------------------------------------------


class Source(Frozen):
    """Where images come from. The folder itself is never a parameter: it differs from machine to machine."""

    name: Literal["digits", "image-folder", "tiny-imagenet", "cifar10", "cifar100", "stl10"]
    root_env: Words = ""  # environment variable that names the folder; unused by `digits`
    dataset: Words  # the data set's public name, as provenance shows it
    # Pixels by which each of the `digits` is moved at most, vertically and horizontally. MNIST centres them.
    shift: Annotated[int, Field(ge=0, le=8), _unwritten(0)] = 0

    @model_validator(mode="after")
    def _keys_suit_the_name(self) -> Source:
        if self.name != "digits" and not self.root_env:
            raise ValueError("root_env must name the environment variable that holds the image folder")
        if self.name != "digits" and self.shift:
            raise ValueError(f"shift: {self.shift}, but only the source `digits` is shifted; delete the key")
        return self


def _ordered(low: str, high: str) -> Any:
    """A validator: one value is not above the other."""

    def check(self: Any) -> Any:
        if getattr(self, low) > getattr(self, high):
            raise ValueError(f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}")
        return self

    return model_validator(mode="after")(check)


Classes = Count | Distinct[Words] | None  # how many to draw, or which; none means all of them


class AllClasses(Frozen):
    """Every training image of the chosen classes."""

    name: Literal["all"]
    classes: Count | None = None  # how many to draw; none means all of them
    seed: Natural = 0


class Balanced(Frozen):
    """The same number of training images of each chosen class."""

    name: Literal["balanced"]
    classes: Count | None = None
    per_class: Count
    seed: Natural = 0


# Images of every class, large or rare, in place of the unbalanced draw: its balanced control. A class that is rare keeps the
# images of that draw and gets more.
PerClass = Annotated[Count | None, _unwritten(None)]


class Unbalanced(Frozen):
    """All images of `large` classes, and `rare_images` of each other chosen class (paper, unbalanced section)."""

    name: Literal["unbalanced"]
    classes: Count | None = None
    large: Count  # L, the number of large classes
    rare_images: Count  # n, images kept of each rare class
    large_classes: Distinct[Words] | None = None  # explicit choice instead of a draw
    per_class: PerClass = None
    seed: Natural = 0

    @model_validator(mode="after")
    def _named_classes_are_counted(self) -> Unbalanced:
        if self.large_classes is not None and len(self.large_classes) != self.large:
            found = f"large: {self.large}, but large_classes names {len(self.large_classes)} classes"
            raise ValueError(f"{found}; make the two numbers equal")
        return self


class Halves(Frozen):
    """`Unbalanced` on a part of the classes: some are set aside for tuning; the others are split into halves by `halving`."""

    name: Literal["halves"]
    tuning: Natural  # classes set aside, drawn once by the seed
    part: Literal["tuning", "first", "second"]
    halving: Natural = 0  # which of the random halvings; part `tuning` does not depend on it
    large: Count
    large_by: Literal["draw", "name"] = "draw"  # drawn, or the first by name, as in the authors' lists
    rare_images: Count
    per_class: PerClass = None
    seed: Natural = 0


class ListFile(Frozen):
    """One of the authors' lists (`D1`..`D10`), read from a folder that an environment variable names."""

    name: Literal["list"]
    list: Annotated[str, Field(pattern=r"^D([1-9]|10)$")]
    root_env: Words = "ISD_LISTS_ROOT"

    @property
    def listed(self) -> str:
        """The file that the rule reads."""
        return f"{self.list}.txt"


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Exponential(Frozen):
    """Class sizes that fall exponentially from the first class to the last: CIFAR-10-LT and CIFAR-100-LT (Cao et al. 2019)."""

    name: Literal["exponential"]
    classes: Classes = None
    imbalance: Annotated[float, Field(ge=1)]  # images of the largest class for each of the smallest
    max_per_class: Count | None = None  # images of the largest class; none means as many as every class has
    order: Literal["name", "draw"] = "name"  # which class is the largest: the first by name, as in CIFAR-LT, or drawn
    seed: Natural = 0


class Pareto(Frozen):
    """Class sizes at the quantiles of a Pareto distribution: ImageNet-LT's defaults (Liu et al. 2019)."""

    name: Literal["pareto"]
    classes: Classes = None
    alpha: Positive = 6.0
    max_per_class: Count = 1280
    min_per_class: Count = 5
    order: Literal["name", "draw"] = "draw"
    seed: Natural = 0
    _sizes_are_a_range = _ordered("min_per_class", "max_per_class")


class ImageList(Frozen):
    """The images of a published list of `class/file label` lines, such as those of ImageNet-LT and ImageNet-100-LT."""

    name: Literal["file"]
    path: Words  # of the list, inside the folder that the variable names
    sha256: Sha256 | None = None  # of its bytes; none takes any list of this name and says its hash
    root_env: Words = "ISD_LISTS_ROOT"

    @property
    def listed(self) -> str:
        """The file that the rule reads."""
        return self.path


class NamedClasses(Frozen):
    """Classes by name, such as the 100 of ImageNet-100: all of their training images, or the same number of each."""

    name: Literal["classes"]
    classes: Distinct[Words] | None = None
    file: Words | None = None  # a list with one class on each line, inside the folder that the variable names
    sha256: Sha256 | None = None  # of the file's bytes
    root_env: Words = "ISD_LISTS_ROOT"
    per_class: Count | None = None
    seed: Natural = 0

    @property
    def listed(self) -> str | None:
        """The file that the rule reads, if it reads one."""
        return self.file

    @model_validator(mode="after")
    def _one_list(self) -> NamedClasses:
        if (self.classes is None) == (self.file is None):
            raise ValueError("give the classes either as a list in `classes` or as a `file`")
        if self.sha256 and not self.file:
            raise ValueError("sha256 is of a `file`, and none is given")
        return self


Rule = Annotated[
    AllClasses | Balanced | Unbalanced | Halves | ListFile | Exponential | Pareto | ImageList | NamedClasses,
    Field(discriminator="name"),
]


def in_words(rule: Rule) -> str:
    """The training images of a rule as tables state them."""
    named = getattr(rule, "classes", None)
    of = f" of {named if isinstance(named, int) else len(named)} classes" if named else ""
    match rule:
        case AllClasses():
            return f"all training images{of}"
        case Balanced():
            return f"{rule.per_class} training images per class{of}"
        case Unbalanced() | Halves():
            first = ", the first by name" if isinstance(rule, Halves) and rule.large_by == "name" else ""
            rare = f"{rule.rare_images} image{'' if rule.rare_images == 1 else 's'}"
            large = f"{rule.large}{of.removesuffix(' classes')} classes large{first}"
            return f"{large}, with all images; the rare ones with {rare} each"
        case Exponential():
            most = f"{rule.max_per_class} images" if rule.max_per_class else "all its images"
            return f"imbalance {rule.imbalance:g}{of}: the largest class with {most}, the others falling exponentially"
        case Pareto():
            sizes = f"{rule.max_per_class} to {rule.min_per_class} images per class{of}"
            return f"{sizes}, Pareto distribution of power {rule.alpha:g}"
        case NamedClasses():
            images = f"{rule.per_class} training images per class" if rule.per_class else "all training images"
            return f"{images} of {f'the classes of {rule.file}' if rule.file else f'{len(named or ())} named classes'}"
        case ListFile():
            return f"the authors' list {rule.list}"
        case ImageList():
            return f"the list {rule.path}"


class Shots(Frozen):
    """Query groups by the number of training images of a class; the defaults are those of ImageNet-LT (Liu et al. 2019)."""

    many_above: Count = 100  # `many`: classes with more training images than this
    few_below: Count = 20  # `few`: classes with fewer; the others are `medium`

    @model_validator(mode="after")
    def _is_a_range(self) -> Shots:
        if self.few_below > self.many_above + 1:
            raise ValueError(f"few_below {self.few_below} is above many_above {self.many_above}, so the groups overlap")
        return self


class StoreSettings(Frozen):
    """How images are packed: `square` resizes to side x side, `short-side` keeps the aspect ratio, `none` keeps the size.

    `side` was once called `size`, a name that DVC ignores when it looks in its run cache for a stage with the same parameters.
    The old name is still read, and manifests, fingerprints and records still contain it.
    """

    resize: Literal["none", "square", "short-side"] = "none"
    side: Pixels | None = None
    channels: Literal[1, 3] = 3
    external: bool = False  # pack under ISD_PACK_ROOT, keyed by manifest hash, instead of inside the profile
    # Keep JPEGs of this quality; none keeps pixels.
    jpeg_quality: Annotated[Annotated[int, Field(ge=1, le=100)] | None, _unwritten(None)] = None

    @model_validator(mode="before")
    @classmethod
    def _reads_the_old_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "size" not in given:
            return given
        if "side" in given:
            raise ValueError("side and size are the same key; give only side")
        return {"side" if key == "size" else key: value for key, value in given.items()}

    @model_serializer(mode="wrap")
    def _as_first_written(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"size" if key == "side" else key: value for key, value in default(self).items()}

    @model_validator(mode="after")
    def _side_goes_with_resize(self) -> StoreSettings:
        if (self.side is None) != (self.resize == "none"):
            raise ValueError("side must be given with resize square or short-side, and only then")
        return self


class Subset(Frozen):
    """The images of a run: the training images, and the search set and the queries of its evaluations."""

    source: Source
    rule: Rule
    search_per_class: Count | None = None  # balanced labelled search set from train images; none means all of them
    query_per_class: Count | None = None  # balanced validation queries; none means all of them
    corrupt_share: Unit = 0.0  # share of unreadable images above which `prepare` fails
    store: StoreSettings = StoreSettings()
    # Go on where more than 1 % of the queries have the bytes of a training or search image.
    allow_shared_images: Annotated[bool, _unwritten(False)] = False
    unlabelled: Annotated[bool, _unwritten(False)] = False  # train on images without labels, too
    shots: Annotated[Shots | None, _unwritten(None)] = None  # groups `many`, `medium` and `few`

    @model_validator(mode="after")
    def _classes_suffice(self) -> Subset:
        """Check what can be checked without the images; `prepare` checks the rest."""
        rule, most = self.rule, _CLASSES.get(self.source.name)
        asked = getattr(rule, "classes", None)
        asked = len(asked) if isinstance(asked, tuple) else asked
        if asked and most and asked > most:
            raise ValueError(f"rule.classes: {asked} classes, but {self.source.name} has {most}")
        classes, large = asked or most, getattr(rule, "large", 0)
        if isinstance(rule, Halves) and classes:
            classes = rule.tuning if rule.part == "tuning" else (classes - rule.tuning) // 2
        if classes is not None and large >= classes:
            found = f"rule.large: {large} large classes of {classes} leave no rare one"
            raise ValueError(f"{found}; lower large or raise the number of classes")
        return self

    def stated(self) -> dict[str, object]:
        """All settings that determine which images a subset has and how they are packed, as a manifest states its rule."""
        return {
            "source": self.source.name,
            **({"shift": self.source.shift} if self.source.shift else {}),
            **self.rule.model_dump(mode="json"),
            "search_per_class": self.search_per_class,
            "query_per_class": self.query_per_class,
            "store": self.store.model_dump(mode="json", exclude={"external"}),
            **({"unlabelled": True} if self.unlabelled else {}),
            **({"shots": self.shots.model_dump(mode="json")} if self.shots else {}),
        }


# --- what a run is ------------------------------------------------------------------------------------------------


class BackboneConfig(Frozen):
    """The encoder: a ResNet of torchvision, a narrow ResNet for CPUs, or raw pixels as a reference without weights."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet-narrow", "pixels"]
    # torchvision's ResNets: 7x7/2 + max-pool, or 3x3/1 for small images. resnet-narrow: always 3x3/1, or 3x3/2 if strided.
    stem: Literal["imagenet", "small", "strided"] = "imagenet"
    width: Annotated[int, Field(ge=1, le=1024)] = 64  # channels of the first stage
    # resnet-narrow: features are means over a pool x pool grid; 1 is global average pooling.
    pool: Annotated[int, Field(ge=1, le=64)] = 1
    channels: Literal[1, 3] = 3


class MethodBlock(BaseModel):
    """The method's name, or the path of a file outside the package from isd_repro/methods, without its suffix.

    Every other key belongs to that method's own Config and is checked by it.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: Annotated[str, Field(pattern=r"^(\.\./([\w.-]+/)*)?[a-z][a-z0-9_]*$")]

    @property
    def options(self) -> dict[str, Any]:
        """The keys that the method's file checks."""
        return dict(self.model_extra or {})


class Step(Frozen):
    """Multiply the learning rate by `factor` after each epoch listed."""

    name: Literal["step"]
    milestones: Many[Count]
    factor: Positive


class Cosine(Frozen):
    """Half a cosine from the full learning rate at the first epoch, one value per epoch (UMBCvision/ISD at 4bdd603)."""

    name: Literal["cosine"]


Schedule = Annotated[Step | Cosine, Field(discriminator="name")]


class Optim(Frozen):
    """SGD with momentum, as every method of the paper uses it; or LARS, or AdamW."""

    name: Annotated[Literal["sgd", "lars", "adamw"], _unwritten("sgd")] = "sgd"
    epochs: Annotated[int, Field(ge=0, lt=2**31)]  # 0 exports the initial encoder: the untrained row
    batch_size: Count
    lr: Positive
    sgd_momentum: Unit = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Schedule
    warmup_epochs: Annotated[Natural, _unwritten(0)] = 0
    exclude_norm_and_bias: Annotated[bool, _unwritten(False)] = False  # from weight decay

    @model_validator(mode="after")
    def _keys_fit(self) -> Optim:
        if self.name == "adamw" and self.sgd_momentum != 0.9:
            raise ValueError("sgd_momentum: adamw does not read it; its betas are 0.9 and 0.999; remove the key")
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            found = f"warmup_epochs: {self.warmup_epochs} of {self.epochs} epochs"
            raise ValueError(f"{found}; the warm-up must end before the training")
        return self


class Jitter(Frozen):
    """torchvision's ColorJitter strengths and the probability of applying it."""

    brightness: Unit
    contrast: Unit
    saturation: Unit
    hue: Annotated[float, Field(ge=0, le=0.5)]
    p: Unit


class Blur(Frozen):
    """Gaussian blur: sigma drawn uniformly, in pixels of the view."""

    sigma_min: Positive
    sigma_max: Positive
    p: Unit
    _sigma_is_a_range = _ordered("sigma_min", "sigma_max")


class View(Frozen):
    """One augmentation: random resized crop, flip, jitter, grayscale, blur, solarisation, in this order."""

    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.2  # smallest share of the area
    crop_max: Annotated[float, Field(gt=0, le=1)] = 1.0
    flip: Unit = 0.5
    jitter: Jitter | None = None
    grayscale: Unit = 0.0
    blur: Blur | None = None
    solarise: Annotated[Unit, _unwritten(0.0)] = 0.0
    _crop_is_a_range = _ordered("crop_min", "crop_max")


class Data(Frozen):
    """The subset that a run is trained on, and the transforms of its images."""

    subset: Name
    image_size: Pixels  # side of the square that the encoder sees
    crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation: resize to size / ratio, then centre crop
    mean: Many[float] = (0.485, 0.456, 0.406)
    std: Many[Positive] = (0.229, 0.224, 0.225)
    view_student: View
    view_teacher: View
    views_more: Annotated[Many[View], _unwritten(())] = ()


class Numerics(Frozen):
    """Settings that determine the arithmetic of a run."""

    seed: Natural = 0
    bn_groups: Count = 1  # BatchNorm statistics per batch / bn_groups images, as on that many devices
    precision: Literal["float32", "bf16"] = "float32"  # bf16 is autocast, on CUDA and on CPUs that multiply it
    engine: Annotated[Literal["reference", "fast"], _unwritten("reference")] = "reference"
    # Threads of torch on the CPU: sums of another number of parts have other last bits. None takes what the machine gives.
    threads: Annotated[Count | None, _unwritten(None)] = None


class Run(Frozen):
    """One pretraining run."""

    label: Words  # the row's name in tables; changes no number
    notes: Many[Words] = ()  # DEVIATIONS ids and remarks that are shown with the row
    backbone: BackboneConfig
    method: MethodBlock
    optim: Optim
    data: Data
    numerics: Numerics = Numerics()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Run:
        batch, groups, channels = self.optim.batch_size, self.numerics.bn_groups, self.backbone.channels
        if batch % groups or batch // groups < 2:
            wanted = "optim.batch_size must be a multiple of bn_groups, at least twice as large"
            raise ValueError(f"numerics.bn_groups: {groups} groups of a batch of {batch}; {wanted}")
        if not len(self.data.mean) == len(self.data.std) == channels:
            found = f"{len(self.data.mean)} means, {len(self.data.std)} deviations, {channels} channels"
            raise ValueError(f"data: {found}; each channel needs one mean and one std")
        if self.backbone.arch == "pixels" and self.optim.epochs:
            raise ValueError("optim.epochs: the backbone `pixels` has no weights to train; set optim.epochs to 0")
        return self


# --- what a report says of itself, decides, and compares with the paper -----------------------------------------------


class PaperRows(Frozen):
    """A table of the paper with which runs of this profile are compared, because they follow its protocol."""

    table: Words  # an id of isd_repro/report/paper.yaml
    rows: dict[Name, Words]  # run -> row of that table; runs of one row are its repetitions


class Hypothesis(Frozen):
    """The comparison for which a profile exists, stated before its runs: one method minus another, over draws of a subset."""

    first: Words  # methods, by the names that the tables give them
    second: Words
    group: Group = "all"  # queries
    k: Count = 1
    encoder: Literal["student", "teacher"] = "student"
    contradicted_below: float | None = None  # points; none gives no verdict
    draws: Annotated[int, Field(ge=2)] = 2  # fewer complete ones give no verdict
    readings: dict[Literal["supported", "contradicted", "undecided"], Words] = Field(default_factory=dict)  # of a verdict
    registered: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None  # commit that first contained this rule


class Power(Frozen):
    """The planned comparison; the standard deviation over the trials' classes gives a lower bound of its interval."""

    first: Words  # methods, as in `method.name`
    second: Words
    group: Group = "all"
    classes: Count  # of that group, in a draw
    draws: Distinct[Annotated[int, Field(ge=2)]]  # numbers of draws


class Trials(Frozen):
    """The runs of the profile are trials, of which the best of each method is taken; `power` plans the later comparison."""

    group: Group = "all"  # queries that choose
    k: Count = 1
    power: Power | None = None


class ReportConfig(Frozen):
    """Title and text of the report page."""

    title: Words
    caption: Words
    notes: Many[Words] = ()
    reference: Name | None = None  # run whose encoder is untrained
    pixels: Name | None = None  # run that scores raw pixels
    hypothesis: Hypothesis | None = None
    trials: Trials | None = None
    exploratory: Distinct[Name] = ()  # runs that were decided after a result: in tables of their own, in no mean and no verdict
    paper: Many[PaperRows] = ()  # only where the profile runs the paper's protocol


# --- the rest of a profile ----------------------------------------------------------------------------------------


class Efficiency(Frozen):
    """Settings that affect speed but no result."""

    log_every: Count = 10  # steps between two reads of the loss
    checkpoint_every: Count = 1  # epochs between two checkpoints
    workers: Count | None = None  # threads that decode JPEGs of a store; none means one for each core of this process
    snapshot_every: Natural = 0  # epochs between two encoders kept for the `trajectory` stage; 0 keeps none


class Tracking(Frozen):
    """Weights & Biases tracking, in addition to `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: Words = "isd-repro"
    entity: Words | None = None


class Params(Frozen):
    """A whole `params.yaml`."""

    profile: Name
    root: Words = "."
    report: ReportConfig
    evaluation: Any = Field(default=None, validate_default=True)  # a block for each evaluation, checked by its file
    efficiency: Efficiency = Efficiency()
    tracking: Tracking = Tracking()
    subsets: dict[Name, Subset]
    linear_runs: Distinct[Name] = ()  # runs that the `linear` stage scores
    knn_dense_runs: Distinct[Name] = ()  # and `knn_dense`
    few_label_runs: Distinct[Name] = ()  # and `few_label`
    transfer_runs: Distinct[Name] = ()  # and `transfer`
    trajectory_runs: Distinct[Name] = ()  # runs whose snapshots the `trajectory` stage scores
    runs: dict[Name, Run]

    @field_validator("evaluation", mode="before")
    @classmethod
    def _of_the_files(cls, blocks: Any) -> Any:
        """Each evaluation validates its own block; the package is imported here because it is in a higher layer."""
        return blocks if isinstance(blocks, Frozen) else import_module("isd_repro.evaluations").settings(blocks or {})

    @model_validator(mode="after")
    def _names_resolve(self) -> Params:
        problems = []
        if PurePath(self.root).is_absolute():
            problems.append(f"root: {self.root!r} is absolute; give a path relative to the profile's folder, such as '../..'")
        for key, run in self.runs.items():
            if run.data.subset not in self.subsets:
                problems.append(f"runs.{key}.data.subset: {run.data.subset!r} is not one of {sorted(self.subsets)}")
            elif (packed := self.subsets[run.data.subset].store.channels) != run.backbone.channels:
                found = f"{run.backbone.channels}, but its subset has {packed}-channel images"
                problems.append(f"runs.{key}.backbone.channels: {found}")
        if self.trajectory_runs and not self.efficiency.snapshot_every:
            problems.append("trajectory_runs: no snapshots are saved; set efficiency.snapshot_every")
        if self.transfer_runs and not self.evaluation.transfer.sets:
            problems.append("transfer_runs: no target data sets; list them in evaluation.transfer.sets")
        for place, key in self.named_runs():
            if key not in self.runs:
                problems.append(f"{place}: {key!r} is not one of the runs {sorted(self.runs)}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def named_runs(self) -> Iterator[tuple[str, str]]:
        """Pairs of a place outside `runs` that names a run, as `<key>` or `<key>.<position>`, and the run that it names."""
        for field in type(self).model_fields:
            if field.endswith("_runs"):
                yield from ((f"{field}.{at}", run) for at, run in enumerate(getattr(self, field)))
        yield from ((f"report.exploratory.{at}", run) for at, run in enumerate(self.report.exploratory))
        for at, table in enumerate(self.report.paper):
            yield from ((f"report.paper.{at}.rows.{run}", run) for run in table.rows)
        yield from ((f"report.{key}", run) for key in ("reference", "pixels") if (run := getattr(self.report, key)))
