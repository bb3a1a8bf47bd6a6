"""Whether the parameters still say what the records were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isd_repro import evaluations, methods
from isd_repro.config.fields import Frozen
from isd_repro.data.prepare import rule_of
from isd_repro.records import AnyEvaluation, PretrainRecord, TargetsRecord
from isd_repro.report import text
from isd_repro.report.problems import AGAIN
from isd_repro.report.run_records import Records
from isd_repro.verify.findings import Verification

_PARAMETER = "restore the value in params.yaml; or, if the change is intended, make a new record with `dvc repro`"


def check_parameters(state: Verification, records: Records) -> None:
    """The parameters still say what the records were made with."""
    params, layout, encoders = state.params, state.layout, dict[str, str]()
    for run, found in records.runs.items():
        now, subset = params.runs[run], params.subsets[params.runs[run].data.subset]
        if (made := found.pretrain) is not None:
            config = methods.config_of(run, now.method, layout.file)
            groups = {name: _both(getattr(now, name)) for name in ("backbone", "optim", "data", "numerics")}
            for group, (values, chosen) in {**groups, "method": _both(config)}.items():
                own = methods.identity(now.method.name) if group == "method" else {}
                stated = made.config.get(group, {}) | ({"subset": now.data.subset} if group == "data" else {})
                _changed(state, run, f"runs.{run}.{group}", own | values, own | chosen, stated)
            _changed(state, run, f"runs.{run}.label", now.label, now.label, made.label)
            _changed(state, run, f"subsets.{now.data.subset}.store", *_both(subset.store), made.config.get("store", {}))
            if (manifest := made.config.get("manifest")) != made.manifest.sha256:
                truth = f"{made.manifest.sha256}, its manifest.sha256"
                state.problem(layout.record(run, "pretrain"), "config.manifest", manifest, truth, AGAIN, run)
        for kind, record in found.records.items():
            if not isinstance(record, PretrainRecord):
                _settings(state, run, kind, record)
        if found.manifest is not None:
            rules = [_drawn(rule_of(subset), subset.source.dataset), _drawn(found.manifest.rule, found.manifest.dataset)]
            _changed(state, run, f"subsets.{now.data.subset}", rules[0], *rules)
        for kind, one in list(found.of_one_encoder.items())[:1]:  # an encoder's header holds its run's name
            if (other := encoders.setdefault(one.encoder_sha256, run)) != run:
                truth = f"a file of its own, but the records of {other} name the same"
                hint = "one of the two is a copy; restore it from git, or run its stages again"
                state.problem(layout.record(run, kind), "encoder_sha256", one.encoder_sha256, truth, hint, run)


def _settings(state: Verification, run: str, kind: str, record: AnyEvaluation) -> None:
    """The settings of an evaluation, and the protocol that they come to."""
    module, path = evaluations.load(kind), state.layout.record(run, kind)
    changed = evaluations.changes(kind, state.params.evaluation, record.settings)
    for key, (now, then) in changed.items():
        state.problem(state.layout.file, f"evaluation.{kind}.{key}", now, f"{then}, as the record says", _PARAMETER, run)
    expected = module.protocol(state.params.evaluation)
    if record.protocol != expected and not changed:
        state.problem(path, "protocol", repr(record.protocol), f"{expected!r}, from its settings", AGAIN, run)
    for one in record.evaluations if isinstance(record, TargetsRecord) else ():
        for key, found, truth in module.facts(one, getattr(state.params.evaluation, kind)):
            if found != truth:
                where = f"{one.manifest.subset}: {key}"
                state.problem(path, where, found, f"{truth}, as the list of data sets says", AGAIN, run)


def _drawn(rule: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """A manifest's rule in the form of the parameters; how it was stored is compared in full elsewhere."""
    counts = ("search_per_class", "query_per_class")
    own = {key: value for key, value in rule.items() if key not in ("source", "store", "sha256", *counts)}
    source = {"name": rule.get("source"), "dataset": dataset}
    return {"rule": own, "source": source, **{key: rule.get(key) for key in counts}}


def _both(group: Frozen) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group of parameters with every default, and without."""
    return group.model_dump(mode="json"), group.model_dump(mode="json", exclude_defaults=True)


def _changed(state: Verification, run: str, prefix: str, now: Any, chosen: Any, then: Any) -> None:
    """Keys whose values differ; a key that came later than the record counts where its value is no default."""
    ours, theirs, own = dict(text.flatten(now)), dict(text.flatten(then)), dict(text.flatten(chosen))
    for key in sorted(key for key in ours.keys() | theirs.keys() if key in theirs or key in own):
        if ours.get(key) != theirs.get(key):
            where, truth = f"{prefix}.{key}" if key else prefix, f"{theirs.get(key, 'nothing')}, as the record says"
            state.problem(state.layout.file, where, ours.get(key, "nothing"), truth, _PARAMETER, run)
