"""Features of frozen encoders, and the file that keeps them.

Images pass through the encoder in groups of a fixed size, which depends only on the device and the size of the images; the last
group is filled up by repeating its last image. A feature therefore has the same bits however many images are requested together.
On a CPU only small images need groups, so that little work is lost in the last one; a GPU needs large groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isd_repro.evaluations.arithmetic import exact
from isd_repro.runtime import ranks
from isd_repro.runtime.errors import DataError
from isd_repro.tensor_files import load_tensors, save_tensors

BLOCK = 32  # images read together on a CPU
_GPU_BLOCK = 256  # the same on a GPU, and its group
_GROUPS = ((160, 1), (96, 4), (48, 16))  # on a CPU: images from this many pixels wide -> size of a group; BLOCK below
UNUSABLE = "the encoder's weights are out of range, as after a training that diverged; an earlier checkpoint may be sound"
_ROWS = 1024  # rows checked together, so that a memory-mapped file is never copied whole

Images = Callable[[Tensor], Tensor]  # positions, int64, B -> normalised float images, B x C x H x W


def features(
    encoders: Mapping[str, nn.Module],
    images: Images,
    count: int,
    device: torch.device,
    on_block: Callable[[int], object] = lambda images: None,
) -> dict[str, Tensor]:
    """Pass `count` images through every encoder, reading each image once.

    With several ranks, each takes one block in turn. The bits of the result do not depend on the number of ranks.

    Args:
        encoders: modules B x C x H x W -> B x D by name; moved to `device` and left in eval mode, otherwise unchanged.
        images: returns the images at up to BLOCK (on a GPU 256) consecutive positions in 0..count-1.
        count: N, at least 1.
        device: where the forward pass runs.
        on_block: called with a number of images after each group, or with several ranks after each block of all ranks.

    Returns:
        float32 features on the CPU, N x D, by encoder; not normalised. With several ranks only rank 0 has them.

    Raises:
        DataError: there are no images, or features are not finite.
    """
    if count < 1:
        raise DataError("no images to extract features from", "check the subset's rule: it gives an empty split")
    for encoder in encoders.values():
        encoder.to(device).eval()
    found: dict[str, Tensor] = {}
    size, alone = BLOCK if device.type == "cpu" else _GPU_BLOCK, ranks.world() == 1
    round_size = size * ranks.world()
    with exact(device):
        for first in range(0, count, round_size):
            start = first + ranks.rank() * size
            stop = min(start + size, count) if alone else start + size  # all ranks have equal shares to exchange
            batch = images(torch.arange(start, stop).clamp_(max=count - 1)).to(device, torch.float32)
            made: dict[str, list[Tensor]] = {name: [] for name in encoders}
            group = group_size(batch.shape[-1], device)
            for part in batch.split(group):
                filled = torch.cat([part, part[-1:].expand(group - len(part), *part.shape[1:])]) if len(part) < group else part
                for name, encoder in encoders.items():
                    with torch.inference_mode():
                        made[name].append(encoder(filled)[: len(part)].cpu())
                if alone:
                    on_block(len(part))
            for name, parts in made.items():
                blocks = ranks.at_first(torch.cat(parts))  # every rank's, by rank; none on ranks other than 0
                found.setdefault(name, torch.empty(count, blocks[0].shape[1]) if blocks else torch.empty(0))
                for at, block in zip(range(first, count, size), blocks, strict=False):
                    found[name][at : at + size] = block[: count - at]
            if not alone:
                on_block(min(round_size, count - first))
    for name, rows in found.items() if ranks.rank() == 0 else ():
        require_finite(rows, f"features of encoder {name!r}")
    return found


def group_size(side: int, device: torch.device) -> int:
    """How many images of this side (pixels) pass through the encoder together; the last bits of features may depend on it."""
    if device.type != "cpu":
        return _GPU_BLOCK
    return next((group for least, group in _GROUPS if side >= least), BLOCK)


def require_finite(values: Tensor, what: str) -> None:
    """Raise `DataError` if a row of `values` (N x D) has an infinity or NaN, or a norm beyond float32's range."""
    bad = overflow = 0
    for part in values.split(_ROWS):
        odd = ~torch.isfinite(torch.linalg.vector_norm(part, dim=1))
        if bool(odd.any()):
            finite = torch.isfinite(part[odd]).all(dim=1)
            overflow += int(finite.sum())
            bad += int((~finite).sum())
    problems = [f"{bad} of {len(values)} rows are not finite"] if bad else []
    problems += [f"{overflow} of {len(values)} rows are too long for float32 and have no direction"] if overflow else []
    if problems:
        raise DataError(f"{what}: {' and '.join(problems)}", UNUSABLE)


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """The content of a features file."""

    search: dict[str, Tensor]  # float32 features of the search split by encoder, N x D, not normalised
    query: dict[str, Tensor]  # the same of the query split, Q x D
    search_label: Tensor  # classes of the search split, int64, N
    query_label: Tensor  # classes of the query split, int64, Q
    identity: dict[str, Any]  # the file's header: run, encoder_sha256, manifest, encoders, image_size


def save_features(path: Path, found: Features) -> None:
    """Write a features file; equal features give equal bytes."""
    tensors = {"search.label": found.search_label, "query.label": found.query_label}
    for name in found.search:
        tensors |= {f"{name}.search": found.search[name], f"{name}.query": found.query[name]}
    save_tensors(path, "features", tensors, found.identity)


def load_features(path: Path, encoder_sha256: str) -> Features:
    """Read what `save_features` wrote.

    Raises:
        DataError: the file is missing or damaged, its parts do not match, or it was made by another encoder file.
    """
    tensors, identity = load_tensors(path, "features")
    hint = "run `extract` again"
    if identity.get("encoder_sha256") != encoder_sha256:
        made = str(identity.get("encoder_sha256"))[:12]
        raise DataError(f"{path}: made by encoder file {made}, but the run's encoder file is {encoder_sha256[:12]}", hint)
    names, found = tuple(identity.get("encoders", ())), dict[str, dict[str, Tensor]]()
    wanted = {"search.label", "query.label", *(f"{name}.{split}" for name in names for split in ("search", "query"))}
    if not names or wanted != set(tensors):
        raise DataError(f"{path}: expected tensors {sorted(wanted)}, found {sorted(tensors)}", hint)
    for split in ("search", "query"):
        found[split] = {name: tensors[f"{name}.{split}"] for name in names}
        for name, rows in found[split].items():
            if len(rows) != (labels := len(tensors[f"{split}.label"])):
                raise DataError(f"{path}: {len(rows)} rows in {name}.{split}, but {labels} in {split}.label", hint)
    return Features(found["search"], found["query"], tensors["search.label"], tensors["query.label"], identity)
