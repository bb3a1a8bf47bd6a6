"""Have a record's settings the form that its readers rely on? Whoever reads them afterwards need not ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from isd_repro.config.fields import Frozen, Many, Natural, Words
from isd_repro.config.params import Knn, Linear, Transfer


class _Labelled(Frozen):
    """What a few-label record says of the labelled images of one share."""

    images: Annotated[int, Field(ge=1, lt=2**53)]
    source: Words
    sha256: str
    list_sha256: str | None


class _FewLabel(Linear):
    fractions: Annotated[Many[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    draw_seed: Natural
    labelled: dict[Words, _Labelled]


_FORMS: Mapping[str, tuple[type[Frozen], frozenset[str]]] = {  # the stage's settings, and keys that no default stands for
    "knn": (Knn, frozenset({"k"})),
    "trajectory": (Knn, frozenset({"k"})),
    "linear": (Linear, frozenset()),
    "few_label": (_FewLabel, frozenset()),
    "transfer": (Transfer, frozenset({"sets"})),
}


def problem(kind: str, settings: Mapping[str, Any]) -> str:
    """What is wrong with the settings of a record, in words; nothing where they can be read."""
    form, needed = _FORMS[kind]
    missing = sorted(needed - settings.keys())
    if missing:
        return f"no {', '.join(missing)}"
    try:
        read = form.model_validate({key: value for key, value in settings.items() if key in form.model_fields})
    except ValidationError as error:
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    if isinstance(read, _FewLabel):
        shares = {f"{round(100 * fraction, 10):g}" for fraction in read.fractions}
        return (
            "" if shares == set(read.labelled) else f"labelled images of {sorted(read.labelled)} %, fractions {sorted(shares)} %"
        )
    return ""
