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
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout
from isd_repro.config.params import MethodBlock, Params, Run, Subset
from isd_repro.runtime.errors import ConfigError

MAX_BYTES = 512 * 1024  # of a params.yaml; the largest profile has 6 kB
MAX_VALUES = 50_000  # scalars and containers, each alias counted with all that it repeats
MAX_DEPTH = 24
_SHOWN = 200  # characters of a value in a message
_PROBLEMS = 50  # of a file


def load(path: Path) -> tuple[Params, Layout]:
    """Read and check a `params.yaml`.

    Raises:
        ConfigError: the file is missing, is not YAML, or breaks a rule; every broken rule is named at once, with its line.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", "run from a folder with a params.yaml, or name one with --params")
    try:
        text = _text(path)
        tree = YAML(typ="rt").load(text)
        plain = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}", "mend the syntax") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}:1: not YAML in UTF-8: {error}", "save the file as UTF-8 text") from error
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}:1: a value cannot be read ({error})", "look for a damaged number, date or tag") from error
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}:1: expected a mapping of groups, found {type(tree).__name__}", "see docs/params.md")
    try:
        params = Params.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(describe(error, path, tree), "mend the keys named above; docs/params.md explains each") from error
    folder = path.resolve().parent
    return params, Layout(folder, (folder / params.root).resolve(), params.profile, path.name)


def _text(path: Path) -> str:
    """The file's text, once it is known that reading it takes little: aliases are counted as often as they stand."""
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read", "no profile is as long")
    text = path.read_text("utf-8")
    sizes: dict[str, int] = {}  # values below each anchor, aliases expanded
    stack: list[tuple[str | None, int]] = [(None, 0)]  # open containers: anchor, values so far
    for event in YAML(typ="safe", pure=True).parse(text):
        anchor, size = getattr(event, "anchor", None), 1
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{path}:{line}: not YAML as it is read here: it has a tag, {event.tag}", "write the plain value")
        if isinstance(event, AliasEvent):
            if any(anchor == opened for opened, _ in stack):
                raise ConfigError(f"{path}:{line}: *{anchor} contains itself", "an alias repeats what stands before it")
            size = sizes.get(str(anchor), 1)
        elif isinstance(event, CollectionStartEvent):
            stack.append((anchor, 0))
            if len(stack) > MAX_DEPTH:
                raise ConfigError(f"{path}:{line}: more than {MAX_DEPTH} levels", "no key is nested as deeply")
            continue
        elif isinstance(event, CollectionEndEvent):
            anchor, inside = stack.pop()
            size += inside
        elif not isinstance(event, ScalarEvent):
            continue
        stack[-1] = (stack[-1][0], stack[-1][1] + size)
        if stack[-1][1] > MAX_VALUES:
            raise ConfigError(f"{path}:{line}: more than {MAX_VALUES:,} values, aliases expanded", "no profile is as large")
        if anchor is not None and not isinstance(event, AliasEvent):
            sizes[anchor] = size
    return text


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
        location = prefix + tuple(part for at, part in enumerate(item["loc"]) if not _is_union_tag(at, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        notes = []
        if item["type"] == "extra_forbidden":
            message = "unknown key"
            notes += _did_you_mean(str(location[-1]))
        elif item["type"] != "missing" and not isinstance(item["input"], dict):
            notes.append(f"got {_brief(item['input'])}")
        detail = f" ({'; '.join(notes)})" if notes else ""
        yield f"{path}:{_line(tree, location)} {'.'.join(map(str, location)) or 'params'}: {message}{detail}"


def _is_union_tag(at: int, location: tuple[str | int, ...]) -> bool:
    """Pydantic puts a discriminated union's tag into the location; it is no key of the file."""
    tags = {"all", "balanced", "unbalanced", "list", "step", "cosine"}
    return location[at] in tags and at > 0 and location[at - 1] in {"rule", "schedule"}


def _brief(value: object) -> str:
    """A value for a message, at most a line of it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "an absurdly long number"
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
