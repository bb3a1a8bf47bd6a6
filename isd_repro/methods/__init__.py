"""One file per method; the file's name is the method's name and there is no other registry.

A file outside the package is named by its path from this folder, without its suffix, such as `../../my_method`. That is the path
by which `dvc.yaml` finds the file of any method.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from isd_repro.config.fields import Frozen
from isd_repro.config.params import MethodBlock
from isd_repro.config.reader import describe, naming
from isd_repro.runtime.errors import ConfigError
from isd_repro.runtime.files import sha256_file


def names() -> list[str]:
    """The names of all methods of the package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a method, with its `Config` and `Method`; no other method is imported."""
    if "/" in name:
        return _outside(name)
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        nearest = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(names())
        raise ConfigError(
            f"method.name: no method {name!r}", f"{nearest}known: {known}; a new method is one file in isd_repro/methods/"
        )
    return importlib.import_module(f"{__name__}.{name}")


@cache
def _outside(name: str) -> ModuleType:
    file = _file(name)
    if not file.is_file():
        raise ConfigError(f"method.name: no file {file}", "give its path from isd_repro/methods, without .py: ../../my_method")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # pydantic looks up annotations there
    spec.loader.exec_module(module)
    if not (hasattr(module, "Config") and hasattr(module, "Method")):
        raise ConfigError(f"method.name: {file} has no class Config or no class Method", "docs/new-method.md shows a whole file")
    return module


def _file(name: str) -> Path:
    return (Path(__file__).parent / f"{name}.py").resolve()


def identity(name: str) -> dict[str, str]:
    """What records and fingerprints say of a method: its name, and the hash of a file that is no part of the package."""
    return {"name": name, **({"file_sha256": sha256_file(_file(name))} if "/" in name else {})}


def agree(block: MethodBlock, stated: Mapping[str, Any]) -> bool:
    """Whether a record states what a run's `method` block asks for, as far as the method's file can be read without importing it.

    Importing a method takes torch. Where this is False, `config_of` has the last word.
    """
    if not (file := _file(block.name)).is_file():
        return False
    asked = identity(block.name) | block.options
    ours = _defaults(file) | asked
    return asked.keys() <= stated.keys() <= ours.keys() and all(ours[key] == value for key, value in stated.items())


@cache
def _defaults(file: Path) -> dict[str, Any]:
    """The defaults of a method's Config that are written out as plain values."""
    found: dict[str, Any] = {}
    for part in ast.parse(file.read_text("utf-8")).body:
        for field in part.body if isinstance(part, ast.ClassDef) and part.name == "Config" else ():
            if isinstance(field, ast.AnnAssign) and field.value is not None:
                with suppress(ValueError):
                    found[ast.unparse(field.target)] = ast.literal_eval(field.value)
    return found


def config_of(run: str, block: MethodBlock, file: Path) -> Frozen:
    """A run's `method` block as that method's own Config; `ConfigError` names every bad key of it in `file`."""
    with naming(file, run):
        module = load(block.name)
    try:
        config: Frozen = module.Config.model_validate(block.options)
    except ValidationError as error:
        problems = describe(error, file, prefix=("runs", run, "method"))
        raise ConfigError(problems, f"isd_repro/methods/{block.name}.py lists its keys") from error
    return config
