"""The teacher: a slowly moving average of the student."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from isd_repro.nn.heads import unit
from isd_repro.runtime import ranks

Net = TypeVar("Net", bound=nn.Module)


def teacher_of(student: Net) -> Net:
    """A deep copy of the student that takes no gradient, so that both start from the same weights."""
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


@torch.no_grad()
def update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, in place.

    Parameters only: the teacher's BatchNorm buffers come from its own forwards, as in train_isd.py of UMBCvision/ISD at 4bdd603.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    ours: list[Tensor] = [pair[0] for pair in pairs]
    theirs: list[Tensor] = [pair[1] for pair in pairs]
    if ours:
        torch._foreach_lerp_(ours, theirs, 1.0 - momentum)


@torch.no_grad()
def teach(teacher: nn.Module, student: nn.Module, momentum: float, view: Tensor, shuffle: Tensor) -> Tensor:
    """Update the teacher, then embed its view: unit-norm rows, B x D.

    The view passes in shuffled order and the rows are put back (shuffle-BN): with several BatchNorm groups the student's
    statistics then tell nothing about the teacher's (He et al., arXiv 1911.05722, section 3.3). With several ranks the view comes
    shuffled (see `interfaces.Batch`), so that only embeddings are exchanged and no image; the rows are those of the student's.
    """
    update(teacher, student, momentum)
    if ranks.world() == 1:
        shuffled_BD = unit(teacher(view[shuffle]))
        return torch.empty_like(shuffled_BD).index_copy_(0, shuffle, shuffled_BD)
    shuffled_BD = ranks.gather(unit(teacher(view)))
    embedding_BD = torch.empty_like(shuffled_BD).index_copy_(0, shuffle, shuffled_BD)
    return embedding_BD.chunk(ranks.world())[ranks.rank()]
