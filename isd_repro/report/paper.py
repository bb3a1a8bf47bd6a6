"""The numbers that the paper prints, from `paper.yaml` in this folder.

Numbers are kept as printed. If a printed number is wrong, `corrected` is the right one and `why` gives the reason; both are shown
wherever the number is. A column states with which of our numbers it can be compared and the tolerance, which was fixed before any
run, or why a comparison would be meaningless.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator
from ruamel.yaml import YAML

from isd_repro.config.fields import Frozen, Many, Name
from isd_repro.runtime.errors import ConfigError

Exact = Annotated[Decimal, Strict(False)]  # a number as it is printed; YAML gives a float or an integer

FILE = Path(__file__).with_name("paper.yaml")
Key = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Confidence = Literal["high", "medium", "low"]


class Publication(Frozen):
    """A publication from which numbers were read; `name` is its short name."""

    name: str
    title: str
    where: str


class Tolerance(Frozen):
    """The largest difference in points between our value and the paper's for the verdict `within`; `why` gives its reason."""

    points: Annotated[Exact, Field(gt=0)]
    why: str


class Value(Frozen):
    """One printed number; `corrected` and `why` are given together; `source` is given if it differs from the table's."""

    printed: Exact
    corrected: Exact | None = None
    why: str = ""
    source: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_number(cls, given: Any) -> Any:
        return {"printed": given} if isinstance(given, int | float | Decimal) else given

    @property
    def value(self) -> Decimal:
        """The value used: the correction if there is one."""
        return self.printed if self.corrected is None else self.corrected


class PaperColumn(Frozen):
    """One column: with which of our numbers, of the student, it is compared, and how."""

    head: str
    metric: str | None = None  # None if no stage measures it
    group: Literal["all", "rare", "large"] = "all"
    tolerance: Tolerance | None = None  # for a verdict on single values
    not_comparable: str = ""  # instead of a tolerance, the reason why there is no verdict
    mean_difference: Tolerance | None = None  # for a verdict on the mean difference of two methods over draws
    epoch: int | None = None  # of a curve over training, whose columns are epochs


class PaperRow(Frozen):
    """One row's identity and its values in the order of the columns.

    `comparable` rows have ISD's budget and protocol; `reference` rows use labels, a larger teacher or no training; `other` rows
    have another budget or protocol.
    """

    method: str
    arch: Literal["resnet18", "resnet50"] | None = None
    epochs: int | None = None  # of pretraining; None if the paper does not state them
    batch: int | None = None
    symmetric: bool | None = None  # whether both views pass through both encoders (twice the work)
    draw: str | None = None  # D1 to D10, of the unbalanced table
    encoder: Literal["student", "teacher"] = "student"
    group: Literal["comparable", "reference", "other"]
    values: Many[Value | None]

    @property
    def label(self) -> str:
        """The row's label, such as `MoCo v2, ResNet-50, 200 epochs, symmetric`."""
        network = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", None: ""}[self.arch]
        facts = [self.method, network, self.draw or "", f"{self.epochs:,} epochs" if self.epochs else ""]
        facts += ["symmetric" if self.symmetric else "", "teacher" if self.encoder == "teacher" else ""]
        return ", ".join(filter(None, facts))


class MeanCheck(Frozen):
    """For each row that has all of them, the mean of some columns must equal another column."""

    kind: Literal["mean"]
    of: Many[Key]
    equals: Key


class DifferenceCheck(Frozen):
    """For each draw and column, the value of one row minus that of another must equal that of a third."""

    kind: Literal["difference"]
    minuend: str
    subtrahend: str
    equals: str


class Implied(Frozen):
    """A group for which the paper prints no number, computed from a group that contains it.

    With equally many queries per class, its value is (classes * whole - part_classes * part) / (classes - part_classes).
    """

    head: str
    whole: Key
    part: Key
    classes: int
    part_classes: int
    assumes: str
    group: Literal["all", "rare", "large"]
    mean_difference: Tolerance

    def of(self, whole: Decimal, part: Decimal) -> Decimal:
        """The implied value, percent."""
        return (self.classes * whole - self.part_classes * part) / (self.classes - self.part_classes)


class PaperImages(Frozen):
    """The numbers of images and classes of a table, which ours must match for a comparison with the paper."""

    classes: int
    train: int | None = None  # for pretraining; None if a published list determines them
    query: int  # validation images
    manifests: Many[str] = ()  # sha256 of manifests that are known to consist of exactly these images


class PaperTable(Frozen):
    """One table or figure as one version of the paper prints it; `dataset` is what its encoders were pretrained on."""

    id: Key
    title: str
    version: str
    dataset: str = "ImageNet-1k (ILSVRC 2012)"
    images: Key = "imagenet"
    unit: Literal["percent", "share"] = "percent"
    source: str
    confidence: Confidence
    notes: Many[str] = ()
    columns: dict[Key, PaperColumn]
    implied: Implied | None = None
    checks: Many[Annotated[MeanCheck | DifferenceCheck, Field(discriminator="kind")]] = ()
    rows: dict[Key, PaperRow]

    def value(self, row: str, column: str) -> Value | None:
        """One cell."""
        return self.rows[row].values[list(self.columns).index(column)]

    def cells(self) -> Iterator[tuple[str, str, Value]]:
        """Every printed number with its row and column."""
        for name, row in self.rows.items():
            for column, value in zip(self.columns, row.values, strict=True):
                if value is not None:
                    yield name, column, value

    @property
    def curve(self) -> bool:
        """Whether it is a figure of scores over training rather than a table."""
        return all(column.epoch for column in self.columns.values())

    @property
    def draws(self) -> tuple[str, ...]:
        """The draws of its rows, in order."""
        return tuple(dict.fromkeys(row.draw for row in self.rows.values() if row.draw))

    @property
    def difference(self) -> DifferenceCheck | None:
        """The printed comparison of two methods over draws."""
        return next((check for check in self.checks if check.kind == "difference"), None)

    def of_draw(self, method: str, draw: str, column: str) -> Value | None:
        """The value of a method on a draw."""
        found = (name for name, row in self.rows.items() if (row.method, row.draw) == (method, draw))
        return next((self.value(name, column) for name in found), None)


class Disagreement(Frozen):
    """A statement on which sources disagree, from reading them."""

    id: Name
    tables: Many[Key] = ()
    about: str
    says: dict[Key, str]
    verdict: str
    confidence: Confidence


class Paper(Frozen):
    """The whole file."""

    sources: dict[Key, Publication]
    images: dict[Key, PaperImages]
    tables: Many[PaperTable]
    disagreements: Many[Disagreement]
    absent: Many[str]

    def table(self, name: str) -> PaperTable:
        """One table by its id.

        Raises:
            ConfigError: there is no such table.
        """
        found = {table.id: table for table in self.tables}
        if name not in found:
            raise ConfigError(f"report.paper: the paper has no table {name!r}", f"its tables are {', '.join(found)}")
        return found[name]


@cache
def load() -> Paper:
    """The published numbers that ship with the package."""
    return Paper.model_validate(YAML(typ="safe").load(FILE.read_text("utf-8")))
