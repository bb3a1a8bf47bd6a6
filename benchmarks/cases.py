"""Every comparison by name, with its sizes on this machine, and how one is measured and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import bank_loss, evaluate, harness, knn, linear_probe, loader, table, tracking, training_step, views
from isd_repro.runtime.errors import ConfigError, UserError
from isd_repro.runtime.files import write_atomic

SUBJECTS: tuple[Any, ...] = (bank_loss, views, training_step, knn, linear_probe, loader, evaluate, tracking)


@dataclass(frozen=True)
class Case:
    """A comparison with sizes."""

    measure: Callable[[Any, harness.Say], harness.Comparison]
    sizes: Any


def cases(*, toy: bool = False) -> dict[str, Case]:
    """By name. The sizes are those of the device; `toy` makes small ones of all sizes that there are for any device."""
    found = {}
    for subject in SUBJECTS:
        sizes: Mapping[str, Any] = subject.CUDA if harness.device_of().type == "cuda" else subject.CPU
        if toy:
            sizes = {name: subject.toy(each) for name, each in {**subject.CPU, **subject.CUDA}.items()}
        found.update({name: Case(subject.measure, each) for name, each in sizes.items()})
    return found


def changed(sizes: Any, settings: Mapping[str, str]) -> Any:
    """Sizes with other values, given as text.

    Raises:
        ConfigError: a name that these sizes do not have, or a value of another type.
    """
    values = {}
    for name, text in settings.items():
        before = getattr(sizes, name, None)
        if before is None or isinstance(before, harness.Sizes | tuple):
            known = ", ".join(key for key, value in vars(sizes).items() if not isinstance(value, harness.Sizes | tuple))
            raise ConfigError(f"--set {name}: these sizes have no {name}", f"there are {known}")
        try:
            values[name] = text == "true" if isinstance(before, bool) else type(before)(text)
        except ValueError as error:
            raise ConfigError(f"--set {name}: {text!r} is no {type(before).__name__}") from error
    return replace(sizes, **values)


def measure(case: Case, say: harness.Say) -> harness.Comparison:
    """Measure one case, with its threads and seed."""
    with harness.settled(case.sizes):
        return case.measure(case.sizes, say)


def keep(folder: Path, name: str, found: harness.Comparison) -> Path:
    """Write a case's JSON file and the folder's table anew."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_atomic(path, (json.dumps(found.as_json(), indent=1, allow_nan=False) + "\n").encode())
    write_atomic(folder / "README.md", table.page(folder).encode())
    return path


def run(
    names: tuple[str, ...],
    *,
    out: Path | None,
    toy: bool,
    settings: Mapping[str, str],
    only: tuple[str, ...],
    say: harness.Say,
    show: harness.Say,
) -> None:
    """Measure the cases of these names, or `all`, show each and keep each as soon as it is there.

    Raises:
        UserError: an unknown name; a case asked for by name that cannot be measured here; and, after all have run, any case
            whose variants computed different things or failed.
    """
    known = cases(toy=toy)
    every = names == ("all",)
    if unknown := [name for name in names if name not in known and not every]:
        raise UserError(f"no comparison {', '.join(unknown)}", f"there are {', '.join(known)}, and all")
    wrong = []
    for name in known if every else names:
        sizes = changed(known[name].sizes, settings)
        case = Case(known[name].measure, replace(sizes, only=only) if only else sizes)
        try:
            found = measure(case, say)
        except UserError as error:
            if not every:
                raise
            say(f"{name}: left out: {error.message}")
            continue
        show("\n".join(found.lines()))
        wrong += [f"{name}: {words}" for words in found.wrong]
        if out is not None:
            say(f"{name}: {keep(out, name, found)}")
    if wrong:
        raise UserError(f"variants failed or computed something else: {'; '.join(wrong)}", "their ratios mean nothing")
