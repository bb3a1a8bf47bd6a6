"""Typed parameters of a report: what it says of itself, decides, and stands beside; `params` holds the rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from isd_repro.config.fields import Count, Frozen, Many, Name, Words


class Beside(Frozen):
    """A table of the paper that runs of this profile stand beside, because they follow its protocol."""

    table: Words  # an id of isd_repro/report/paper.yaml
    rows: dict[Name, Words]  # run -> row of that table; runs of one row are its repetitions


class Hypothesis(Frozen):
    """The comparison that a profile exists to make, stated before its runs: one method less another, over draws of a subset."""

    first: Words  # methods, by the names that the tables give them
    second: Words
    group: Literal["all", "rare", "large"] = "all"  # queries
    k: Count = 1
    encoder: Literal["student", "teacher"] = "student"
    contradicted_below: float | None = None  # points; none gives no verdict
    draws: Annotated[int, Field(ge=2)] = 2  # fewer complete ones give no verdict


class Power(Frozen):
    """The comparison to come, of which the spread over the trials' classes foretells the least interval."""

    first: Name  # methods, as in `method.name`
    second: Name
    group: Literal["all", "rare", "large"] = "all"
    classes: Count  # of that group, in a draw
    draws: Many[Annotated[int, Field(ge=2)]]  # numbers of draws


class Trials(Frozen):
    """A profile whose runs are trials: the best of each method is taken, and what that says of the comparison to come."""

    group: Literal["all", "rare", "large"] = "all"  # queries that choose
    k: Count = 1
    power: Power | None = None


class ReportConfig(Frozen):
    """What a report page says of itself."""

    title: Words
    caption: Words
    notes: Many[Words] = ()
    reference: Name | None = None  # run whose encoder is untrained
    pixels: Name | None = None  # run that scores raw pixels
    hypothesis: Hypothesis | None = None
    trials: Trials | None = None
    exploratory: Many[Name] = ()  # runs that were decided after a result: in tables of their own, in no mean and no verdict
    paper: Many[Beside] = ()  # only where the profile runs the paper's protocol
