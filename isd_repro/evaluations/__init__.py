"""One file per evaluation; the file's name is the evaluation's name, and there is no other registry.

An evaluation is a file in this folder that defines `evaluate`. docs/new-evaluation.md says what else it contains. Files without
`evaluate` hold code that several evaluations share. Listing the evaluations imports none of them, so that the command line starts
fast.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isd_repro.config.fields import Frozen


@cache
def _files() -> dict[str, ast.Module]:
    """The parsed files that define `evaluate`, by name."""
    texts = {path.stem: path.read_text("utf-8") for path in Path(__file__).parent.glob("*.py")}
    found = {name: text for name, text in texts.items() if "\ndef evaluate(" in text}
    order = sorted(found, key=lambda name: ("\nOWN_TABLE = True" in found[name], name))
    return {name: ast.parse(found[name]) for name in order}


def names() -> tuple[str, ...]:
    """Names of all evaluations; those that share the main table come first."""
    return tuple(_files())


def description(name: str) -> str:
    """The first line of an evaluation's docstring."""
    return (ast.get_docstring(_files()[name]) or name).splitlines()[0]


def load(name: str) -> ModuleType:
    """The module of an evaluation."""
    return import_module(f"{__name__}.{name}")


def settings(blocks: object) -> Frozen:
    """The validated `evaluation` block of a profile, with one attribute for each evaluation.

    Raises:
        pydantic.ValidationError: a key or a value is wrong.
    """
    return _model().model_validate(blocks)


@cache
def _model() -> type[Frozen]:
    from pydantic import Field, create_model

    from isd_repro.config.fields import Frozen

    configs: dict[str, Any] = {name: load(name).Config for name in names()}
    fields: dict[str, Any] = {name: (config, Field(default_factory=config)) for name, config in configs.items()}
    return create_model("Evaluation", __base__=Frozen, **fields)


def asked(name: str, evaluation: Any) -> dict[str, Any]:
    """The settings of an evaluation in the form in which its record states them."""
    own = getattr(load(name), "settings", None)
    return dict(own(evaluation) if own else getattr(evaluation, name).model_dump(mode="json"))


def changes(name: str, evaluation: Any, stated: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which a profile differs from a record: key -> (the profile's value, the record's value).

    A key that the record lacks because it was introduced later counts as having its default there.
    """
    now, default, fields = asked(name, evaluation), asked(name, settings({})), load(name).Config.model_fields
    then = {**default, **{key: value for key, value in stated.items() if key in now or key in fields}}
    keys = [*now, *(key for key in then if key not in now)]
    return {key: (now.get(key), then.get(key)) for key in keys if now.get(key) != then.get(key)}


def problem(name: str, stated: Mapping[str, Any]) -> str:
    """What is wrong with the settings in a record, as text; "" if they are valid."""
    from pydantic import ValidationError

    from isd_repro.config.fields import problems

    if name not in names():
        return f"no evaluation {name!r}: known are {', '.join(names())}"
    try:
        load(name).Config.model_validate({key: value for key, value in stated.items() if key in load(name).Config.model_fields})
    except ValidationError as error:
        return problems(error)
    own = getattr(load(name), "problem", None)
    return str(own(stated)) if own else ""


def columns(evaluation: Any, name: str) -> tuple[str, ...]:
    """The metrics that an evaluation gives with a profile's settings, in the order of their columns."""
    return tuple(load(name).columns(getattr(evaluation, name)))


@cache
def kind_of(metric: str) -> str:
    """The evaluation that gives a metric; "" if there is none."""
    return next((name for name in names() if re.fullmatch(load(name).METRICS, metric)), "")


def head(metric: str) -> str:
    """The column heading of a metric."""
    name = kind_of(metric)
    heads = getattr(load(name), "head", None) if name else None
    return str(heads(metric)) if heads else metric


def title(name: str) -> str:
    """The title of an evaluation in headings."""
    return str(load(name).TITLE)


def note(name: str) -> str:
    """A note for readers of an evaluation's numbers; "" if there is none."""
    return str(getattr(load(name), "NOTE", ""))


def own_table(name: str) -> bool:
    """Whether an evaluation's numbers have a separate table instead of columns in the main table."""
    return bool(getattr(load(name), "OWN_TABLE", False))


def own_queries(name: str) -> bool:
    """Whether an evaluation classifies other images than the manifest's queries."""
    return bool(getattr(load(name), "OWN_QUERIES", False))


def trains(name: str) -> bool:
    """Whether an evaluation trains something; `verify` repeats such an evaluation only with `--linear`, because it takes long."""
    return bool(getattr(load(name), "TRAINS", False))


def of_any_checkpoint() -> tuple[str, ...]:
    """The evaluations that need only an encoder and labelled images, which the command `evaluate` therefore offers."""
    return tuple(name for name in names() if load(name).evaluate.__annotations__["return"] == "Outcome")


def with_options(name: str, given: Mapping[str, Any]) -> Frozen:
    """An evaluation's Config for the command `evaluate`.

    Args:
        name: the evaluation.
        given: values by option, such as `--k`; options that the evaluation does not accept are ignored.

    Raises:
        ConfigError: an option's value is wrong.
    """
    from pydantic import ValidationError

    from isd_repro.runtime.errors import ConfigError

    keys: Mapping[str, str] = getattr(load(name), "OPTIONS", {})
    own = {keys[option]: value for option, value in given.items() if option in keys}
    try:
        config: Frozen = getattr(load(name), "for_checkpoint", load(name).Config)(**own)
    except ValidationError as error:
        first = error.errors()[0]
        option = next((option for option, key in keys.items() if key == first["loc"][0]), name)
        raise ConfigError(f"{option} {given.get(option)}: {first['msg']}", "omit it to use the default") from error
    return config


def in_order(metrics: Sequence[str], evaluation: Any) -> list[str]:
    """Metrics sorted by evaluation and column; within an evaluation, metrics that the settings do not ask for come last."""
    planned = [metric for name in names() for metric in columns(evaluation, name)]
    kinds = [*names(), ""]

    def key(metric: str) -> tuple[int, int, list[int], str]:
        place = planned.index(metric) if metric in planned else len(planned)
        return kinds.index(kind_of(metric)), place, [int(number) for number in re.findall(r"\d+", metric)], metric

    return sorted(dict.fromkeys(metrics), key=key)
