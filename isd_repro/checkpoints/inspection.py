"""Command `checkpoint inspect`: the layout and architecture of a checkpoint, and how each tensor is used."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from isd_repro import checkpoints
from isd_repro.checkpoints import Inspection
from isd_repro.runtime.errors import DataError, printable
from isd_repro.runtime.terminal import show_table

_STYLES = {"used": "green", "missing": "bold red", "surplus": "bold red", "other shape": "bold red"}


def show(path: Path, key: str | None = None, prefix: str | None = None, *, as_json: bool = False) -> None:
    """Print the account of a checkpoint on standard output; neither images nor a pipeline are needed.

    Raises:
        DataError: the file cannot be read; or, after the account is printed, no encoder in it can be evaluated.
    """
    found = checkpoints.inspect(path, key, prefix)
    if as_json:
        plain = {**asdict(found), "path": str(found.path), "counts": dict(Counter(row.use for row in found.tensors))}
        sys.stdout.write(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    else:
        _print(found, Console(file=sys.stdout, highlight=False))
    if found.problems:
        raise DataError("\n".join(found.problems), "docs/checkpoints.md lists the supported layouts and architectures")


def _print(found: Inspection, out: Console) -> None:
    rows = []
    for row in found.tensors:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        rows.append((row.key, shape, row.dtype, Text(row.use, style=_STYLES.get(row.use, "dim")), row.encoder))
    heads = ("tensor", "shape", "type", "use", "encoder")
    show_table(out, heads, rows, left=len(heads), fold=True)
    uses = Counter((row.use, row.encoder) for row in found.tensors)
    counts = ", ".join(f"{count} {use}" + (f" ({encoder})" if encoder else "") for (use, encoder), count in uses.items())
    lines = {
        "file": f"{found.path} ({found.form}, {found.size:,} bytes)",
        "sha256": found.sha256,
        "layout": found.layout or "not recognised",
        "architecture": found.arch or "not recognised",
        "encoders": ", ".join(found.encoders) or "none",
        "tensors": counts or "none",
        "notes": "; ".join(found.notes) or "none",
    }
    for name, value in lines.items():
        out.print(printable(f"{name + ':':<14}{value}"), markup=False, soft_wrap=True)
