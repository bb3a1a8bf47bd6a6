"""Command `check`: is a parameter file valid, each run's method included? Needs neither data nor a device."""

from __future__ import annotations

from pathlib import Path

from isd_repro import methods
from isd_repro.config import reader as config
from isd_repro.runtime.errors import ConfigError


def check(file: Path) -> None:
    """Raise one `ConfigError` with the problems of every run."""
    params, _ = config.load(file)
    problems = []
    for name, run in params.runs.items():
        try:
            methods.config_of(name, run.method, file)
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("\n".join(problems), "each method's keys stand in its file under isd_repro/methods/")
