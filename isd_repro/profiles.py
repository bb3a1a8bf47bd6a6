"""Commands that edit a profile: `variant`, `run remove`, `run rename` and `new`.

A `params.yaml` is read and written with its comments, and checked as `check` does before it replaces the old one. Lists that name
runs are updated, too.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isd_repro.check import check
from isd_repro.config import reader, writer
from isd_repro.config.layout import Layout, state_root
from isd_repro.report import text
from isd_repro.runtime import dvc_lock, files
from isd_repro.runtime.errors import ConfigError, DataError

Say = Callable[[str], object]
Settings = dict[str, Any]  # of a run, by dotted key below the run
SEED = "numerics.seed"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}")


# --- variant ----------------------------------------------------------------------------------------------------------


def variant(
    name: str,
    source: str,
    file: Path,
    say: Say,
    *,
    changes: Sequence[str] = (),
    seeds: int = 1,
    grid: Sequence[str] = (),
    sobol: int = 0,
    ranges: Sequence[str] = (),
    trials: bool = False,
) -> None:
    """Write new runs into a profile, each complete: a copy of `source` with some values changed.

    Args:
        name: of the run; if there are several, the number of the setting and the seed are appended.
        source: the run to copy.
        file: the profile's parameters.
        say: called with lines for the user.
        changes: `key=value`, the same in every new run; keys below the run, values in YAML.
        seeds: number of runs of each setting, which differ only in `numerics.seed`. Seeds count up from the one in `changes`,
            otherwise from the source's own or, if nothing else is changed, from the first one after the source's repetitions.
        grid: `key=v1,v2,...`; every combination is a run.
        sobol: number of points of a Sobol sequence over `ranges`.
        ranges: `key=low..high`; on a logarithmic scale if both ends are positive and differ by a factor of 10 or more.
        trials: whether the runs are trials, of which the report takes the best of each method; their labels are numbered.

    Raises:
        ConfigError: an option cannot be read, a name is taken, or the new parameters do not pass `check`; nothing is written.
    """
    params, layout = reader.load(file)
    run = reader.find_run(params, source)
    tree = _tree(layout)
    shared = dict(_pair(change) for change in changes)
    points = _points(grid, sobol, ranges)
    same = operator.attrgetter("backbone", "method", "optim", "data")  # what repetitions of a run have in common
    alike = [one.numerics.seed for one in params.runs.values() if same(one) == same(run)]
    first = shared.get(SEED, run.numerics.seed if shared or points != [{}] else max(alike) + 1)
    if seeds > 1 and (not isinstance(first, int) or any(SEED in point for point in points)):
        hint = f"give the first as -S {SEED}=10, or a grid of seeds without --seeds"
        raise ConfigError("--seeds counts up from one seed", hint)
    added = []
    for at, point in enumerate(points, start=1):
        for seed in range(first, first + seeds) if seeds > 1 else [first]:
            settings = {**shared, **point}
            if seeds > 1 or not settings:
                settings[SEED] = seed
            parts = [name, *([str(at)] if len(points) > 1 else []), *([f"s{seed}"] if seeds > 1 else [])]
            added.append("-".join(parts))
            if trials:
                settings.setdefault("label", _trial_label(tree["runs"], source))
            _add(tree, added[-1], source, settings)
    for listed in _lists(tree):
        if source in listed:
            listed.extend(new for new in added if new not in listed)  # two keys may share one list by an anchor
    if trials and not tree["report"].get("trials"):
        tree["report"]["trials"] = {"k": params.evaluation.knn.k[0]}
    _write(layout, tree)
    for new in added:
        say(f"{new}: {tree['runs'][new]['label']}")
    after = reader.load(layout.file)[0]
    counts = Counter(one.method.name for one in after.runs.values() if one.optim.epochs)
    if trials and len(set(counts.values())) > 1:
        said = ", ".join(f"{method} {count}" for method, count in counts.items())
        say(f"trained runs by method: {said}; a fair comparison gives each method the same number of trials")
    runs = f"{text.count(len(added))} new {'run' if len(added) == 1 else 'runs'}"
    say(f"{runs} in {_shown(layout)}; `{_repro(layout)}` trains them")


def _add(tree: Any, name: str, source: str, settings: Settings) -> None:
    _check_new("run", name, tree["runs"])
    run = writer.styled(tree["runs"][source])
    for key, value in settings.items():
        _set(run, key, value)
    if "label" not in settings:
        run["label"] = _label(str(run["label"]), settings)
    tree["runs"][name] = writer.styled(run, 4)


def _set(tree: Any, key: str, value: Any) -> None:
    """Set the value of a dotted key; missing groups are created."""
    *above, last = key.split(".")
    for part in above:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {part!r} is not a group of keys", "docs/params.md lists the keys")
    tree[last] = writer.styled(value, 2 * len(above), len(last) + 2 * len(above) + 2)


def _label(label: str, settings: Settings) -> str:
    """The source's label with the changes; the seed comes last, so that runs that differ only in their seed are one method."""
    own = re.search(r",? seed (\d+)$", label)
    method, seed = label[: own.start()] if own else label, settings.get(SEED, own and own[1])
    said = [f"{key.rsplit('.', 1)[-1]} {value}" for key, value in settings.items() if key != SEED]
    return method + (f" ({', '.join(said)})" if said else "") + (f", seed {seed}" if seed is not None else "")


