"""One file per method; the file's name is the method's name and there is no other registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from isd_repro.config.fields import Frozen
from isd_repro.config.params import MethodBlock
from isd_repro.config.reader import describe, naming
from isd_repro.runtime.errors import ConfigError


def names() -> list[str]:
    """The names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a method, with its `Config` and `Method`; no other method is imported."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        nearest = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(names())
        raise ConfigError(
            f"method.name: no method {name!r}", f"{nearest}known: {known}; a new method is one file in isd_repro/methods/"
        )
    return importlib.import_module(f"{__name__}.{name}")


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
