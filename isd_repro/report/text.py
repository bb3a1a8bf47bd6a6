"""Numbers as text, and text made safe for LaTeX and Markdown."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from isd_repro.runtime.errors import is_visible

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"  # a cell that cannot exist, such as the teacher of a method without one
NOT_RUN = "not run"

_LATEX = {
    "\\": r"\textbackslash{}",
    "[": "{[}",  # at the start of a row it would be an argument of the line break before it
    "{": r"\{",
    "}": r"\}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "*": r"\textasteriskcentered{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
    '"': "''",  # its LaTeX name is missing in the default encoding
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    MINUS: r"$-$",
    "\N{EN DASH}": "--",
    "\N{GREEK SMALL LETTER TAU}": r"$\tau$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
    "\N{DAGGER}": r"\dag{}",
    "\N{DOUBLE DAGGER}": r"\ddag{}",
}
_FORMULA = re.compile(r"((?:^|;)[\s\"']*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~^$])")
_MARKDOWN_START = re.compile(r"^(\d+(?=[.)](?:\s|$)))|^(?=[-+](?:\s|$)|--|=)")  # a list, a rule or a heading's underline


def latex(text: str) -> str:
    """Text escaped for LaTeX, on one line. Letters are kept, because LaTeX reads UTF-8 and reports what its fonts lack."""
    return "".join(_LATEX.get(sign, sign) for sign in unicodedata.normalize("NFC", visible(text)))


def markdown(text: str) -> str:
    """Text escaped for a Markdown table cell or paragraph, on one line."""
    line = markdown_part(visible(text))
    return _MARKDOWN_START.sub(lambda found: f"{found[1] or ''}\\", line)


def markdown_part(text: str) -> str:
    """A part of a line escaped for Markdown, with its spaces."""
    return _MARKDOWN.sub(r"\\\1", _unseen(text).replace("&", "&amp;"))


def visible(text: str) -> str:
    """Text on one line without invisible characters, which may control terminals, reverse text, or be invalid in XML."""
    return " ".join(_unseen(text).split())


def _unseen(text: str) -> str:
    return text if text.isprintable() else "".join(sign if is_visible(sign) else " " for sign in text)


def csv_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula, even with full-width signs or with semicolons as separators."""
    return _FORMULA.sub(r"\1'", visible(text))


def decimal(value: float, places: int = 1) -> str:
    """A number as text, such as 84.1; negative values have a true minus sign, and minus zero is never printed."""
    text = f"{value:.{places}f}"
    return (text if text.strip("-0.") else text.removeprefix("-")).replace("-", MINUS)


def signed(value: float, places: int = 1) -> str:
    """A difference as text: +0.7 or, with a true minus sign, -0.7; a difference that rounds to zero has no sign."""
    text = decimal(value, places)
    return text if text.startswith(MINUS) or not text.strip("0.") else f"+{text}"


def span(interval: tuple[float, float]) -> str:
    """Both ends of an interval of differences as text, such as +0.12 to +3.40."""
    return f"{signed(interval[0], 2)} to {signed(interval[1], 2)}"


def p_value(p: float) -> str:
    """A p-value as text, such as p = 0.034 or p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def count(value: int) -> str:
    """A count as text, such as 1,040."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """A duration in seconds as text, such as 8.4 s, 3 min 20 s or 5 h 07 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def listing(names: Sequence[str], most: int | None = None) -> str:
    """Names as text: `A, B and C`; if there are many more than `most`, `A, B, C and 7 more`."""
    if most is not None and len(names) > most + 1:
        names = [*names[:most], f"{len(names) - most} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as sorted (dotted key, JSON value) pairs; strings are without quotes."""
    if isinstance(tree, dict) and tree:
        return [pair for key in sorted(tree) for pair in flatten(tree[key], f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree, sort_keys=True))]


@cache
def _class_names() -> dict[str, str]:
    lines = (Path(__file__).parent / "class_names.tsv").read_text("utf-8").splitlines()[1:]
    pairs = (line.partition("\t") for line in lines)
    return {identity: word for identity, _, word in pairs}


def class_name(name: str) -> str:
    """A class with its WordNet name, if this is known: `n02124075 (Egyptian cat)`."""
    word = _class_names().get(name)
    return f"{name} ({word})" if word else name
