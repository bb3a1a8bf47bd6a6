"""Numbers as text, and text made safe for LaTeX and Markdown."""

from __future__ import annotations

import json
import re
from typing import Any

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"  # a cell that cannot exist, such as the teacher of a method without one
NOT_RUN = "not run"

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "*": r"\textasteriskcentered{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
    '"': r"\textquotedbl{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    MINUS: r"$-$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{HYPHEN}": "-",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{GREEK SMALL LETTER TAU}": r"$\tau$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
    "\N{DAGGER}": r"\dag{}",
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~^$])")
_MARKDOWN_START = re.compile(r"^(\d+(?=[.)](?:\s|$)))|^(?=[-+](?:\s|$)|--|=)")  # a list, a rule or a heading's underline


def latex(text: str) -> str:
    """Text as LaTeX prints it, on one line."""
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))


def markdown(text: str) -> str:
    """Text as Markdown prints it, in a table cell or a paragraph, on one line."""
    line = markdown_part(" ".join(text.split()))
    return _MARKDOWN_START.sub(lambda found: f"{found[1] or ''}\\", line)


def markdown_part(text: str) -> str:
    """A piece of a line as Markdown prints it, its spaces kept."""
    return _MARKDOWN.sub(r"\\\1", text.replace("\n", " ").replace("&", "&amp;"))


def one_decimal(value: float) -> str:
    """84.1; a negative value has a true minus sign, and no value is printed as minus zero."""
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", MINUS)


def signed(value: float) -> str:
    """+0.7 or, with a true minus sign, -0.7; a difference that rounds to zero has no sign."""
    text = one_decimal(value)
    return text if text.startswith(MINUS) or text == "0.0" else f"+{text}"


def p_value(p: float) -> str:
    """p = 0.034, p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def count(value: int) -> str:
    """1,040."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """8.4 s, 3 min 20 s, 5 h 07 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def listing(names: list[str]) -> str:
    """A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as sorted (dotted key, JSON value) pairs; strings lose their quotes."""
    if isinstance(tree, dict) and tree:
        return [pair for key in sorted(tree) for pair in flatten(tree[key], f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree, sort_keys=True))]