def _trial_label(runs: Any, source: str) -> str:
    """The source's label with the next trial number; labels that differ only in this number are trials of one method."""
    method = re.sub(r",? (seed|trial) \d+$", "", str(runs[source]["label"]))
    found = [re.fullmatch(rf"{re.escape(method)},? trial (\d+)", str(run["label"])) for run in runs.values()]
    return f"{method}, trial {max((int(match[1]) for match in found if match), default=0) + 1}"


def _check_new(what: str, name: str, taken: Collection[str]) -> None:
    if name in taken:
        raise ConfigError(f"{what} {name!r} exists already", "choose another name")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a valid name of a {what}", "use small letters, digits and hyphens")


def _lists(tree: Any) -> list[Any]:
    """The profile's lists of runs."""
    return [*(tree[key] for key in tree if key.endswith("_runs")), tree["report"].get("exploratory", [])]


def _points(grid: Sequence[str], sobol: int, ranges: Sequence[str]) -> list[Settings]:
    """The settings of a grid or a Sobol sequence; one empty setting without either."""
    if grid and (sobol or ranges):
        raise ConfigError("--grid and --sobol exclude each other", "give one of them")
    if bool(sobol) != bool(ranges):
        raise ConfigError("--sobol and --range go together", "for example: --sobol 8 --range optim.lr=0.01..0.1")
    if sobol:
        return _sobol(sobol, dict(map(_range, ranges)))
    axes = [(key, _value(f"[{values}]", f"{key}={values}")) for key, values in map(_split, grid)]
    return [dict(zip([key for key, _ in axes], values, strict=True)) for values in itertools.product(*(of for _, of in axes))]


def _sobol(points: int, ranges: dict[str, tuple[float, float]]) -> list[Settings]:
    """The first points of a scrambled Sobol sequence (Owen 1998), seed 0, to four digits."""
    from scipy.stats import qmc

    power = max(1, points - 1).bit_length()  # the sequence is balanced over powers of two
    unit = qmc.Sobol(len(ranges), seed=0).random_base2(power)[:points]
    found = []
    for row in unit:
        point: Settings = {}
        for share, (key, (low, high)) in zip(row, ranges.items(), strict=True):
            value = low * (high / low) ** share if low > 0 and high / low >= 10 else low + (high - low) * share
            whole = isinstance(low, int) and isinstance(high, int)
            point[key] = round(float(value)) if whole else float(f"{value:.4g}")
        found.append(point)
    return found


