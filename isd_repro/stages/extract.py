"""Stage `extract`: a run's encoders and its prepared subset in, features of the search and query images out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from isd_repro.config.layout import Layout
from isd_repro.config.params import Params
from isd_repro.config.reader import find_run
from isd_repro.data.eval_loader import Frame, StoreReader, centred
from isd_repro.data.manifests import open_prepared
from isd_repro.evaluations.arithmetic import best_device, exact
from isd_repro.evaluations.encoders import check_manifest, check_run, load_encoders
from isd_repro.evaluations.extract import BLOCK, Features, Images, features, forward, ready, require_finite, save_features
from isd_repro.provenance import shown_provenance
from isd_repro.runtime import ranks
from isd_repro.runtime.files import sha256_file
from isd_repro.tracking import open_stage


def extract(name: str, params: Params, layout: Layout, console: Console) -> None:
    """Extract features with every encoder of a run; each image is read once for all of them.

    Several ranks take the blocks of images in turn; rank 0 puts them together and writes.

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
    with ranks.first_alone():
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
            every = features if ranks.world() == 1 else shared_features
            found[which] = every(encoders, images, len(split), device, partial(bar.advance, task))
    if ranks.rank() > 0:
        return
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


def shared_features(
    encoders: Mapping[str, nn.Module],
    images: Images,
    count: int,
    device: torch.device,
    on_block: Callable[[int], object] = lambda images: None,
) -> dict[str, Tensor]:
    """As `evals.extract.features` and the same bits, the work shared: in each round every rank takes one block.

    Returns:
        all features on rank 0; on the others tensors of the same shape that hold nothing.
    """
    ready(encoders, count, device)
    found: dict[str, Tensor] = {}
    with exact(device):
        for first in range(0, count, BLOCK * ranks.world()):
            start = min(first + ranks.rank() * BLOCK, count - 1)  # past the end: a block that nobody keeps
            for name, rows in forward(encoders, images, start, count, device).items():
                found.setdefault(name, torch.empty(count, rows.shape[1]))
                mine = rows.new_zeros(BLOCK, rows.shape[1])
                mine[: len(rows)] = rows
                for rank, block in enumerate(ranks.at_first(mine)):
                    at = first + rank * BLOCK
                    found[name][at : at + BLOCK] = block[: max(0, min(BLOCK, count - at))]
            on_block(min(BLOCK * ranks.world(), count - first))
    if ranks.rank() == 0:
        for name, rows in found.items():
            require_finite(rows, f"features of encoder {name!r}")
    return found
