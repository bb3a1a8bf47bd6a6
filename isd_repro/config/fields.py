"""The strict base model of parameter blocks and records, and the types of single values."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError

from isd_repro.runtime.errors import is_visible

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)]  # no dot: DVC reads one as a level of the file
Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Pixels = Annotated[int, Field(ge=1, le=4096)]  # side of a square
Natural = Annotated[int, Field(ge=0, lt=2**63)]
# Queries by their class: large or rare in an unbalanced draw; many, medium or few training images, by stated thresholds.
Group = Literal["all", "rare", "large", "many", "medium", "few"]
GROUPS: tuple[Group, ...] = get_args(Group)
_Item = TypeVar("_Item")
Many = Annotated[tuple[_Item, ...], Strict(False)]  # strict models take a list for a tuple; its items stay strict


def _none_twice(items: tuple[_Item, ...]) -> tuple[_Item, ...]:
    twice = next((item for at, item in enumerate(items) if item in items[:at]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is listed twice; list it once")
    return items


Distinct = Annotated[Many[_Item], AfterValidator(_none_twice)]  # each item becomes a stage, a column or a row


def _words(text: str) -> str:
    if not all(each == "\n" or is_visible(each) for each in text):
        raise ValueError("contains invisible characters, such as terminal or text-direction control codes")
    return text


Words = Annotated[str, AfterValidator(_words)]  # of a reader's language, for tables and pages


class Frozen(BaseModel):
    """Base of every parameter block: immutable; an unknown key is an error, and so are `"5"` and `true` in place of a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def problems(error: ValidationError, prefix: str = "") -> str:
    """Every problem of a validation error in one line; `prefix` stands before each key."""
    return "; ".join(f"{prefix}{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
