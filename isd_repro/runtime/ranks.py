"""Communication between the processes (ranks) that train one run together, by `torch.distributed`.

A process that was not started by torchrun is alone: every function then returns its input, and no process group is created. With
several ranks, each has B / world rows of every batch, rank r those from r * B / world on. The loop averages what a method
computes from its rows (loss, metrics, gradients); code that needs all rows calls `gather`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isd_repro.runtime.errors import ConfigError, Preempted, UserError

PATIENCE = timedelta(hours=1)  # how long ranks wait for one that reads, writes or uploads; a process that ends is noticed at once


class RankLost(UserError):
    """Another rank has ended or cannot be reached."""


@contextmanager
def joined() -> Iterator[None]:
    """Within the block, the processes that torchrun started are the ranks of one run.

    Ranks that succeed, or stop with their state saved, wait for each other at the end, because torchrun kills all others when one
    ends.

    Raises:
        ConfigError: there are more processes than devices.
        RankLost: a rank cannot be reached.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            found = f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {devices} devices"
            raise ConfigError(f"torchrun: {found}", f"use --nproc-per-node {devices}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        try:
            yield
        except Preempted:
            with suppress(RankLost):
                anywhere(flag=False)
            raise
        anywhere(flag=False)
    finally:
        dist.destroy_process_group()


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The rank of this process, counted from 0."""
    return dist.get_rank() if _together() else 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@torch.no_grad()
def gather(rows: Tensor, span: int = 0) -> Tensor:
    """The rows of all ranks in the order of the ranks, with the same bits on each rank, without gradients.

    Args:
        rows: the rows of this rank, b x ...; shape and dtype must be the same on all ranks.
        span: gather only from the `span` neighbouring ranks that share a BatchNorm group; 0 means all ranks.
    """
    count = span or world()
    if count == 1:
        return rows
    rows = rows.contiguous()
    found = rows.new_empty(count, *rows.shape)
    with _told():
        dist.all_gather(list(found.unbind(0)), rows, group=_neighbours(count))
    return found.flatten(0, 1)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """As `gather` from all ranks, with gradients: the gradient of a rank's rows is the sum over the losses of all ranks."""
    gathered: Tensor = _Gather.apply(rows) if world() > 1 else rows
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return total(gradients[0].contiguous(), world()).chunk(world())[rank()]


@torch.no_grad()
def total(values: Tensor, span: int) -> Tensor:
    """The sum over the `span` neighbouring ranks that share a BatchNorm group, with the same bits on each of them."""
    found = values.clone()
    with _told():
        dist.all_reduce(found, group=_neighbours(span))
    return found


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over all ranks, in place, with one message per dtype."""
    count = world()
    if count == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        those = [tensor for tensor in tensors if tensor.dtype is dtype]
        flat = torch.cat([tensor.flatten() for tensor in those])
        with _told():
            dist.all_reduce(flat)
        flat /= count
        for tensor, part in zip(those, flat.split([tensor.numel() for tensor in those]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def anywhere(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks get the same answer, and none continues before all have called this."""
    if world() == 1:
        return flag
    found = torch.tensor(int(flag))  # on the CPU: no device waits for it
    with _told():
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def from_first(content: bytes) -> bytes:
    """The value of rank 0; the values of other ranks are ignored."""
    if world() == 1:
        return content
    found = [content]
    with _told():
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    return found[0]


def at_first(rows: Tensor) -> list[Tensor]:
    """On rank 0 the tensors of all ranks, by rank; on other ranks an empty list. All have one shape and dtype, on the CPU."""
    if world() == 1:
        return [rows]
    found = [torch.empty_like(rows) for _ in range(world())] if rank() == 0 else None
    with _told():
        dist.gather(rows.contiguous(), found, dst=0)
    return found or []


def rows(count: int) -> Tensor:
    """The rows of a batch of `count` on which this rank works, int64, ascending; `count` need not be divisible by the ranks.

    Every rank gets equally many rows: past the end the last row is repeated, and `whole` drops the repetitions.
    """
    each = -(-count // world())
    return torch.arange(rank() * each, (rank() + 1) * each).clamp_max(count - 1)


def whole(own: Tensor, count: int) -> Tensor:
    """Assemble a batch from the `rows` of all ranks, with the same bits on each rank, without gradients."""
    return gather(own)[:count]


@contextmanager
def first_alone() -> Iterator[None]:
    """Run the block on rank 0 first and then on the other ranks, which can use the files that it has made."""
    if rank() > 0:
        anywhere(flag=False)
    yield
    if rank() == 0:
        anywhere(flag=False)


@cache
def _neighbours(span: int) -> dist.ProcessGroup | None:
    """This rank's group of `span` consecutive ranks; every rank must request the same spans in the same order."""
    if span == world():
        return None  # all
    groups: list[Any] = [dist.new_group(list(range(first, first + span))) for first in range(0, world(), span)]
    mine: dist.ProcessGroup = groups[rank() // span]
    return mine


@contextmanager
def _told() -> Iterator[None]:
    """Turn the failure of a message into `RankLost`, because it means that another rank has ended."""
    try:
        yield
    except RuntimeError as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RankLost(
            f"another process of this run has ended or cannot be reached ({why})",
            "its own message says why; the same command resumes the run, on any number of processes",
        ) from error
