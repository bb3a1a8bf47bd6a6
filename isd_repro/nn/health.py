"""Whether embeddings collapse, measured beside the loss: detached, on the device, and without waiting for it.

They change no number of the training. `purity` reads labels, so no method calls it: the monitor of the loop does, once an epoch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isd_repro.runtime import ranks

NEAREST = 10  # anchors that `purity` looks at
_ROWS = 256  # queries of `purity` at a time


@torch.no_grad()
def health(student_BD: Tensor, teacher_BD: Tensor | None = None) -> dict[str, Tensor]:
    """What a method adds to its metrics, under the names that records have; rows are unit vectors.

    Returns:
        `spread`: the embedding std over all ranks' rows; `gap`: the cosine distance between student and teacher, if there is one.
    """
    found = {"spread": embedding_std(ranks.gather(student_BD))}
    if teacher_BD is not None:
        found["gap"] = cosine_distance(student_BD, teacher_BD)
    return found


@torch.no_grad()
def embedding_std(embedding_BD: Tensor) -> Tensor:
    """Mean over the D dimensions of the standard deviation over the batch (B - 1 in its denominator), times sqrt(D).

    About 1 for directions drawn evenly from the sphere, 0 where every image has the same embedding.
    """
    mean: Tensor = embedding_BD.std(dim=0).mean()
    return mean * math.sqrt(embedding_BD.shape[1])


@torch.no_grad()
def cosine_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean of 1 - cosine between what student and teacher make of the same image; rows are unit vectors."""
    return 1 - (student_BD * teacher_BD).sum(1).mean()


@torch.no_grad()
def purity(rows_KD: Tensor, label_K: Tensor, newest_B: Tensor) -> Tensor:
    """How often the teacher's nearest anchors show the class of the image that asks.

    Args:
        rows_KD: the bank, unit-norm rows.
        label_K: class of the image behind each row, int64; negative where a row is no image yet.
        newest_B: positions of the last batch in the bank; they ask, and the older rows answer.

    Returns:
        The share of same-class images among the NEAREST (or fewer, where there are fewer) most similar older rows, averaged over
        the askers; NaN where no older row is an image.
    """
    older = label_K >= 0
    older[newest_B] = False
    rows_KD = rows_KD.to(torch.promote_types(rows_KD.dtype, torch.float32))  # a count in float16 would end at 2,048
    anchors_AD, label_A = rows_KD[older], label_K[older]
    nearest = min(NEAREST, len(anchors_AD))
    if nearest == 0:
        return rows_KD.new_full((), torch.nan)
    same = rows_KD.new_zeros(())
    for asking in newest_B.split(_ROWS):
        found = (rows_KD[asking] @ anchors_AD.T).topk(nearest, dim=1).indices
        same += (label_A[found] == label_K[asking, None]).to(same.dtype).sum()
    return same / (nearest * len(newest_B))