def _range(given: str) -> tuple[str, tuple[float, float]]:
    key, values = _split(given)
    low, separator, high = values.partition("..")
    ends = _value(low, given), _value(high, given)
    if not separator or not all(isinstance(end, int | float) for end in ends) or not ends[0] < ends[1]:
        found = f"--range {given}: expected key=low..high with numbers, low below high"
        raise ConfigError(found, "for example optim.lr=0.01..0.1")
    return key, ends


def _pair(given: str) -> tuple[str, Any]:
    key, value = _split(given)
    return key, _value(value, given)


def _split(given: str) -> tuple[str, str]:
    key, separator, value = given.partition("=")
    if not separator or not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", key) or not value:
        raise ConfigError(f"{given!r}: expected key=value", "keys are dotted, such as optim.lr or method.tau_student of a run")
    return key, value


def _value(given: str, whole: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(given)
    except YAMLError as error:
        raise ConfigError(f"{whole}: its value is not YAML", "quote it for the shell, such as 'label=\"ISD, new\"'") from error


# --- remove and rename ------------------------------------------------------------------------------------------------


def remove(names: Sequence[str], file: Path, say: Say, *, force: bool) -> None:
    """Remove runs from a profile: parameters, lock entries, and with `force` also records, encoders, logs and resume state.

    Raises:
        ConfigError: there is no such run, or the remaining parameters do not pass `check`.
        DataError: a run has results and `force` is not given; nothing is changed.
    """
    params, layout = reader.load(file)
    tree, names = _tree(layout), list(dict.fromkeys(names))
    for name in names:
        reader.find_run(params, name)
        if not force and (found := list(_results(name, layout))):
            raise DataError(f"run {name!r} has results: {', '.join(map(str, found))}", "add --force to delete them")
        del tree["runs"][name]
        _replace(tree, name, None)
    dvc_lock.remove(names, layout.folder)  # first, since a torn lock is refused
    _write(layout, tree)
    for name in names:
        for path in _results(name, layout):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    say(f"removed {', '.join(names)} from {_shown(layout)}; `{_repro(layout)}` renders the page")


def rename(old: str, new: str, file: Path, say: Say) -> None:
    """Rename a run that has no results.

    A run with results cannot be renamed: its encoder file contains the name, and records, lock and published copies contain the
    file's hash.

    Raises:
        ConfigError: there is no run `old`, there already is a run `new`, or `new` is not a valid name.
        DataError: the run has results.
    """
    params, layout = reader.load(file)
    reader.find_run(params, old)
    if found := list(_results(old, layout)):
        message = f"run {old!r} has results, whose hashes cover its name: {', '.join(map(str, found))}"
        hint = "change its label, which tables and pages show, or remove the run and train it under the new name"
        raise DataError(message, hint)
    _check_new("run", new, params.runs)
    tree = _tree(layout)
    at = list(tree["runs"]).index(old)
    tree["runs"].insert(at, new, tree["runs"].pop(old))
    _replace(tree, old, new)
    dvc_lock.remove([old], layout.folder)
    _write(layout, tree)
    say(f"{old} is now {new} in {_shown(layout)}")


def _replace(tree: Any, old: str, new: str | None) -> None:
    """Replace or remove a run's name wherever the profile names it outside `runs`."""
    report = tree["report"]
    for listed in _lists(tree):
        while old in listed:
            at = listed.index(old)
            listed.pop(at)
            if new:
                listed.insert(at, new)
    for key in ("reference", "pixels"):
        if report.get(key) == old:
            if new:
                report[key] = new
            else:
                del report[key]
    for table in report.get("paper", ()):
        row = table["rows"].pop(old, None)
        if row and new:
            table["rows"][new] = row


def _results(run: str, layout: Layout) -> Iterator[Path]:
    """All files that stages have written for a run."""
    places = [layout.records / run, layout.encoder(run).parent, layout.cards / f"{run}.md"]
    places += sorted((layout.folder / "runs" / ".log").glob(f"*/{run}"))
    yield from (place for place in places if place.exists())
    for path in sorted(state_root(layout.root).glob("*/run.json")):
        try:
            owner = json.loads(path.read_text("utf-8"))
        except ValueError:
            continue
        if (owner.get("profile"), owner.get("run")) == (layout.profile, run):
            yield path.parent


# --- a new profile ----------------------------------------------------------------------------------------------------


def new(name: str, source: Path, images: str, dataset: str, changes: Sequence[str], say: Say) -> None:
    """Make a profile from another one: its parameters without results, and the pipeline.

    Args:
        name: of the profile and its folder under `pipelines/`.
        source: the other profile's `params.yaml`, or its folder.
        images: environment variable that names a folder with `train/<class>/` and `val/<class>/`; empty keeps the source's.
        dataset: public name of these images.
        changes: `key=value`; keys from the top of the file, values in YAML.
        say: called with lines for the user.

    Raises:
        ConfigError: an option cannot be read, the name is taken or not valid, or the new parameters do not pass `check`.
    """
    if bool(images) != bool(dataset):
        raise ConfigError("--images and --dataset go together", "for example: --images ISD_MY_ROOT --dataset 'My images'")
    _, layout = reader.load(source)
    folder = layout.root / "pipelines" / name
    taken = [path.name for kind in ("pipelines", "reports") for path in (layout.root / kind).glob("*")]
    _check_new("profile", name, taken)
    tree = _tree(layout)
    tree.ca.comment = None
    tree.yaml_set_start_comment(f"Made from profile {layout.profile} by `isd-repro new`. docs/params.md explains every key.")
    tree["profile"], tree["root"] = name, "../.."
    tree["report"].pop("paper", None)  # only runs on the paper's own images are compared with its numbers
    (tree["report"].get("hypothesis") or {}).pop("registered", None)  # the new profile's rule is in no commit yet
    if images:
        tree["report"]["title"], tree["report"]["caption"] = dataset, f"Runs on {dataset}."
        tree["report"].pop("notes", None)
        tree["transfer_runs"] = []  # it needs other data sets, too
        for subset in tree["subsets"].values():
            subset["source"] = writer.styled({"name": "image-folder", "root_env": images, "dataset": dataset}, 6)
    for key, value in map(_pair, changes):
        _set(tree, key, value)
    folder.mkdir(parents=True)
    try:
        shutil.copy(layout.root / "dvc.yaml", folder)
        made = Layout(folder, layout.root, name)
        _write(made, tree)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"{_shown(made)}: edit it, then run `isd-repro check --images {os.path.relpath(folder)}`")


# --- files ------------------------------------------------------------------------------------------------------------


def _tree(layout: Layout) -> Any:
    return YAML(typ="rt").load(layout.file.read_text("utf-8"))


def _write(layout: Layout, tree: Any) -> None:
    """Replace the parameters if they pass `check`."""
    tried = layout.folder / f".new-{layout.name}"
    try:
        files.write_atomic(tried, writer.dump(tree).encode())
        check(tried, say=lambda _: None)
        tried.replace(layout.file)
    except ConfigError as error:
        message = error.message.replace(str(tried), f"{layout.file} as it would be")
        raise ConfigError(message, f"nothing was written; {error.hint}") from error
    finally:
        tried.unlink(missing_ok=True)


def _shown(layout: Layout) -> str:
    """The path of the parameter file relative to the current folder."""
    return os.path.relpath(layout.file)


def _repro(layout: Layout) -> str:
    """The command that brings a profile up to date."""
    pipeline = os.path.relpath(layout.folder / "dvc.yaml")
    return "dvc repro" if pipeline == "dvc.yaml" else f"dvc repro {pipeline}"
