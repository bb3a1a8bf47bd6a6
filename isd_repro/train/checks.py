"""Whether a run is still sane: finite numbers, and embeddings that differ from each other. It changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from isd_repro.runtime.errors import UserError

SPREAD = "spread"  # metric of a method: sqrt(D) x mean deviation of unit-norm embeddings; 1 on a whole sphere, 0 at a point
LEAST_SPREAD = 0.01

_SHOWN = 3  # names that a message lists


class Diverged(UserError):
    """Numbers that are not finite, or features that are none."""


def gradient_norm(method: nn.Module) -> float:
    """Euclidean norm of all gradients together; one wait for the device."""
    gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
    return float(nn.utils.get_total_norm(gradients)) if gradients else 0.0


def is_finite(method: nn.Module) -> bool:
    """Whether every weight and buffer is finite; one wait for the device."""
    # One pass over each: a NaN is both ends. isfinite of everything makes five, and a bank is large.
    flags = [torch.isfinite(torch.stack(value.aminmax())).all() for _, value in _values(method) if value.numel()]
    return bool(torch.stack(flags).all()) if flags else True


def causes(method: nn.Module, loss: float, total: float) -> str:
    """What is not finite after a step, in the order in which it comes about; empty where everything is finite.

    Args:
        method: the module, its gradients those of the step.
        loss: the step's loss.
        total: the sum of the losses since the epoch began.
    """
    found = []
    if not math.isfinite(loss):
        found.append(f"the loss is {loss}")
    elif not math.isfinite(total):
        found.append(f"a loss earlier in the epoch was {total}")
    gradients = [(name, value.grad) for name, value in method.named_parameters() if value.grad is not None]
    found += _named("gradient", gradients)
    found += _named("value", _values(method))
    if not found and not math.isfinite(norm := gradient_norm(method)):
        found.append(f"the norm of the gradient is {norm}")
    return "; ".join(found)


def _values(method: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers of floating point."""
    for values in (method.named_parameters(), method.named_buffers()):
        yield from ((name, value.detach()) for name, value in values if value.is_floating_point())


def _named(what: str, values: Iterable[tuple[str, Tensor]]) -> list[str]:
    bad = [name for name, value in values if not bool(torch.isfinite(value).all())]
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return [f"no finite {what} in {', '.join(bad[:_SHOWN])}{more}"] if bad else []


@torch.inference_mode()
def check_features(encoders: Mapping[str, nn.Module], images: Tensor) -> None:
    """Pass one batch (B x C x H x W) through every encoder as an evaluation would.

    Raises:
        Diverged: features that are not finite: the weights may be, but nothing can be made of them.
    """
    for name, encoder in encoders.items():
        training = encoder.training
        encoder.eval()
        features = encoder(images)
        encoder.train(training)
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        if bad:
            message = f"after the last step encoder {name!r} gives features that are not finite for {bad} of {len(images)} images"
            raise Diverged(message, "the weights have grown without bound; lower optim.lr")


# --- collapse -----------------------------------------------------------------------------------------------------------


def collapsed(row: Mapping[str, float]) -> bool:
    """Whether an epoch's metrics say that all images have almost the same embedding."""
    return row.get(SPREAD, math.inf) < LEAST_SPREAD


def collapse(curve: Sequence[Mapping[str, float]]) -> str:
    """A run's collapsed epochs in words; empty where there are none."""
    rows = [row for row in curve if collapsed(row)]
    if not rows:
        return ""
    epochs = f"{len(rows)} of {len(curve)} epochs, first {int(rows[0]['epoch'])}, last {int(rows[-1]['epoch'])}"
    least = min(row[SPREAD] for row in rows)
    return f"embeddings collapsed in {epochs}: spread down to {least:.2g}, below {LEAST_SPREAD:g}"
