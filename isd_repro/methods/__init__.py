"""One file per method; the file's name is the method's name and there is no other registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from isd_repro.errors import ConfigError


def names() -> list[str]:
    """Every method there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a method, with its `Config` and `Method`; no other method is imported."""
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        nearest = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"method.name: no method {name!r}", f"{nearest}known: {', '.join(names())}; a new one is one file in methods/")
    return importlib.import_module(f"{__name__}.{name}")
