"""A default that changes a result cannot change unseen.

DVC tracks the values written in a `params.yaml`; a key that a profile leaves out has the model's default, which DVC does not
see. With another default a finished run and its parameters would part without a word. Where a change is meant: write the old
value into the profiles that have results, tell it in the changelog under [numerics], and run
`pytest tests/golden --update-golden`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from isd_repro import evaluations, methods
from isd_repro.config import params

FILE = Path(__file__).with_name("defaults.json")
# Groups that change no number: speed, tracking; and what a report says.
FREE = {"Efficiency", "Tracking", "Params", "MethodBlock", "ReportConfig", "Beside", "Hypothesis", "Power", "Trials"}


def plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else list(value) if isinstance(value, tuple) else value


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Every default of a model."""
    return {
        name: plain(field.get_default(call_default_factory=True, validated_data={}))
        for name, field in model.model_fields.items()
        if field.default is not PydanticUndefined or field.default_factory is not None
    }


def found() -> dict[str, dict[str, Any]]:
    models = {
        name: model
        for name, model in vars(params).items()
        if isinstance(model, type) and issubclass(model, BaseModel) and model.__module__ == params.__name__ and name not in FREE
    }
    models |= {f"methods.{name}.Config": methods.load(name).Config for name in methods.names()}
    models |= {f"evaluations.{name}.Config": evaluations.load(name).Config for name in evaluations.names()}
    return {name: values for name, model in models.items() if (values := defaults(model))}


def test_defaults_that_change_results_are_the_recorded_ones(request: pytest.FixtureRequest) -> None:
    now = json.loads(json.dumps(found()))
    if request.config.getoption("--update-golden"):
        FILE.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    recorded = json.loads(FILE.read_text("utf-8"))
    labels = {("Run", "label"), ("Run", "notes")}
    changed = [
        f"{name}.{key}: {recorded.get(name, {}).get(key)!r} -> {now.get(name, {}).get(key)!r}"
        for name in sorted(now.keys() | recorded.keys())
        for key in sorted(now.get(name, {}).keys() | recorded.get(name, {}).keys())
        if (name, key) not in labels and now.get(name, {}).get(key) != recorded.get(name, {}).get(key)
    ]
    assert not changed, changed
    assert now["evaluations.linear.Config"]["epochs"] == 40  # so that an empty file would not pass
