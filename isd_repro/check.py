"""Command `check`: finds mistakes in a `params.yaml` that would stop or mislead a later stage, without training anything.

Everything that a stage computes only from the parameters is also computed here: the module of every run is built on the meta
device, and the report is assembled without records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from ruamel.yaml import YAML

from isd_repro import evaluations, methods
from isd_repro.config import reader
from isd_repro.config.fields import Frozen
from isd_repro.config.layout import Layout
from isd_repro.config.params import Balanced, Params, Run
from isd_repro.config.reader import Location, Problem, keyed
from isd_repro.data import sources, subsets
from isd_repro.interfaces import Setting
from isd_repro.nn import backbones, engine
from isd_repro.nn.batchnorm import set_bn_groups
from isd_repro.records import SHOTS
from isd_repro.report import page
from isd_repro.report.run_records import Records, RunRecords
from isd_repro.runtime.errors import ConfigError

HINT = "fix the keys named above; docs/params.md and the files in isd_repro/methods/ explain each"


def check(file: Path, *, images: bool = False, say: Callable[[str], object]) -> None:
    """Check a profile and print `<file>: ok`.

    Args:
        file: a `params.yaml`, or a profile's folder.
        images: also draw every subset from its images, which takes as long as listing them.
        say: called with lines for the user.

    Raises:
        ConfigError: there are mistakes; the message names each of them with its line.
        DataError: with `images`, images are missing or do not satisfy a rule.
    """
    params, layout = reader.load(file)
    written = file / layout.name if file.is_dir() else file
    tree = YAML(typ="rt").load(layout.file.read_text("utf-8"))
    found = [*_profile(params, layout), *_runs(params, tree), *_subsets(params), *_evaluations(params), *_report(params, layout)]
    if images and not found:
        found = list(_draw(params, say))
    if found:
        raise ConfigError(reader.listed(written, tree, found), HINT)
    say(f"{file}: ok")


def _profile(params: Params, layout: Layout) -> Iterator[Problem]:
    """A copied folder must not write into the reports of the profile from which it was copied."""
    folder = layout.folder
    if folder.parent.name == "pipelines" and params.profile != folder.name:
        message = f"{params.profile!r}, but the folder is {folder.name!r}, so results would go to another profile's reports"
        yield ("profile",), f"{message}; write profile: {folder.name}"


# --- runs -------------------------------------------------------------------------------------------------------------


def _runs(params: Params, tree: Any) -> Iterator[Problem]:
    """Keys and sizes of every run's method; its module is built on the meta device, where weights take no memory."""
    made = dict[str, str]()  # what the fingerprint covers except the images -> the first run that has it
    for name, run in params.runs.items():
        where: Location = ("runs", name)
        try:
            config = methods.load(run.method.name).Config.model_validate(run.method.options)
            parts = run.model_dump(mode="json", include={"backbone", "optim", "data", "numerics"})
            parts["method"] = {"name": run.method.name, **config.model_dump(mode="json")}
            first = made.setdefault(json.dumps(parts, sort_keys=True), name)
            if first == name:
                _build(run, config)
            else:
                yield where, f"differs in no parameter from {first!r}; change one, such as numerics.seed, or remove the run"
        except ConfigError as error:
            yield keyed(where, f"{error.message} ({error.hint})" if error.hint else error.message)
        except ValidationError as error:
            yield from reader.problems(error.errors(), tree, (*where, "method"))
        rule = params.subsets[run.data.subset].rule
        if isinstance(rule, Balanced) and rule.classes and rule.classes * rule.per_class < run.optim.batch_size:
            found = f"{run.optim.batch_size}, but subset {run.data.subset!r} has only {rule.classes * rule.per_class} images"
            yield (*where, "optim", "batch_size"), found


