"""What must hold on any device, on a CUDA device if available: the CPU's views and neighbours, and a resume bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from isd_repro import methods
from isd_repro.config.params import Blur, Jitter, Numerics, View
from isd_repro.data import augment
from isd_repro.evaluations import neighbour_search
from tests.conformance import problem

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STRONG = View(
    jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    grayscale=0.2,
    blur=Blur(sigma_min=0.1, sigma_max=2.0, p=0.5),
)
ENGINES = [Numerics(), Numerics(engine="fast"), Numerics(engine="fast", precision="bf16")]


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_those_of_the_cpu(channels: int, device: str) -> None:
    pixels = torch.randint(256, (64, channels, 80, 96), dtype=torch.uint8, generator=draws(0))
    sizes = torch.stack([torch.randint(40, 81, (64,), generator=draws(1)), torch.randint(40, 97, (64,), generator=draws(2))], 1)
    drawn = augment.draw(sizes, STRONG, draws(3))
    want = augment.apply(pixels, drawn, STRONG, 48)
    torch.testing.assert_close(augment.apply(pixels.to(device), drawn, STRONG, 48).cpu(), want, rtol=0, atol=1e-4)
    want = augment.centre(pixels, sizes, 32, 0.875)
    torch.testing.assert_close(augment.centre(pixels.to(device), sizes, 32, 0.875).cpu(), want, rtol=0, atol=1e-5)
    mean, std = (0.4,) * channels, (0.2,) * channels
    torch.testing.assert_close(augment.normalise(want.to(device), mean, std).cpu(), augment.normalise(want, mean, std))


@pytest.mark.parametrize("device", DEVICES)
def test_neighbours_are_those_of_the_cpu(device: str) -> None:
    """Where all products are exact, ties included; elsewhere but for near-ties."""
    where = torch.device(device)
    label = torch.randint(10, (5000,), generator=draws(0))
    bank, query = (2.0 * torch.randint(0, 2, (rows, 64), generator=draws(rows)) - 1 for rows in (5000, 1100))
    assert torch.equal(
        neighbour_search.nearest(bank, label, query, 20, where), neighbour_search.nearest(bank, label, query, 20, CPU)
    )
    bank, query = (torch.randn(rows, 96, generator=draws(rows)) for rows in (5000, 1100))
    ours, theirs = (neighbour_search.nearest(bank, label, query, 20, device) for device in (where, CPU))
    row, rank = (ours != theirs).nonzero(as_tuple=True)
    unit = functional.normalize(query[row].double(), dim=1)
    one, other = (functional.normalize(bank[found[row, rank]].double(), dim=1) for found in (ours, theirs))
    assert float(((unit * one).sum(1) - (unit * other).sum(1)).abs().max() if len(row) else 0) < 1e-6
    assert len(row) < 0.001 * ours.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("numerics", ENGINES, ids=lambda given: f"{given.engine}-{given.precision}")
@pytest.mark.parametrize("name", methods.names())
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    name: str, numerics: Numerics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it is one of `test_methods`."""
    monkeypatch.setattr(problem, "NUMERICS", numerics)
    problem.assert_resumes_exactly(name, tmp_path / "checkpoint.pt", "cuda", groups=2)
