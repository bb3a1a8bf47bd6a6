"""Writes a `params.yaml` without anchors and as DVC would write it, so that `dvc exp run -S key=value` changes one line."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import FoldedScalarString

_WIDTH = 78  # of a line; DVC wraps longer ones when it writes the file again


def dump(tree: Any) -> str:
    """The text of a parameter tree, which may come from `YAML(typ="rt")` with its comments or from `styled`."""
    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.representer.ignore_aliases = lambda _: True
    yaml.dump(tree, text)
    return text.getvalue()


def styled(value: Any, indent: int = 0, before: int = 0) -> Any:
    """A copy of plain values in which a mapping is written on one line if it fits, otherwise as a block.

    Args:
        value: mappings, lists and scalars.
        indent: number of columns by which a block's lines are indented.
        before: number of columns that the value's key takes on its line, with the indent.
    """
    if isinstance(value, str):
        return _folded(value, indent) if before + len(value) > _WIDTH else value
    if not isinstance(value, dict | list):
        return value
    if isinstance(value, list):  # an item a line: so DVC writes every list that is no part of a line
        return CommentedSeq(styled(item, indent + 2, indent + 2) for item in value)
    if not value or (before and before + len(_flow(value)) <= _WIDTH):
        return _flowing(value)
    return CommentedMap((key, styled(item, indent + 2, indent + len(str(key)) + 2)) for key, item in value.items())


def _flow(value: Any) -> str:
    yaml, text = YAML(), io.StringIO()
    yaml.width = 1_000_000
    yaml.dump(_flowing(value), text)
    return text.getvalue().rstrip("\n")


def _flowing(value: Any) -> Any:
    if isinstance(value, dict):
        found: Any = CommentedMap((key, _flowing(item)) for key, item in value.items())
    elif isinstance(value, list):
        found = CommentedSeq(_flowing(item) for item in value)
    else:
        return value
    found.fa.set_flow_style()
    return found


def _folded(text: str, indent: int) -> Any:
    """The text as a `>-` block whose line breaks DVC keeps."""
    lines = textwrap.wrap(text, _WIDTH - indent, break_long_words=False, break_on_hyphens=False)
    if " ".join(lines) != text:  # spaces or line breaks that folding would lose
        return text
    folded: Any = FoldedScalarString(text)
    folded.fold_pos = [len(" ".join(lines[: i + 1])) for i in range(len(lines) - 1)]
    return folded
