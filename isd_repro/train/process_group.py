"""One run on several processes that torchrun started, on one machine or many.

Every rank holds the whole method and steps through the same batches, each with its part of the rows. After the backward pass
gradients become their mean over the ranks, so that all take the same step; banks are filled with all ranks' embeddings, teachers
follow their own student, and nothing else is exchanged. Rank 0 alone writes.

`DistributedDataParallel` would average gradients too, a part of them during the backward pass. It arranges its buckets anew after
a process's first step, and the order of a sum over ranks follows the place in a bucket: a resumed run would differ from an
undisturbed one in the last bits. It also sends rank 0's buffers to all (a bank of 131 MB), where BatchNorm's must be averaged. So
there is one message after the backward pass instead, in the order of the parameters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from isd_repro.nn.batchnorm import statistics
from isd_repro.runtime import launcher, ranks
from isd_repro.runtime.errors import ConfigError, DataError, Preempted, UserError
from isd_repro.train import checkpoint
from isd_repro.train.checkpoint import Progress

PATIENCE = timedelta(hours=1)  # how long ranks wait for one that reads, writes or uploads; a process that ends is noticed at once
_SAME = "give every machine the same checkout, packages, parameters and images"


@contextmanager
def joined() -> Iterator[None]:
    """Within the block the processes that torchrun started are ranks of one run; a process that it did not start is alone.

    Ranks that end well, or stop with their state saved, leave together, since torchrun ends all others when one is gone.

    Raises:
        ConfigError: more processes than devices.
        RankLost: a rank could not be reached.
    """
    if launcher.ranks() == 1:
        yield
        return
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
            with suppress(ranks.RankLost):
                ranks.anywhere(flag=False)
            raise
        ranks.anywhere(flag=False)
    finally:
        dist.destroy_process_group()


def share(fingerprint: str, method: nn.Module, optimizer: Optimizer, progress: Progress, now: Mapping[str, str]) -> Progress:
    """Give every rank rank 0's state, and return its progress.

    Args:
        fingerprint: of the run, as this rank sees it.
        method: takes the state.
        optimizer: takes the state.
        progress: that of rank 0; what the others give is not looked at.
        now: this rank's code, see `code.code_of`.

    Raises:
        UserError: this rank works with other parameters, images or code than rank 0.
    """
    if ranks.world() == 1:
        return progress
    mine = ranks.rank() == 0
    content = ranks.from_first(checkpoint.dump(fingerprint, method, optimizer, progress) if mine else b"")
    if mine:
        return progress
    device = next(method.parameters()).device
    try:
        found = checkpoint.take(content, fingerprint, method, optimizer, device)
    except (checkpoint.Wrong, DataError) as error:
        raise UserError(f"rank {ranks.rank()} does not train what rank 0 trains ({error})", _SAME) from error
    if found.code != now:
        names = ", ".join(sorted(name for name in {*found.code, *now} if found.code.get(name) != now.get(name)))
        raise UserError(f"rank {ranks.rank()} has other code than rank 0: {names}", _SAME)
    return found


def average_step(method: nn.Module) -> None:
    """Gradients and BatchNorm statistics of this rank's rows become those of the whole batch."""
    if ranks.world() > 1:
        gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
        ranks.average_([*gradients, *statistics(method)])


def average_metrics(loss: Tensor, sums: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """A step's loss, and sums of metrics since the epoch began, as means over ranks; linear, so at any step."""
    if ranks.world() == 1:
        return float(loss.detach()), dict(sums)
    values = [loss.detach().clone(), *(value.clone() for value in sums.values())]
    ranks.average_(values)
    return float(values[0]), dict(zip(sums, values[1:], strict=True))


def stopping(asked: bool, *, look: bool) -> bool:
    """Whether to stop after this step: alone at once, else when all look at it together and one of them was asked to."""
    return asked if ranks.world() == 1 else look and ranks.anywhere(asked)
