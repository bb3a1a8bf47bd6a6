"""One file per method; the file's name is the method's name and there is no other registry.

A file outside the package is named by its path from this folder, without its suffix, such as `../../my_method`. That is the path
by which `dvc.yaml` finds the file of any method.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

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