def _build(run: Run, config: Frozen) -> None:
    with torch.device("meta"):
        size, images = run.optim.batch_size, 2**20  # unknown; enough for any method
        steps = run.optim.epochs * (images // size)
        make = lambda *_: backbones.build(run.backbone, run.data.image_size)  # noqa: E731 - also in place of a file's encoder
        arithmetic = engine.setting_of(run.numerics)
        setting = Setting(classes=2, images=images, batch_size=size, steps=steps, frozen=make, **arithmetic)
        method = methods.load(run.method.name).Method(config, make, setting)
        set_bn_groups(method, run.numerics.bn_groups)


def _subsets(params: Params) -> Iterator[Problem]:
    """Subsets that are copies of each other."""
    drawn = dict[str, str]()
    for name, subset in params.subsets.items():
        first = drawn.setdefault(subset.model_dump_json(), name)
        if first != name:
            yield ("subsets", name), f"draws the same images as {first!r}; change rule.seed, or remove the subset"


# --- evaluations and report -------------------------------------------------------------------------------------------


def _evaluations(params: Params) -> Iterator[Problem]:
    """Protocols that have the paper's name but not its values."""
    for kind in evaluations.names():
        own = getattr(evaluations.load(kind), "check_protocol", None)
        try:
            if own and getattr(params, f"{kind}_runs", ()):
                own(getattr(params.evaluation, kind))
        except ConfigError as error:
            yield keyed((), f"{error.message} ({error.hint})")


def _report(params: Params, layout: Layout) -> Iterator[Problem]:
    """Mistakes that the report would refuse, and scores or query groups that no run will have."""
    report, groups = params.report, {"all"}
    for subset in params.subsets.values():
        groups |= {"rare", "large"} if subset.rule.name in ("unbalanced", "halves", "list") else set()
        groups |= set(SHOTS) if subset.shots else set()
    scored = {metric for kind in evaluations.names() for metric in evaluations.columns(params.evaluation, kind)}
    for key in ("hypothesis", "trials"):
        asked = getattr(report, key)
        if asked and f"{asked.k}-NN" not in scored:
            yield ("report", key, "k"), f"{asked.k}-NN is not computed by any evaluation of this profile"
        if asked and asked.group not in groups:
            yield ("report", key, "group"), f"{asked.group!r}, but the subsets have only {', '.join(sorted(groups))}"
    if power := report.trials and report.trials.power:
        known = sorted({run.method.name for run in params.runs.values()})
        for key in ("first", "second"):
            if (named := getattr(power, key)) not in known:
                found = f"{named!r} is not a method of these runs: {', '.join(known)}"
                yield ("report", "trials", "power", key), found
    try:
        page.assemble(params, Records({name: RunRecords(name) for name in params.runs}, ()), layout)
    except ConfigError as error:
        yield keyed((), f"{error.message} ({error.hint})")


# --- images -----------------------------------------------------------------------------------------------------------


def _draw(params: Params, say: Callable[[str], object]) -> Iterator[Problem]:
    """Draw every subset, and compare its size with the batch sizes and numbers of neighbours of the runs."""
    metrics = [metric for kind in evaluations.names() for metric in evaluations.columns(params.evaluation, kind)]
    numbers = [metric.removesuffix("-NN") for metric in metrics if re.fullmatch(r"\d+-NN", metric)]
    neighbours = {int(number): evaluations.kind_of(f"{number}-NN") for number in numbers}
    for name, subset in params.subsets.items():
        with sources.open_source(subset.source) as listing:
            drawn = subsets.select(listing.images, subset, name)
        train, search = len(drawn.train), len(drawn.search)
        say(f"{name}: {len(drawn.classes)} classes, {train} training images, {search} to search, {len(drawn.query)} queries")
        for key, run in params.runs.items():
            if run.data.subset == name and run.optim.batch_size > train:
                found = f"{run.optim.batch_size}, but {name!r} has {train} training images"
                yield ("runs", key, "optim", "batch_size"), found
        for k, kind in neighbours.items():
            if k > search:
                yield ("evaluation", kind, "k"), f"{k}, but the search set of {name!r} has {search} images"
