"""Stage `extract`: a run's encoders and its prepared subset in, features of the search and query images out."""

from __future__ import annotations

import time
from functools import partial

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from isd_repro.artifacts import sha256_file, shown_provenance
from isd_repro.config import Layout, find_run
from isd_repro.data.images import Frame, StoreReader, centred
from isd_repro.data.prepared import open_prepared
from isd_repro.evals.arithmetic import best_device
from isd_repro.evals.encoders import check_manifest, check_run, load_encoders
from isd_repro.evals.extract import Features, features, save_features
from isd_repro.params import Params
from isd_repro.tracking import open_stage


def extract(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Extract features with every encoder of a run; each image is read once for all of them.

    Raises:
        ConfigError: no such run.
        DataError: the encoder file or the prepared subset is missing, damaged, or made for other images.
    """
    started = time.monotonic()
    run = find_run(params, name)
    path = layout.encoder(name)
    sha256 = sha256_file(path)
    encoders, identity = load_encoders(path)
    check_run(path, identity, name)
    prepared = open_prepared(layout.prepared(run.data.subset), layout.verified)
    check_manifest(path, identity.manifest, prepared.identity.sha256)
    splits = {"search": prepared.split("search"), "query": prepared.split("query")}
    reader = StoreReader(prepared.store)
    frame = Frame(identity.image_size, identity.crop_ratio, identity.mean, identity.std)
    device = best_device()
    found: dict[str, dict[str, Tensor]] = {}
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for which, split in splits.items():
            task = bar.add_task(f"{name} {which}", total=len(split))
            images = centred(reader, split.index, frame, device)
            found[which] = features(encoders, images, len(split), device, partial(bar.advance, task))
    kept = Features(
        search=found["search"],
        query=found["query"],
        search_label=splits["search"].label,
        query_label=splits["query"].label,
        identity={
            "run": name,
            "encoder_sha256": sha256,
            "manifest": identity.manifest,
            "encoders": list(encoders),
            "image_size": identity.image_size,
            "normalised": False,
        },
    )
    save_features(layout.features(name), kept)
    counts = f"{len(splits['search'])} search and {len(splits['query'])} query images"
    seconds = time.monotonic() - started
    config = {"encoder_sha256": sha256, "manifest": identity.manifest, **shown_provenance()}
    row = {"epoch": run.optim.epochs, "images": sum(map(len, splits.values())), "seconds": round(seconds, 3)}
    with open_stage("extract", name, params, layout, identity=sha256, config=config) as tracker:
        tracker.log(row)
    console.print(f"{name} {', '.join(encoders)}: {counts} in {seconds:.1f} s", highlight=False, soft_wrap=True)
