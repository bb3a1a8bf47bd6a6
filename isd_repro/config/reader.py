"""The only reader of a profile's `params.yaml`."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout
from isd_repro.config.params import MethodBlock, Params, Run, Subset
from isd_repro.runtime.errors import ConfigError

Location = tuple[str | int, ...]  # keys from the top of the file
Problem = tuple[Location, str]  # its location, and what is wrong

_Found = TypeVar("_Found")
_SHOWN = 200  # characters of a value in a message
_PROBLEMS = 50  # of a file


def load(path: Path) -> tuple[Params, Layout]:
    """Read and check a `params.yaml`, or the one in a profile's folder.

    Raises:
        ConfigError: the file is missing, is not YAML, or breaks a rule; the message names every broken rule with its line.
    """
    path = path / "params.yaml" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", "run the command in a folder with a params.yaml, or give one with --params")
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))  # the parser that also finds lines, below
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
        params = Params.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, path), "fix the keys named above; docs/params.md explains each") from error
    folder = path.resolve().parent
    return params, Layout(folder, (folder / params.root).resolve(), params.profile, path.name)


def describe(error: ValidationError, path: Path, prefix: Location = ()) -> str:
    """All problems of a validation error, one `file:line key: message (got x; did you mean y?)` per line."""
    tree = YAML(typ="rt").load(path.read_text("utf-8"))  # which knows the lines, and takes longer than everything else
    return listed(path, tree, problems(error.errors(), tree, prefix))


def listed(path: Path, tree: Any, problems: Iterable[Problem]) -> str:
    """One line for each mistake, with its place; a mistake that several runs share through a YAML anchor is one line."""
    found: dict[tuple[int, object, str], list[Location]] = {}
    for location, message in problems:
        block = _at(tree, location)  # one object, shared by all of its aliases
        place = (id(block), None) if block else (_line(tree, location), location[-1:])
        found.setdefault((*place, message), []).append(location)
    lines = []
    for (_, _, message), places in found.items():
        line, (first, *others) = _line(tree, places[0]), [".".join(map(str, place)) or "params" for place in places]
        also = f" [also {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}]" if others else ""
        lines.append(f"{path}:{line} {first}: {message}{also}")
    return "\n".join([*lines[:_PROBLEMS], *([f"and {len(lines) - _PROBLEMS} more"] if len(lines) > _PROBLEMS else [])])


@contextmanager
def naming(path: Path, run: str) -> Iterator[None]:
    """Complete a `ConfigError` whose message begins with a key of the run: add the file, the line and the full key."""
    try:
        yield
    except ConfigError as error:
        tree = YAML(typ="rt").load(path.read_text("utf-8"))
        raise ConfigError(listed(path, tree, [keyed(("runs", run), error.message)]), error.hint) from error


def keyed(prefix: Location, message: str) -> Problem:
    """A message that begins with a key below `prefix`, as a problem."""
    key, _, rest = message.partition(": ")
    return (*prefix, *(int(part) if part.isdigit() else part for part in key.split("."))), rest


def problems(found: Sequence[ErrorDetails], tree: Any, prefix: Location) -> Iterator[Problem]:
    """The problems of a validation error, with the keys of the file; a misspelt required key is one problem, not two."""
    places = [_keys(tree, (*prefix, *item["loc"])) for item in found]
    absent = {place for place, item in zip(places, found, strict=True) if item["type"] == "missing"}
    meant: dict[Location, str] = {}
    for place, item in zip(places, found, strict=True):
        if item["type"] == "extra_forbidden":
            beside = [str(other[-1]) for other in absent if other[:-1] == place[:-1]]
            meant[place] = _nearest(str(place[-1]), beside) or _nearest(str(place[-1]), _known() - {place[-1]})
    answered = {(*place[:-1], key) for place, key in meant.items()}
    for place, item in zip(places, found, strict=True):
        if place in answered and item["type"] == "missing":
            continue
        if place in meant:
            yield place, f"unknown key{f' (did you mean {meant[place]!r}?)' if meant[place] else ''}"
            continue
        got = item["type"] != "missing" and not isinstance(item["input"], dict)
        for message in item["msg"].removeprefix("Value error, ").split("\n"):  # a model names everything that breaks its rules
            key, rest = keyed(place, message)
            if not rest or str(key[len(place)]) not in _at(tree, place):  # a rule of several keys says which one breaks it
                key, rest = place, message
            yield key, f"{rest} (got {_brief(item['input'])})" if got else rest


def _keys(tree: Any, location: Location) -> Location:
    """The keys of the file in a location, without the tags that pydantic adds (the `name` of a block that has several forms)."""
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


def _at(tree: Any, location: Location) -> Any:
    """The mapping at a location of the file; an empty tuple if there is none."""
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return ()
    return tree if isinstance(tree, Mapping) else ()


def _brief(value: object) -> str:
    """A value for a message, at most one line."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number with too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _line(tree: Any, location: Location) -> int:
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
            merged = [other for other in getattr(node, "merge", ()) if part in other]  # `<<: *anchor`
            if not merged:
                break
            position, node = merged[0].lc.key(part), merged[0][part]
        line = position[0] + 1
    return int(line)


def _nearest(key: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1)), "")


def _known() -> set[str]:
    """The keys of all models, including those of imported methods and evaluations."""
    names, stack = set(MethodBlock.model_fields), list[type[BaseModel]]([Frozen])
    while stack:
        for child in stack.pop().__subclasses__():
            names |= child.model_fields.keys()
            stack.append(child)
    return names


def find_run(params: Params, name: str) -> Run:
    """The run of this name; `ConfigError` with similar names if there is none."""
    return _find("run", name, params.runs, params.profile)


def find_subset(params: Params, name: str) -> Subset:
    """The subset of this name; `ConfigError` with similar names if there is none."""
    return _find("subset", name, params.subsets, params.profile)


def _find(what: str, name: str, known: Mapping[str, _Found], profile: str) -> _Found:
    if name not in known:
        nearest = f"did you mean {close!r}? " if (close := _nearest(name, known)) else ""
        raise ConfigError(f"no {what} {name!r} in profile {profile!r}", f"{nearest}known: {', '.join(known)}")
    return known[name]


def fingerprint(parts: Mapping[str, object]) -> str:
    """16 hex digits that change when any result-affecting value changes; `parts` must be JSON-serialisable."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
