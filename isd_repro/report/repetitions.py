"""Repetitions (seeds of a run, draws of one kind of subset), and which method is under test."""

from __future__ import annotations

import re
from collections.abc import Sequence

from isd_repro.config.params import Exponential, Params, Subset

_DRAW = {"seed", "list", "large_classes", "halving", "part"}  # keys of a rule that tell draws of one kind apart


def runs_of(params: Params, subset: str) -> list[str]:
    """Runs that train on a subset, in the order of the parameters."""
    return [name for name, run in params.runs.items() if run.data.subset == subset]


def planned(params: Params, subset: str) -> list[str]:
    """Runs of a subset that count for its methods: all except exploratory runs."""
    return [run for run in runs_of(params, subset) if run not in params.report.exploratory]


def method_name(params: Params, run: str) -> str:
    """A run's label without subset and seed: `ISD on D1`, `ISD (D1)`, `ISD, D1, seed 2` and `ISD` all give `ISD`."""
    subset = re.escape(params.runs[run].data.subset)
    label = params.runs[run].label
    for words in (r"seed\s+\d+", rf"(?:on\s+)?(?<![\w.]){subset}"):
        label = re.sub(rf"[\s,;:/-]*[(\[]?\s*\b{words}(?![\w.])\s*[)\]]?", "", label, flags=re.IGNORECASE).strip()
    return label or params.runs[run].label


def counterpart(params: Params, run: str | None, subset: str) -> str | None:
    """The run on a subset with the same method name as `run`, or `run` itself if there is none."""
    if run is None or params.runs[run].data.subset == subset:
        return run
    return next((other for other in planned(params, subset) if method_name(params, other) == method_name(params, run)), None)


def repetitions(params: Params, runs: Sequence[str]) -> list[list[str]]:
    """Lists of runs of one subset that differ only in their seed; a run without repetitions is a list of one."""
    kinds: dict[str, list[str]] = {}
    for name in runs:
        config = params.runs[name].model_dump(mode="json", include={"backbone", "method", "optim", "data", "numerics"})
        config["numerics"].pop("seed")
        kinds.setdefault(repr((method_name(params, name), config)), []).append(name)
    found = []
    for alike in kinds.values():
        seeds = {params.runs[name].numerics.seed for name in alike}
        found += [alike] if len(seeds) == len(alike) else [[name] for name in alike]
    return found


def _kind(config: Subset, free: set[str]) -> str:
    """The settings that subsets of one kind share; the `free` keys of their rules may differ."""
    rule = config.rule.model_dump(mode="json", exclude=free)
    return repr((config.source.dataset, sorted(rule.items()), config.search_per_class, config.query_per_class))


def families(params: Params) -> list[list[str]]:
    """Subsets with runs, grouped by draws of one kind; a list of one is a subset with separate tables.

    Draws are grouped only if each method has one run per subset, or several that differ only in their seed, and has runs on at
    least two of the subsets.
    """
    kinds: dict[str, list[str]] = {}
    for subset, config in params.subsets.items():
        if planned(params, subset):
            kinds.setdefault(_kind(config, _DRAW), []).append(subset)
    found = []
    for subsets in kinds.values():
        alike = [repetitions(params, planned(params, subset)) for subset in subsets]
        names = [[method_name(params, seeds[0]) for seeds in of_one] for of_one in alike]
        distinct = all(len(set(of_one)) == len(of_one) for of_one in names)
        repeated = all(sum(name in of_one for of_one in names) > 1 for of_all in names for name in of_all)
        found += [subsets] if len(subsets) > 1 and distinct and repeated else [[subset] for subset in subsets]
    return found


def imbalances(params: Params) -> list[dict[str, float]]:
    """Imbalance by subset, for subsets with runs that differ only in their imbalance and their draw."""
    kinds: dict[str, dict[str, float]] = {}
    for subset, config in params.subsets.items():
        if isinstance(config.rule, Exponential) and planned(params, subset):
            kinds.setdefault(_kind(config, _DRAW | {"imbalance"}), {})[subset] = config.rule.imbalance
    return [found for found in kinds.values() if len(set(found.values())) > 1]


def methods(params: Params, subsets: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Each method's runs by subset, one per seed; methods are in the order of their first run in the parameters.

    Runs of one subset that share a method name and differ in more than their seed are distinguished by their run names.
    """
    found: dict[str, dict[str, list[str]]] = {}
    order = list(params.runs)
    groups = [seeds for subset in subsets for seeds in repetitions(params, planned(params, subset))]
    for seeds in sorted(groups, key=lambda seeds: order.index(seeds[0])):
        subset, name = params.runs[seeds[0]].data.subset, method_name(params, seeds[0])
        taken = subset in found.get(name, {})
        found.setdefault(seeds[0] if taken else name, {})[subset] = seeds
    return found


def under_test(params: Params, subsets: Sequence[str]) -> tuple[str | None, list[str]]:
    """The method under test (the first with method `isd`, else the first) and the methods to compare with, without references.

    If the report states a hypothesis, methods that learn from labels are also references.
    """
    references = {method_name(params, run) for run in (params.report.reference, params.report.pixels) if run}
    if params.report.hypothesis:
        references |= {method_name(params, name) for name, run in params.runs.items() if run.method.name == "supervised"}
    trained = {name: runs for name, runs in methods(params, subsets).items() if name not in references}
    of_isd = [name for name, runs in trained.items() if params.runs[next(iter(runs.values()))[0]].method.name == "isd"]
    subject = next(iter(of_isd or trained), None)
    return subject, [name for name in trained if name != subject]


def rivals(params: Params, subsets: Sequence[str]) -> tuple[str, str] | None:
    """The method under test and the main method to compare with: MoCo, else the first other."""
    subject, others = under_test(params, subsets)
    second = next((name for name in others if "MoCo" in name), others[0] if others else None)
    return (subject, second) if subject and second else None
