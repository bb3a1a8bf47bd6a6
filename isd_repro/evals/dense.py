"""Dense queries: a rare class asked by its unused train images too, each answered by the search set without itself.

50 validation images a class leave a rare class's accuracy uncertain by seven points, and most train images of a rare class are
in no training. They are queries as good as validation images as long as no image answers itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isd_repro.data.manifests import Manifest
from isd_repro.data.subsets import rare_order
from isd_repro.errors import DataError
from isd_repro.evals import knn


def unused(manifest: Manifest, spared: int) -> Tensor:
    """Which search images are dense queries: those of rare classes behind the first `spared` of their class's draw.

    The balanced control of an unbalanced draw takes the first images of the same draw, so with `spared` of its size neither has
    been trained on them, and both get the same queries.

    Args:
        manifest: of a subset by the rule `unbalanced` or `halves`, whose search set holds every train image of its classes.
        spared: images of each class that training may have seen.

    Returns:
        positions in the search split, int64, ascending.

    Raises:
        DataError: there are no rare classes, the search set leaves train images out, or training has seen an image behind the
            first `spared`.
    """
    if "rare_images" not in manifest.rule or manifest.rule.get("search_per_class") is not None:
        hint = "dense queries need the rule unbalanced or halves, without search_per_class"
        raise DataError(f"subset {manifest.subset!r} has no rare classes, or searches a part of its train images", hint)
    found = []
    trained = set(manifest.train.tolist())
    for label, cls in enumerate(manifest.classes):
        if cls in manifest.large:
            continue
        members = [at for at, position in enumerate(manifest.search.tolist()) if manifest.labels[position] == label]
        order = rare_order(len(members), int(manifest.rule["seed"]), cls)
        rest = [members[at] for at in order[spared:]]
        seen = sum(int(manifest.search[at]) in trained for at in rest)
        if seen:
            message = f"subset {manifest.subset!r}: {seen} train images of class {cls} are behind the first {spared}"
            raise DataError(message, f"spare as many images as training sees: {seen + spared} or more of class {cls}")
        found += rest
    return torch.tensor(sorted(found), dtype=torch.int64)


def leave_one_out(search: Tensor, label: Tensor, asked: Tensor, ks: Sequence[int], device: torch.device) -> dict[int, Tensor]:
    """Predicted classes of search images by all others, for every k; neighbours, ties and votes as of `knn.predict`.

    Args:
        search: labelled features, N x D; need not be normalised.
        label: their classes, int64, N.
        asked: positions of the images to classify, int64, Q.
        ks: numbers of neighbours.
        device: where the search runs.

    Returns:
        int64 classes on the CPU, Q, by k.
    """
    near = knn.nearest(search, label, search[asked], max(ks) + 1, device)
    other = near != asked[:, None]
    other[other.all(dim=1), -1] = False  # so many copies that the image is not among its own nearest: the last is one too many
    near = near[other].view(len(asked), -1)
    return {k: knn.vote(label[near[:, :k]]) for k in ks}
