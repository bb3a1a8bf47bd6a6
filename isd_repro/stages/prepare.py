"""`prepare`: draw a subset from its source and pack its images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isd_repro import config
from isd_repro.artifacts import shown_provenance
from isd_repro.config import Layout
from isd_repro.data import packing, sources, subsets
from isd_repro.errors import printable
from isd_repro.params import Params
from isd_repro.tracking import open_stage

_EVERY = 10_000  # images between two lines where there is no terminal


def prepare(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Write the folder of one subset: manifest.json, images.tsv and, unless it is external, the store.

    Args:
        name: the subset's key in params.yaml.
        params: the whole profile.
        layout: where its files are.
        console: takes progress and warnings.

    Raises:
        ConfigError: there is no such subset, or its rule contradicts itself.
        DataError: images are missing, unreadable or too few.
        UserError: the source needs a package that is not installed, or another process prepares this subset.
    """
    began = time.monotonic()
    subset = config.find_subset(params, name)

    def say(line: str) -> None:
        console.print(printable(f"prepare {name}: {line}"), markup=False, highlight=False, soft_wrap=True)

    with sources.open_source(subset.source) as listing:
        selection = subsets.select(listing.images, subset, name)
        for note in (*listing.notes, *selection.notes):
            say(note)
        total = len(np.unique(np.concatenate([selection.train, selection.search, selection.query])))
        with _progress(name, total, console, say) as advance:
            manifest = packing.build(layout.prepared(name), name, subset, listing, selection, say=say, advance=advance)
    row = {
        "epoch": 0,
        "images": len(manifest.images),
        "train": len(manifest.train),
        "seconds": round(time.monotonic() - began, 3),
    }
    shown = {"subset": subset.model_dump(mode="json"), "manifest": manifest.sha256, **shown_provenance()}
    with open_stage("prepare", name, params, layout, identity=manifest.sha256, config=shown) as tracker:
        tracker.log(row)
    roles = f"train {len(manifest.train)}, search {len(manifest.search)}, query {len(manifest.query)}"
    say(f"{len(manifest.images)} images of {len(manifest.classes)} classes ({roles}), manifest {manifest.sha256[:16]}")


@contextmanager
def _progress(name: str, total: int, console: Console, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, a line every so many images elsewhere; gives what to call after each image."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"prepare {name}", total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if not console.is_terminal and done % _EVERY == 0:
                say(f"{done} of {total} images")

        yield advance
