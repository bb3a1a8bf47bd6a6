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
    """theta_teacher <- momentum * theta_teacher + (1 - momentum) * theta_student, in place; once in a step.

    Parameters only: the teacher's BatchNorm buffers come from its own forwards, as in train_isd.py of UMBCvision/ISD at 4bdd603.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    ours: list[Tensor] = [pair[0] for pair in pairs]
    theirs: list[Tensor] = [pair[1] for pair in pairs]
    if ours:
        torch._foreach_lerp_(ours, theirs, 1.0 - momentum)


@torch.no_grad()
def embed(teacher: nn.Module, view: Tensor, shuffle: Tensor) -> Tensor:
    """The teacher's embedding of a view: unit-norm rows in the view's order, B x D; the teacher's weights stay as they are.

    The images of all ranks pass through the teacher in the order of `shuffle` and the rows are put back (shuffle-BN): with
    several BatchNorm groups the student's statistics then tell nothing about the teacher's (He et al., arXiv 1911.05722,
    section 3.3).
    """
    shuffled = ranks.gather(view)[shuffle].chunk(ranks.world())[ranks.rank()]
    shuffled_BD = ranks.gather(unit(teacher(shuffled)))
    embedding_BD = torch.empty_like(shuffled_BD).index_copy_(0, shuffle, shuffled_BD)
    return embedding_BD.chunk(ranks.world())[ranks.rank()]
