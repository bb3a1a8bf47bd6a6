"""The only reader of a profile's `params.yaml`."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout
from isd_repro.config.params import MethodBlock, Params, Run, Subset
from isd_repro.runtime.errors import ConfigError

_SHOWN = 200  # characters of a value in a message
_PROBLEMS = 50  # of a file


def load(path: Path) -> tuple[Params, Layout]:
    """Read and check a `params.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or breaks a rule; every broken rule is named at once, with its line.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", "run the command in a folder with a params.yaml, or give one with --params")
    try:
        text = path.read_text("utf-8")
        tree = YAML(typ="rt").load(text)
        plain = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}", "fix the syntax") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}:1: not YAML in UTF-8: {error}", "save the file as UTF-8 text") from error
    except Exception as error:
        raise ConfigError(f"{path}:1: a value cannot be parsed ({error})", "check numbers, dates and tags in the file") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}:1: expected a mapping of groups, found {type(tree).__name__}", "see docs/params.md")
    try:
        params = Params.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(describe(error, path, tree), "fix the keys named above; docs/params.md explains each") from error
    folder = path.resolve().parent
    return params, Layout(folder, (folder / params.root).resolve(), params.profile, path.name)


def describe(error: ValidationError, path: Path, tree: Any = None, prefix: tuple[str | int, ...] = ()) -> str:
    """All problems of a validation error, one `file:line key: message (got x; did you mean y?)` a line."""
    tree = YAML(typ="rt").load(path.read_text("utf-8")) if tree is None else tree
    found = error.errors()
    rest = [f"and {len(found) - _PROBLEMS} more"] if len(found) > _PROBLEMS else []
    return "\n".join([*_problems(found[:_PROBLEMS], path, tree, prefix), *rest])


@contextmanager
def naming(path: Path, run: str) -> Iterator[None]:
    """Within the block a `ConfigError` that begins with a key of the run gets its file, its line and the whole key."""
    try:
        yield
    except ConfigError as error:
        key, _, message = error.message.partition(": ")
        location = ("runs", run, *key.split("."))
        line = _line(YAML(typ="rt").load(path.read_text("utf-8")), location)
        raise ConfigError(f"{path}:{line} {'.'.join(location)}: {message}", error.hint) from error


def _problems(found: Sequence[ErrorDetails], path: Path, tree: Any, prefix: tuple[str | int, ...]) -> Iterator[str]:
    for item in found:
        location = _keys(tree, (*prefix, *item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        notes = []
        key, separator, rest = message.partition(": ")
        if separator and key.split(".")[0] in _at(tree, location):  # a rule of several keys says which one breaks it
            location, message = (*location, *key.split(".")), rest
        if item["type"] == "extra_forbidden":
            message = "unknown key"
            notes += _did_you_mean(str(location[-1]))
        elif item["type"] != "missing" and not isinstance(item["input"], dict):
            notes.append(f"got {_brief(item['input'])}")
        detail = f" ({'; '.join(notes)})" if notes else ""
        yield f"{path}:{_line(tree, location)} {'.'.join(map(str, location)) or 'params'}: {message}{detail}"


def _keys(tree: Any, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The keys of the file in a location, without the tags that pydantic adds: the `name` of a block that has several forms."""
    node, keys, tag = tree, list[str | int](), None
    for part in location:
        if isinstance(node, Mapping) and tag is None and node.get("name") == part:
            tag = part
            continue
        keys.append(part)
        tag = None
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return tuple(keys)


def _at(tree: Any, location: tuple[str | int, ...]) -> Any:
    """What is in the file at a location; nothing where it does not have it, or has a single value."""
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return ()
    return tree if isinstance(tree, Mapping) else ()


def _brief(value: object) -> str:
    """A value for a message, at most a line of it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number with too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _line(tree: Any, location: tuple[str | int, ...]) -> int:
    """Line of the deepest part of a location that the file has; 1-based."""
    line, node = 1, tree
    for part in location:
        marks = getattr(node, "lc", None)
        if marks is None or not isinstance(node, Mapping | list):
            break
        try:
            position = marks.key(part) if isinstance(node, Mapping) else marks.item(part)
            node = node[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
        line = position[0] + 1
    return int(line)


def _did_you_mean(key: str) -> list[str]:
    known = {name for model in _models() for name in model.model_fields}
    close = difflib.get_close_matches(key, sorted(known), n=1)
    return [f"did you mean {close[0]!r}?"] if close else []


def _models() -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = [MethodBlock]
    stack: list[type[BaseModel]] = [Frozen]
    while stack:
        for child in stack.pop().__subclasses__():
            found.append(child)
            stack.append(child)
    return found


def _suggest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    return f"{nearest}known: {', '.join(known)}"


def find_run(params: Params, name: str) -> Run:
    """The run of this name; `ConfigError` with the nearest names where there is none."""
    if name not in params.runs:
        raise ConfigError(f"no run {name!r} in profile {params.profile!r}", _suggest(name, params.runs))
    return params.runs[name]


def find_subset(params: Params, name: str) -> Subset:
    """The subset of this name; `ConfigError` with the nearest names where there is none."""
    if name not in params.subsets:
        raise ConfigError(f"no subset {name!r} in profile {params.profile!r}", _suggest(name, params.subsets))
    return params.subsets[name]


def fingerprint(parts: Mapping[str, object]) -> str:
    """16 hex digits that change when any result-affecting value changes; `parts` must be JSON-serialisable."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
