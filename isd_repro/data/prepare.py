"""`prepare` and `data pack`: draw a subset from its source and pack its images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from isd_repro.config import reader as config
from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.data import packing, sources, subsets
from isd_repro.data.store import usable_cores
from isd_repro.provenance import shown_provenance
from isd_repro.runtime.errors import ConfigError, printable
from isd_repro.tracking import open_stage

_EVERY = 10_000  # images between two lines where there is no terminal


def prepare(name: str, params: Params, layout: Layout, console: Console, processes: int | None = None) -> None:
    """Write the folder of one subset: manifest.json, images.tsv and, unless it is external, the store.

    Args:
        name: the subset's key in params.yaml.
        params: the whole profile.
        layout: where its files are.
        console: takes progress and warnings.
        processes: how many pack an external store from a folder of files: by default one for each core of this process. A
            store inside the profile is packed by threads: it is small, and starting processes would take longer.

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
            crew = (processes or usable_cores()) if subset.store.external else 1
            manifest = packing.build(
                layout.prepared(name), name, subset, listing, selection, processes=crew, say=say, advance=advance
            )
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


def pack(name: str, params: Params, layout: Layout, console: Console, processes: int | None) -> None:
    """As `prepare`, of a subset whose store is external; `ConfigError` where it is not: there would be nothing to resume."""
    if not config.find_subset(params, name).store.external:
        hint = "set store.external and ISD_PACK_ROOT, or run `isd-repro prepare`, which packs it inside the profile"
        raise ConfigError(f"{layout.file}: subsets.{name}.store.external: false, so that there is no pack to write", hint)
    prepare(name, params, layout, console, processes)


@contextmanager
def _progress(name: str, total: int, console: Console, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every so many images elsewhere; gives what to call with a number of images that are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"prepare {name}", total=total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.advance(task, count)
            if not console.is_terminal and count == 1 and done % _EVERY == 0:
                say(f"{done} of {total} images")

        yield advance
