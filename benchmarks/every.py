"""`bench all`: every comparison at the sizes of docs/performance.md, one JSON file each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import growth, knn, linear, loader, loss, plot, step, table, turns, views
from isd_repro.runtime.errors import UserError
from isd_repro.runtime.files import write_atomic


def comparisons(repeats: int, say: turns.Say) -> dict[str, Callable[[], Any]]:
    """What there is, by the name of its file."""
    return {
        "loss-d128": lambda: loss.bench(loss.Sizes(dim=128, repeats=repeats), say=say).as_json(),
        "loss-d512": lambda: loss.bench(loss.Sizes(dim=512, repeats=repeats), say=say).as_json(),
        "loss-moco": lambda: loss.bench(
            loss.Sizes(bank=65_536, dim=128, tau_student=0.2, method="moco", repeats=repeats), say=say
        ).as_json(),
        "loss-growth": lambda: [each.as_json() for each in growth.of_loss(say=say)],
        "views-32": lambda: views.bench(views.Sizes(batch=256, side=32, repeats=repeats), say=say).as_json(),
        "views-64": lambda: views.bench(views.Sizes(batch=256, side=64, repeats=repeats), say=say).as_json(),
        "views-224": lambda: views.bench(views.Sizes(batch=64, side=224, repeats=repeats), say=say).as_json(),
        "step-32": lambda: step.bench(step.Sizes(repeats=repeats), say=say).as_json(),
        "step-64": lambda: step.bench(step.Sizes(batch=64, side=64, bank=16_384, steps=4, repeats=repeats), say=say).as_json(),
        "knn": lambda: knn.bench(knn.Sizes(repeats=repeats)).as_json(),
        "knn-growth": lambda: [each.as_json() for each in growth.of_search(say=say)],
        "epoch-growth": lambda: [each.as_json() for each in growth.of_epoch(say=say)],
        "linear": lambda: linear.bench(linear.Sizes(repeats=repeats), say=say).as_json(),
        "loader": lambda: loader.bench(loader.Sizes(repeats=repeats)).as_json(),
    }


def bench(folder: Path, repeats: int, only: tuple[str, ...] = (), say: turns.Say = lambda line: None) -> list[Path]:
    """Measure all, or `only` those named, and write each file as soon as it is measured; a missing peer leaves its file out.

    The folder's README.md becomes the table of all files that are there then; what grows gets a figure beside its file.

    Raises:
        UserError: a name of no comparison; a comparison that was asked for by name and cannot be made, or, once all are
            written, one whose arms compute different things.
    """
    known = comparisons(repeats, say)
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"no comparison {', '.join(unknown)}", f"known: {', '.join(known)}")
    written, wrong = [], []
    for name in only or known:
        try:
            found = known[name]()
        except UserError as error:
            if only:
                raise
            say(f"{name}: left out: {error.message}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        write_atomic(path, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        if name in plot.GROWS:
            write_atomic(path.with_suffix(".svg"), plot.svg(name, json.loads(path.read_bytes())))
        write_atomic(folder / "README.md", table.page(folder).encode())
        say(f"{name}: {path}")
        written.append(path)
        wrong += [f"{name}: {each}" for part in (found if isinstance(found, list) else [found]) for each in part["wrong"]]
    if wrong:
        raise UserError(f"arms that should compute the same do not: {'; '.join(wrong)}", "the files have the numbers")
    return written
